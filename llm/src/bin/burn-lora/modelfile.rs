//! The file from which Ollama makes a model.

use std::{
    fs,
    path::{Path, PathBuf},
};

use burn_lora::gguf::paths;
use burn_lora_llm::{Context, Result, chat::Chat, files::write_atomically};

use crate::target;

/// What its name ends in.
const ENDING: &str = "Modelfile";

/// The first line of those that are written here.
const OURS: &str = "# Written by burn-lora.";

/// The path of the one beside a file: `mine.Modelfile` beside `mine.gguf`.
pub fn path_beside(file: &Path) -> PathBuf {
    file.with_extension(ENDING)
}

/// Fails if there is one of somebody else's, or one that somebody changed, unless it may be overwritten.
pub fn check(path: &Path, force: bool) -> Result<()> {
    if path.is_dir() {
        return Err(format!("{}: it is a directory", path.display()));
    }
    let is_line = |line: &str| LINES.iter().any(|it| line.starts_with(it));
    let is_own = |text: String| text.starts_with(OURS) && text.lines().all(is_line);
    let is_own = || fs::read_to_string(path).is_ok_and(is_own);
    target::check(path, force || is_own(), "somebody else wrote or changed it")
}

/// What the lines begin with that are written here.
const LINES: [&str; 4] = [OURS, "FROM ", "ADAPTER ", "PARAMETER stop "];

/// Writes one for the model at `base`, with adapters, which are beside it, or without.
///
/// # Errors
///
/// If it cannot be written, or a path cannot be in it.
pub fn write(path: &Path, base: &Path, adapter: Option<&Path>, chat: &Chat) -> Result<()> {
    let text = text(path, base, adapter, &chat.stop_texts())?;
    write_atomically(path, text.as_bytes()).context(path.display())
}

fn text(path: &Path, base: &Path, adapter: Option<&Path>, stops: &[String]) -> Result<String> {
    let whole = |file: &Path| file.canonicalize().context(file.display());
    // Those beside it stay right when the directory is moved.
    let dir = path.parent().filter(|it| !it.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let dir = whole(dir)?;
    let named = |file: &Path| {
        let file = whole(file)?;
        let beside = file.strip_prefix(&dir).ok();
        let name = beside.map_or(file.clone(), |it| Path::new(".").join(it)).display().to_string();
        match name.contains('\n') {
            true => Err(format!("{}: a Modelfile cannot have such a name", file.display())),
            false => Ok(name),
        }
    };
    let own = path.file_name().unwrap_or_default().to_string_lossy();
    let mut text = format!("{OURS} `ollama create NAME -f {own}` makes a model of it.\n");
    // Of several files that a model is split into, the first.
    let first = if base.is_file() { paths(base).swap_remove(0) } else { base.to_owned() };
    text += &format!("FROM {}\n", named(&first)?);
    if let Some(adapter) = adapter {
        text += &format!("ADAPTER {}\n", named(adapter)?);
    }
    for stop in stops.iter().filter(|it| !it.contains(['"', '\n'])) {
        text += &format!("PARAMETER stop \"{stop}\"\n");
    }
    Ok(text)
}
