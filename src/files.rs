//! Files that get their name when they are complete and on the disk.

use std::{
    fs::{self, File, Metadata},
    io,
    path::Path,
};

#[cfg(not(unix))]
use std::time::SystemTime;

use tempfile::{Builder, TempDir};

use crate::error::LoraError;

/// A hidden directory in `dir` for files that are not complete. It is removed in the end, with what is
/// left in it. A process that is killed leaves it there.
pub(crate) fn unfinished_in(dir: &Path) -> io::Result<TempDir> {
    Builder::new().prefix(".unfinished-").tempdir_in(dir)
}

/// Replaces the file at `path` in one step, by one that `write` creates where it is told to. Until then the old file
/// stays as it was. A link stays one, and the file that it leads to is replaced. An existing file keeps its mode.
pub(crate) fn replace(
    path: &Path,
    write: impl FnOnce(&Path) -> Result<(), LoraError>,
) -> Result<(), LoraError> {
    let io = |source| LoraError::Io { path: path.to_owned(), source };
    let path = &fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let dir = match path.parent() {
        Some(dir) if dir != Path::new("") => dir,
        _ => Path::new("."),
    };
    let directory = unfinished_in(dir).map_err(io)?;
    let unfinished = directory.path().join("unfinished");
    write(&unfinished)?;
    if let Ok(old) = fs::metadata(path) {
        fs::set_permissions(&unfinished, old.permissions()).map_err(io)?;
    }
    // Without `sync`, the new name could reach the disk before the content.
    let renamed = sync(&unfinished).and_then(|()| fs::rename(&unfinished, path));
    renamed.and_then(|()| sync(dir)).map_err(io)
}

#[cfg(unix)]
pub(crate) type Identity = (u64, u64);

#[cfg(not(unix))]
pub(crate) type Identity = (Option<SystemTime>, Option<SystemTime>);

/// What an open file has in common with no other file at that time.
#[cfg(unix)]
pub(crate) fn identity(file: &Metadata) -> Identity {
    use std::os::unix::fs::MetadataExt;
    (file.dev(), file.ino())
}

/// What an open file most likely has in common with no other file.
#[cfg(not(unix))]
pub(crate) fn identity(file: &Metadata) -> Identity {
    (file.created().ok(), file.modified().ok())
}

/// Waits until a file or directory is on the disk.
#[cfg(unix)]
pub(crate) fn sync(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Waits until a file is on the disk. Outside Unix, a directory cannot be opened, and a file must be
/// open for writing to be synced.
#[cfg(not(unix))]
pub(crate) fn sync(path: &Path) -> io::Result<()> {
    if path.is_dir() { Ok(()) } else { File::options().append(true).open(path)?.sync_all() }
}
