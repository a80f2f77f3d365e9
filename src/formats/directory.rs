//! The two files of an adapter directory, replaced and opened together.

use std::{
    fs::{self, File, TryLockError},
    io::{self, Read},
    path::Path,
    thread,
    time::Duration,
};

use super::{CONFIG, WEIGHTS, find};
use crate::{
    error::LoraError,
    files::{identity, sync, unfinished_in},
};

/// How often [`open`] tries. Each time that it fails, a save has come in between.
const ATTEMPTS: usize = 20;

/// The configuration of a set, and its weights with their length. `parse` reads the configuration, and
/// returns it with the name of the file of the weights.
pub(super) fn open<C>(
    dir: &Path,
    parse: impl Fn(&[u8]) -> Result<(C, &'static str), LoraError>,
) -> Result<(C, File, u64), LoraError> {
    let config_path = dir.join(CONFIG);
    let io = |source| LoraError::Io { path: config_path.clone(), source };
    let open = || {
        let (mut file, _) = find::open(&config_path)?;
        let mut text = Vec::new();
        file.read_to_end(&mut text).map_err(io)?;
        let (config, weights) = parse(&text)?;
        let (weights, length) = find::open(&dir.join(weights))?;
        // Each save has a configuration file of its own. While one is open, no other is mistaken for it.
        let opened = file.metadata().map_err(io)?;
        if identity(&opened) == identity(&fs::metadata(&config_path).map_err(io)?) {
            return Ok((config, weights, length));
        }
        let problem = "it is replaced again and again; load it when nothing saves to it".to_owned();
        Err(LoraError::InvalidFile { file: dir.display().to_string(), problem })
    };
    // Without the lock, the files could seem to be missing.
    let _lock = lock(dir, File::try_lock_shared);
    (1..ATTEMPTS).map(|_| open()).find(Result::is_ok).unwrap_or_else(open)
}

/// Replaces the two files in `dir`. `write` creates the new ones in the directory that it is given.
/// Other files in `dir` are kept. Until the last step `dir` does not change.
pub(super) fn replace(
    dir: &Path,
    write: impl Fn(&Path) -> Result<(), LoraError>,
) -> Result<(), LoraError> {
    let io = |source| LoraError::Io { path: dir.to_owned(), source };
    let fill = |new: &Path| {
        write(new)?;
        [CONFIG, WEIGHTS].iter().try_for_each(|name| sync(&new.join(name))).map_err(io)
    };
    let is_new = !dir.exists();
    fs::create_dir_all(dir).map_err(io)?;
    // Links are followed, so that a link to a directory stays a link.
    let dir = &fs::canonicalize(dir).map_err(io)?;
    let replaced = (|| {
        #[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
        if let Ok(new) = successor(dir) {
            use rustix::fs::{CWD, RenameFlags, renameat_with};
            fill(new.path())?;
            sync(new.path()).map_err(io)?;
            if renameat_with(CWD, new.path(), CWD, dir, RenameFlags::EXCHANGE).is_ok() {
                return sync(dir.parent().unwrap_or(dir)).map_err(io);
            }
        }
        let new = unfinished_in(dir).map_err(io)?;
        fill(new.path())?;
        move_in(new.path(), dir).and_then(|()| sync(dir)).map_err(io)
    })();
    if is_new && replaced.is_err() {
        // Without effect if something is in it.
        let _ = fs::remove_dir(dir);
    }
    replaced
}

/// An empty directory with which `dir` can be exchanged, but for the two files. It is an error if `dir`
/// must stay: it is a mount point or the current directory, or more belongs to it than can be moved.
#[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
fn successor(dir: &Path) -> io::Result<tempfile::TempDir> {
    use std::os::unix::fs::{MetadataExt, chown};
    let (old, parent) = (fs::metadata(dir)?, dir.parent().unwrap_or(dir));
    let must_stay = || io::Error::from(io::ErrorKind::Unsupported);
    if fs::metadata(parent)?.dev() != old.dev() || std::env::current_dir()? == dir {
        return Err(must_stay());
    }
    let successor = unfinished_in(parent)?;
    let new = successor.path();
    chown(new, Some(old.uid()), Some(old.gid()))?;
    fs::set_permissions(new, old.permissions())?;
    if fs::metadata(new)?.mode() != old.mode() {
        return Err(must_stay());
    }
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if !entry.file_type()?.is_file() {
            return Err(must_stay());
        }
        let name = entry.file_name();
        if name != CONFIG && name != WEIGHTS {
            fs::hard_link(entry.path(), new.join(name))?;
        }
    }
    Ok(successor)
}

/// Replaces the files one by one. While the weights are replaced there is no configuration, so that
/// nobody takes it for that of the other weights.
fn move_in(new: &Path, dir: &Path) -> io::Result<()> {
    let old = &new.join("old");
    fs::create_dir(old)?;
    let rename = |name, from: &Path, to: &Path| fs::rename(from.join(name), to.join(name));
    let rename_if_there = |name, from: &Path, to: &Path| match rename(name, from, to) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        renamed => renamed,
    };
    let _lock = lock(dir, File::try_lock);
    rename_if_there(CONFIG, dir, old)
        .and_then(|()| rename_if_there(WEIGHTS, dir, old))
        .and_then(|()| rename(WEIGHTS, new, dir))
        .and_then(|()| rename(CONFIG, new, dir))
        .inspect_err(|_| {
            // Never the configuration without its weights.
            let _ =
                rename_if_there(WEIGHTS, old, dir).and_then(|()| rename_if_there(CONFIG, old, dir));
        })
}

/// Keeps others out of [`move_in`], where the system can lock directories. It does not wait for ever,
/// because programs that hold such a lock for their own ends may call this one.
fn lock(dir: &Path, try_lock: fn(&File) -> Result<(), TryLockError>) -> io::Result<File> {
    let file = File::open(dir.join("."))?;
    for _ in 0..1000 {
        match try_lock(&file) {
            Err(TryLockError::WouldBlock) => thread::sleep(Duration::from_millis(1)),
            _ => break,
        }
    }
    Ok(file)
}
