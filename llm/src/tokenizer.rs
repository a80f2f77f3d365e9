//! Reads `tokenizer.json`.

use std::path::Path;

use tokenizers::Tokenizer;

use crate::{
    error::{Context, Result},
    files::{check_start, is_there, read_text},
};

/// Reads a tokenizer of whole texts.
pub(crate) fn read(path: &Path) -> Result<Tokenizer> {
    let dir = path.parent().unwrap_or(Path::new("."));
    if !is_there(path)
        && let Some(other) = OTHERS.into_iter().find(|it| dir.join(it).exists())
    {
        return Err(format!(
            "{}: only {other} is there, which is not read; load it with `AutoTokenizer` of `transformers` in \
             Python, and save it with `save_pretrained`",
            path.display(),
        ));
    }
    let text = read_text(path)?;
    check_start(path, text.as_bytes())?;
    whole(text.parse().context(path.display())?)
}

/// Other files that say how texts become tokens.
const OTHERS: [&str; 2] = ["tokenizer.model", "vocab.json"];

/// The tokenizer without the truncation and the padding of the last program that saved it. Python's `transformers`
/// ignores both as well.
pub(crate) fn whole(mut tokenizer: Tokenizer) -> Result<Tokenizer> {
    tokenizer.with_truncation(None).context("the tokenizer")?;
    tokenizer.with_padding(None);
    Ok(tokenizer)
}
