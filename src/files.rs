//! What all that writes files needs.

use std::{fs::File, io, path::Path};

/// Waits until a file or directory is on the disk.
#[cfg(unix)]
pub(crate) fn sync(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Elsewhere directories cannot be opened, and files only for writing be synced.
#[cfg(not(unix))]
pub(crate) fn sync(path: &Path) -> io::Result<()> {
    if path.is_dir() { Ok(()) } else { File::options().append(true).open(path)?.sync_all() }
}
