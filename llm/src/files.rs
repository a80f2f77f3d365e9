//! Files that are written as a whole or not at all, and files of others that are read.

use std::{
    fs::{self, File},
    io::{self, ErrorKind, Read, Write},
    path::{Component, Path},
};

use serde_json::Value;

use crate::error::{Context, Result};

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
    let write = || {
        let mut file = File::create(&unfinished)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&unfinished, path)
    };
    write().inspect_err(|_| {
        // What is wrong is told by the error, and not that it left something.
        let _ = fs::remove_file(&unfinished);
    })
}

/// The text of a file, without the byte-order mark that some editors put in front.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let bytes = fs::read(path).context(path.display())?;
    check_is_fetched(path, &bytes)?;
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") {
        return Err(format!("{}: it is UTF-16; save it as UTF-8", path.display()));
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        format!("{}: it is not UTF-8, from byte {at} on", path.display())
    })?;
    Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
}

/// The file as JSON.
pub(crate) fn read_json(path: &Path) -> Result<Value> {
    let text = read_text(path)?;
    check_start(path, text.as_bytes())?;
    serde_json::from_str(&text).context(path.display())
}

/// The file as JSON, or `null` if it does not exist.
pub(crate) fn read_json_if_exists(path: &Path) -> Result<Value> {
    if is_there(path) { read_json(path) } else { Ok(Value::Null) }
}

/// Whether there is a file of this name. A link whose target is missing is one, which cannot be read.
pub(crate) fn is_there(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// Fails if the file of weights, or of JSON, starts as another kind of file does.
pub(crate) fn check_start(path: &Path, start: &[u8]) -> Result<()> {
    check_is_fetched(path, start)?;
    let found = match start {
        // The header of safetensors, after its length, which may be any number.
        _ if start.get(8) == Some(&b'{') => return Ok(()),
        [b'<', ..] => "this is a web page; download the file itself",
        [b'P', b'K', 3, 4, ..] | [0x80, 2..=5, ..] => {
            "this is a file of PyTorch, which is not read; load it in Python, and save it as safetensors"
        }
        _ if is_gguf_start(start) => "this is a GGUF file; give its path as that of the model",
        _ => return Ok(()),
    };
    Err(format!("{}: {found}", path.display()))
}

/// Fails if the file starts as the pointers do that git-lfs leaves in place of large files.
fn check_is_fetched(path: &Path, start: &[u8]) -> Result<()> {
    if !start.starts_with(b"version https://git-lfs.github.com/spec/") {
        return Ok(());
    }
    let problem = "this is a git-lfs pointer; fetch the file with `git lfs pull`";
    Err(format!("{}: {problem}", path.display()))
}

/// Whether the path is that of a GGUF file, by its name or its first bytes.
pub fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|it| it.eq_ignore_ascii_case("gguf"))
        || start_of(path).is_ok_and(|start| is_gguf_start(&start))
}

/// Whether a file starts as GGUF files do.
pub(crate) fn is_gguf_start(start: &[u8]) -> bool {
    start.starts_with(b"GGUF")
}

/// The first bytes of a file, as many as tell what it is.
pub(crate) fn start_of(path: &Path) -> io::Result<Vec<u8>> {
    let mut start = Vec::new();
    File::open(path)?.take(64).read_to_end(&mut start)?;
    Ok(start)
}

/// Fails if there is no model at the path. Such a path may be meant as the name of one on the hub.
pub(crate) fn check_model(path: &Path) -> Result<()> {
    match fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound && is_hub_name(path) => Err(format!(
            "{0}: there is no such directory or file; if it is a model of huggingface.co, get it with `hf download \
             {0} --local-dir DIR`, and give DIR",
            path.display(),
        )),
        Err(error) => Err(format!("{}: {error}", path.display())),
        Ok(found) if found.is_dir() && !is_there(&path.join("config.json")) => check_other(path),
        Ok(found) if found.is_file() && !is_gguf(path) => {
            check_start(path, &start_of(path).context(path.display())?)?;
            Err(format!(
                "{}: a directory or a GGUF file is needed, and this is another file",
                path.display()
            ))
        }
        Ok(_) => Ok(()),
    }
}

/// Fails if the directory holds a model in one file, or adapters.
pub(crate) fn check_other(dir: &Path) -> Result<()> {
    // Ollama names its files by what is in them.
    let is_unnamed = |name: &String| {
        let path = dir.join(name);
        path.is_file() && is_gguf(&path)
    };
    let unnamed = || names_ending(dir, &[""]).into_iter().find(is_unnamed);
    let problem = match names_ending(dir, &[".gguf"]).into_iter().next().or_else(unnamed) {
        Some(first) => format!("give the path of {first}, which is there"),
        None if is_there(&dir.join("adapter_config.json")) => {
            "these are adapters; give the directory of their base".to_owned()
        }
        None => return Ok(()),
    };
    Err(format!("{}: {problem}", dir.display()))
}

/// Whether the path has two parts, as owner and name have on the hub, and not the ending of a file.
fn is_hub_name(path: &Path) -> bool {
    let parts: Vec<_> = path.components().collect();
    matches!(parts[..], [Component::Normal(_), Component::Normal(_)])
        && path.extension().is_none_or(|it| !it.eq_ignore_ascii_case("gguf"))
}

/// The names of the files in a directory that end in one of these, in their order.
pub(crate) fn names_ending(dir: &Path, ends: &[&str]) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut names: Vec<_> =
        names.filter(|name| ends.iter().any(|end| name.ends_with(end))).collect();
    names.sort();
    names
}
