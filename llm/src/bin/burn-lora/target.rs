//! What may be overwritten.

use std::path::Path;

use burn_lora::gguf::{Gguf, WRITER};
use burn_lora_llm::Result;

/// Whether a GGUF file is meant.
pub fn is_gguf_name(path: &Path) -> bool {
    path.extension().is_some_and(|it| it.eq_ignore_ascii_case("gguf"))
}

/// Fails if something is at `path` that is no GGUF file of burn-lora's, unless it may be overwritten.
pub fn check_file(path: &Path, force: bool) -> Result<()> {
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
