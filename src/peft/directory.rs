//! Replacing a directory in one step.

use std::{ffi::OsString, fs, io, path::Path};

use tempfile::{Builder, TempDir};

use crate::{error::LoraError, files::sync};

/// Replaces the files `names` in `dir`. `write` creates the new files in the directory that it is given.
/// Other files in `dir` are kept. Until the last step `dir` does not change.
pub(super) fn replace(
    dir: &Path,
    names: &[&str],
    write: impl FnOnce(&Path) -> Result<(), LoraError>,
) -> Result<(), LoraError> {
    // Links are followed, so that a link to a directory stays a link.
    let dir = match fs::canonicalize(dir) {
        Ok(dir) => dir,
        Err(error) if error.kind() == io::ErrorKind::NotFound => dir.to_owned(),
        Err(source) => return Err(LoraError::Io { path: dir.to_owned(), source }),
    };
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| LoraError::Io { path, source }
    };
    let unfinished = create_beside(&dir).map_err(io(parent(&dir)))?;
    // The temporary directory is removed at the end. By then it holds the old files or, after an error,
    // the unfinished new ones.
    let unfinished = unfinished.path();
    write(unfinished)?;
    if dir.exists() {
        keep_others(&dir, names, unfinished).map_err(io(&dir))?;
    }
    for name in names {
        sync(&unfinished.join(name)).map_err(io(unfinished))?;
    }
    sync(unfinished).map_err(io(unfinished))?;
    exchange(unfinished, &dir).map_err(io(&dir))?;
    sync(parent(&dir)).map_err(io(parent(&dir)))
}

/// An empty directory with the permissions of `dir`.
fn create_beside(dir: &Path) -> io::Result<TempDir> {
    fs::create_dir_all(parent(dir))?;
    let mut prefix = OsString::from(".");
    prefix.push(dir.file_name().unwrap_or_default());
    let mut builder = Builder::new();
    builder.prefix(&prefix).suffix(".tmp");
    if let Ok(metadata) = fs::metadata(dir) {
        builder.permissions(metadata.permissions());
    }
    builder.tempdir_in(parent(dir))
}

fn parent(dir: &Path) -> &Path {
    match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Links or copies to `new` the files of the old directory that are not replaced.
fn keep_others(old: &Path, names: &[&str], new: &Path) -> io::Result<()> {
    for entry in fs::read_dir(old)? {
        let entry = entry?;
        let name = entry.file_name();
        if names.iter().any(|it| name == *it) {
            continue;
        }
        if !entry.file_type()?.is_file() {
            let problem = format!(
                "holds {}, which is not a file; save into a directory of its own",
                name.display()
            );
            return Err(io::Error::other(problem));
        }
        let (from, to) = (entry.path(), new.join(&name));
        if fs::hard_link(&from, &to).is_err() {
            fs::copy(&from, &to)?;
            sync(&to)?;
        }
    }
    Ok(())
}

/// Gives `new` the name `dir`, in one atomic step if the system has one.
fn exchange(new: &Path, dir: &Path) -> io::Result<()> {
    if !dir.exists() {
        return fs::rename(new, dir);
    }
    #[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        match renameat_with(CWD, new, CWD, dir, RenameFlags::EXCHANGE) {
            Ok(()) => return Ok(()),
            // File systems that cannot exchange two directories return one of these errors.
            Err(
                rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS | rustix::io::Errno::NOTSUP,
            ) => {}
            Err(error) => return Err(error.into()),
        }
    }
    // Otherwise in two steps. Between them `dir` does not exist, and the old directory is next to it.
    let aside = new.with_extension("old");
    fs::rename(dir, &aside)?;
    if let Err(error) = fs::rename(new, dir) {
        fs::rename(&aside, dir)?;
        return Err(error);
    }
    fs::remove_dir_all(aside)
}
