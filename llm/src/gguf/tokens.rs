//! The tokenizer in a GGUF file.

mod division;
mod ends;
mod pieces;
mod vocabulary;
pub(crate) mod writing;

use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::{
    Tokenizer, decoders::byte_level::ByteLevel as ByteLevelDecoder, models::bpe::BPE,
};

use crate::{
    error::{Context, Result},
    tokenizer,
};
use division::Division;
use vocabulary::Vocabulary;

pub use ends::{ends, special};

/// The tokenizer that the fields describe. If it is made of other than byte pairs, or pieces of SentencePiece that are
/// made of pairs, `tokenizer.json` next to the file at `path` is read.
///
/// # Errors
///
/// If a field is missing or malformed, or the way in which texts are divided is unknown.
pub fn tokenizer(fields: &Map<String, Value>, path: &Path) -> Result<Tokenizer> {
    match fields.get("tokenizer.ggml.model").and_then(Value::as_str) {
        Some("gpt2") => byte_pairs(fields).context(path.display()),
        Some("llama") => pieces::tokenizer(fields).context(path.display()),
        kind => {
            let beside = path.with_file_name("tokenizer.json");
            tokenizer::read(&beside).map_err(|problem| {
                format!(
                    "{}: a tokenizer of the kind \"{}\" is not supported, and tokenizer.json in its place cannot be \
                     read: {problem}",
                    path.display(),
                    kind.unwrap_or("missing"),
                )
            })
        }
    }
}

fn byte_pairs(fields: &Map<String, Value>) -> Result<Tokenizer> {
    let vocabulary = Vocabulary::read(fields)?;
    let merges = vocabulary.texts("merges")?.into_iter().map(|merge| {
        // The first character of a token may be a space, and nothing else of it.
        let at = merge.char_indices().skip(1).find(|(_, it)| *it == ' ').map(|(at, _)| at);
        let at = at
            .ok_or_else(|| format!("`tokenizer.ggml.merges`: `{merge}` is not a pair of tokens"))?;
        Ok((merge[..at].to_owned(), merge[at + 1..].to_owned()))
    });
    let merges = merges.collect::<Result<Vec<_>>>()?;
    let division = Division::of(fields)?;
    let model = BPE::builder()
        .vocab_and_merges(vocabulary.ids(), merges)
        .ignore_merges(division.ignores_merges)
        .build();
    let mut tokenizer = Tokenizer::new(model.context("`tokenizer.ggml.merges`")?);
    tokenizer.with_pre_tokenizer(Some(division.steps()?));
    tokenizer.with_decoder(Some(ByteLevelDecoder::default()));
    tokenizer.add_tokens(&vocabulary.added_tokens());
    ends::add(&mut tokenizer, fields, division.begins, false)?;
    Ok(tokenizer)
}
