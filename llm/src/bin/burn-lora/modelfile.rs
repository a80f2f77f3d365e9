//! The file from which Ollama makes a model.

use std::{
    fs,
    path::{Path, PathBuf},
};

use burn_lora_llm::{Context, Result, chat::Chat, files::write_atomically};

use crate::target;

const NAME: &str = "Modelfile";

/// The first line of those that are written here.
const OURS: &str = "# Written by burn-lora.";

/// The path of the one beside a file.
pub fn path_beside(file: &Path) -> PathBuf {
    file.with_file_name(NAME)
}

/// Fails if there is one of somebody else's, unless it may be overwritten.
pub fn check(path: &Path, force: bool) -> Result<()> {
    let is_own = || fs::read_to_string(path).is_ok_and(|text| text.starts_with(OURS));
    target::check(path, force || is_own(), "somebody else's")
}

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
    let dir = path.parent().map(whole).transpose().ok().flatten();
    let named = |file: &Path| {
        let file = whole(file)?;
        let beside = dir.as_ref().and_then(|dir| file.strip_prefix(dir).ok());
        let name = beside.map_or(file.clone(), |it| Path::new(".").join(it)).display().to_string();
        match name.contains('\n') {
            true => Err(format!("{}: a Modelfile cannot have such a name", file.display())),
            false => Ok(name),
        }
    };
    let mut text = format!("{OURS} `ollama create NAME -f {NAME}` makes a model of it.\n");
    text += &format!("FROM {}\n", named(base)?);
    if let Some(adapter) = adapter {
        text += &format!("ADAPTER {}\n", named(adapter)?);
    }
    for stop in stops.iter().filter(|it| !it.contains(['"', '\n'])) {
        text += &format!("PARAMETER stop \"{stop}\"\n");
    }
    Ok(text)
}
