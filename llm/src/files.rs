//! Files that are written as a whole or not at all.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

/// Writes a file so that it exists as a whole or not at all. Creates its directory if it is missing.
///
/// # Errors
///
/// If the file or its directory cannot be written. An old file stays as it was then.
///
/// # Panics
///
/// If the path is that of no file.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let dir = path.parent().expect("the path has a directory");
    fs::create_dir_all(dir)?;
    let unfinished = path.with_extension(format!("{}.part", std::process::id()));
    let mut file = File::create(&unfinished)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(unfinished, path)
}
