//! Finding the files of a directory, and saying what is there instead.

use std::{
    fs::{self, File},
    io::{self, ErrorKind},
    path::Path,
};

use super::CONFIG;
use crate::error::{LoraError, shown};

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

/// Fails if the file is of another kind, by its first bytes.
pub(super) fn check_start(start: &[u8], file: &str) -> Result<(), LoraError> {
    const SAFETENSORS: &str = "it must be saved as safetensors";
    let text = start.trim_ascii_start();
    let tag = text.get(..14).unwrap_or(text).to_ascii_lowercase();
    let problem = match start {
        _ if start.is_empty() => "the file is empty".to_owned(),
        _ if start.starts_with(LFS) => {
            "this is a git-lfs pointer; fetch the file with `git lfs pull`".to_owned()
        }
        // The protocols that Python still writes.
        [0x80, 2..=5, ..] => {
            format!("this is a pickle, as PyTorch's `.bin` and `.pt` files were; {SAFETENSORS}")
        }
        [b'P', b'K', 3, 4, ..] | [b'P', b'K', 5, 6, ..] => {
            format!("this is a zip archive, as `torch.save` and numpy write; {SAFETENSORS}")
        }
        [0x1f, 0x8b, ..] => "this is compressed by gzip; unpack it first".to_owned(),
        [0x93, b'N', b'U', b'M', b'P', b'Y', ..] => {
            format!("this is an array of numpy; {SAFETENSORS}")
        }
        [0x89, b'H', b'D', b'F', ..] => format!("this is an HDF5 file; {SAFETENSORS}"),
        [b'G', b'G', b'U', b'F', ..] => {
            "this is a GGUF file, which holds a model or an adapter for llama.cpp; take the adapter's own \
             safetensors"
                .to_owned()
        }
        _ if tag.starts_with(b"<!doctype html") || tag.starts_with(b"<html") => {
            "this is a page of the web (HTML): the download gave an error or asked for a login; \
             fetch the file itself"
                .to_owned()
        }
        _ => return Ok(()),
    };
    Err(LoraError::InvalidFile { file: file.to_owned(), problem })
}

/// Fails if the file cannot be one of tensors, by its first bytes.
pub(super) fn check_tensors(start: &[u8], file: &str) -> Result<(), LoraError> {
    // The length of the header can have any of the bytes that tell other kinds, and then the header begins.
    if start.get(8) == Some(&b'{') && start[4..8] == [0; 4] {
        return Ok(());
    }
    check_start(start, file)?;
    let is_text = |it: &u8| it.is_ascii_graphic() || it.is_ascii_whitespace() || *it >= 0x80;
    let problem = match start {
        _ if start.len() < 8 => {
            format!("the file has {} bytes, and a safetensors file at least 8", start.len())
        }
        // The length of a header has zeros in its upper bytes.
        _ if start[..8].iter().all(is_text) && start.iter().all(is_text) => {
            "this is text, and not a safetensors file".to_owned()
        }
        _ => return Ok(()),
    };
    Err(LoraError::InvalidFile { file: file.to_owned(), problem })
}

/// The error of a file that is not there, if what is there instead tells why.
fn explained(path: &Path, source: io::Error) -> LoraError {
    let dir = path.parent().unwrap_or(Path::new("."));
    if source.kind() == ErrorKind::NotADirectory {
        let is_part = dir.file_name().is_some_and(|name| super::FILES.iter().any(|it| name == *it));
        let problem = match is_part {
            true => "this is a file of a directory of adapters; give the directory",
            false => {
                "not a directory; if it is a file of adapters of an image model, read it by \
                 `LoraAdapters::load_image`"
            }
        };
        return invalid(dir, problem.to_owned());
    }
    if source.kind() == ErrorKind::NotFound {
        if path.file_name().is_some_and(|name| name == CONFIG) {
            let names = adapters_in(dir);
            if !names.is_empty() {
                let names: Vec<_> = names.iter().map(|name| shown(name)).collect();
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
