//! Waiting until files are on the disk.

use std::{fs::File, io, path::Path};

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
