//! What may be overwritten.

use std::{
    fs,
    path::{Path, PathBuf},
};

use burn_lora::gguf::{Gguf, WRITER, paths};
use burn_lora_llm::{Context, Result};

/// Whether a GGUF file is meant.
pub fn is_gguf_name(path: &Path) -> bool {
    path.extension().is_some_and(|it| it.eq_ignore_ascii_case("gguf"))
}

/// Fails if something is at `path` that is no GGUF file of burn-lora's, unless it may be overwritten; or if it is one of
/// these, from which the file is made.
pub fn check_file(path: &Path, force: bool, sources: &[&Path]) -> Result<()> {
    let parts = sources.iter().flat_map(|it| paths(it));
    let is_same = |it: PathBuf| {
        path.canonicalize().is_ok_and(|path| it.canonicalize().is_ok_and(|it| it == path))
    };
    if parts.into_iter().any(is_same) {
        return Err(format!("{}: it is what is read, which stays as it is", path.display()));
    }
    let is_own = || Gguf::open(path).is_ok_and(|file| file.fields.contains_key(WRITER));
    if path.is_dir() {
        return Err(format!("{}: it is a directory", path.display()));
    }
    check(path, force || is_own(), "no file of burn-lora's")
}

/// Fails if there are adapters in the directory, unless they may be overwritten.
pub fn check_adapters(dir: &Path, force: bool) -> Result<()> {
    if dir.is_file() {
        return Err(format!(
            "{}: it is a file; end its name in `.gguf`, or give a directory",
            dir.display()
        ));
    }
    check(&dir.join("adapter_config.json"), force, "a set of adapters already")
}

/// Fails if there is something, unless it may be overwritten.
pub fn check(path: &Path, may: bool, what: &str) -> Result<()> {
    match path.symlink_metadata() {
        Ok(_) if !may => {
            Err(format!("{}: it is there, and {what}; `--force` overwrites it", path.display()))
        }
        _ => Ok(()),
    }
}

/// Writes the file at `path`, in directories that are made for it if they are missing. If writing fails, these are not left.
pub fn write<T>(path: &Path, write: impl FnOnce() -> Result<T>) -> Result<T> {
    let is_missing = |dir: &&Path| !dir.as_os_str().is_empty() && !dir.exists();
    let missing: Vec<_> = path.ancestors().skip(1).take_while(is_missing).collect();
    if let Some(dir) = missing.first() {
        fs::create_dir_all(dir).context(dir.display())?;
    }
    // What is wrong is told by the error. A directory that is not empty stays.
    write().inspect_err(|_| missing.iter().for_each(|dir| drop(fs::remove_dir(dir))))
}
