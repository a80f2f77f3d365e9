//! Finding the files of a directory, and saying what is there instead.

use std::{
    fs::{self, File},
    io::{self, ErrorKind},
    path::Path,
};

use super::CONFIG;
use crate::error::LoraError;

/// What the pointer starts with that git-lfs leaves in place of a large file.
const LFS: &[u8] = b"version https://git-lfs.github.com/spec/";

/// Opens a regular file, and returns its length. Other files, such as devices, may have no end.
pub(super) fn open(path: &Path) -> Result<(File, u64), LoraError> {
    let metadata = fs::metadata(path).map_err(|source| explained(path, source))?;
    if !metadata.is_file() {
        return Err(invalid(path, "not a file".to_owned()));
    }
    let file = File::open(path).map_err(|source| explained(path, source))?;
    Ok((file, metadata.len()))
}

/// Fails if the text is not the file itself.
pub(super) fn check_start(start: &[u8], file: &str) -> Result<(), LoraError> {
    if !start.starts_with(LFS) {
        return Ok(());
    }
    let problem = "this is a git-lfs pointer; fetch the file with `git lfs pull`".to_owned();
    Err(LoraError::InvalidFile { file: file.to_owned(), problem })
}

/// The error of a file that is not there, if what is there instead tells why.
fn explained(path: &Path, source: io::Error) -> LoraError {
    let dir = path.parent().unwrap_or(Path::new("."));
    if source.kind() == ErrorKind::NotFound {
        if path.file_name().is_some_and(|name| name == CONFIG) {
            let names = adapters_in(dir);
            if !names.is_empty() {
                let names = names.join("`, `");
                let problem = format!("holds several adapters by name; load one of `{names}`");
                return invalid(dir, problem);
            }
        } else {
            for (pickle, program) in [("adapter_model.bin", "PEFT"), ("adapters.npz", "mlx-lm")] {
                if dir.join(pickle).exists() {
                    let problem = format!(
                        "only {pickle} is there, which is not read; load it in {program}, and save \
                         it as safetensors"
                    );
                    return invalid(path, problem);
                }
            }
        }
    }
    LoraError::Io { path: path.to_owned(), source }
}

/// The names of the directories in `dir` that hold adapters. Hidden ones are left by saves that were
/// killed.
fn adapters_in(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let adapters = entries.filter(|entry| entry.path().join(CONFIG).is_file());
    let names = adapters.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut names: Vec<_> = names.filter(|name| !name.starts_with('.')).collect();
    names.sort();
    names
}

fn invalid(path: &Path, problem: String) -> LoraError {
    LoraError::InvalidFile { file: path.display().to_string(), problem }
}
