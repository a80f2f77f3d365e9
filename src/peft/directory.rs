//! Replacing a directory as a whole.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
};

use crate::{LoraError, files::sync};

/// Makes `dir` hold what `write` puts into the directory that it is given, as the files `names`,
/// along with the other files that are in `dir` already. Until the very end `dir` is as it was.
pub(super) fn replace(
    dir: &Path,
    names: &[&str],
    write: impl FnOnce(&Path) -> Result<(), LoraError>,
) -> Result<(), LoraError> {
    // Through links, so that a link to a directory stays one.
    let dir = match fs::canonicalize(dir) {
        Ok(dir) => dir,
        Err(error) if error.kind() == io::ErrorKind::NotFound => dir.to_owned(),
        Err(source) => return Err(LoraError::Io { path: dir.to_owned(), source }),
    };
    let unfinished = Unfinished::create_beside(&dir)?;
    write(&unfinished.0)?;
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| LoraError::Io { path, source }
    };
    if dir.exists() {
        keep_others(&dir, names, &unfinished.0).map_err(io(&dir))?;
    }
    for name in names {
        sync(&unfinished.0.join(name)).map_err(io(&unfinished.0))?;
    }
    sync(&unfinished.0).map_err(io(&unfinished.0))?;
    exchange(&unfinished.0, &dir).map_err(io(&dir))?;
    sync(parent(&dir)).map_err(io(parent(&dir)))
    // What was exchanged is the old directory, which goes with `unfinished`.
}

/// A directory that is removed in the end, whatever happens.
struct Unfinished(PathBuf);

impl Unfinished {
    fn create_beside(dir: &Path) -> Result<Self, LoraError> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let parent = parent(dir);
        let io = |source| LoraError::Io { path: parent.to_owned(), source };
        fs::create_dir_all(parent).map_err(io)?;
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        loop {
            let count = COUNT.fetch_add(1, Ordering::Relaxed);
            let path = parent.join(format!(".{name}.{}-{count}.tmp", std::process::id()));
            match fs::create_dir(&path) {
                Ok(()) => return Ok(Self(path)),
                // Left behind by a process that had our number.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(source) => return Err(io(source)),
            }
        }
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // After a rename it is gone already; and what cannot be removed does no harm.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn parent(dir: &Path) -> &Path {
    match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Takes over the files of the old directory that are not replaced.
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

/// Gives `new` the name `dir`, in one step that is done or not done.
fn exchange(new: &Path, dir: &Path) -> io::Result<()> {
    if !dir.exists() {
        return fs::rename(new, dir);
    }
    #[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        match renameat_with(CWD, new, CWD, dir, RenameFlags::EXCHANGE) {
            Ok(()) => return Ok(()),
            // File systems that cannot do it say so in one of these ways.
            Err(
                rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS | rustix::io::Errno::NOTSUP,
            ) => {}
            Err(error) => return Err(error.into()),
        }
    }
    // Two steps, with nothing at `dir` in between; the old directory is then beside it.
    let aside = new.with_extension("old");
    fs::rename(dir, &aside)?;
    if let Err(error) = fs::rename(new, dir) {
        fs::rename(&aside, dir)?;
        return Err(error);
    }
    fs::remove_dir_all(aside)
}
