//! The tokens that begin and end texts.

use serde_json::{Map, Value};
use tokenizers::{Tokenizer, processors::template::TemplateProcessing};

use crate::error::{Context, Result};

/// Tokens after which an answer ends, in whatever model they are: llama.cpp knows them by their names, too.
const ENDS: [&str; 17] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "</s>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
    // Of texts that consist of several files.
    "<|fim_pad|>",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<|file_sep|>",
];

/// Whether a token of this name ends an answer in a conversation, and not a text.
pub(super) fn is_turn_end(token: &str) -> bool {
    ["<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<end_of_utterance>"].contains(&token)
}

/// Whether a token of this name ends answers.
pub(super) fn names_end(token: &str) -> bool {
    ENDS.contains(&token)
}

/// The token with which texts begin (`bos`) or end (`eos`), or one for another purpose (`eot`, `eom`, `unknown`).
pub fn special(fields: &Map<String, Value>, name: &str) -> Option<String> {
    let id = match fields.get(&format!("tokenizer.ggml.{name}_token_id")) {
        Some(id) => id.as_u64()?,
        // Those of the first models with SentencePiece's tokens.
        None if fields.get("tokenizer.ggml.model")? == "llama" => match name {
            "unknown" => 0,
            "bos" => 1,
            "eos" => 2,
            _ => return None,
        },
        None => return None,
    };
    let tokens = fields.get("tokenizer.ggml.tokens")?.as_array()?;
    Some(tokens.get(usize::try_from(id).ok()?)?.as_str()?.to_owned())
}

/// The tokens after which an answer ends: those that the fields name, and those whose names say so.
pub fn ends(fields: &Map<String, Value>, tokenizer: &Tokenizer) -> Vec<u32> {
    let special_ones = tokenizer.get_added_tokens_decoder();
    let is_special = |id: &u32| special_ones.get(id).is_some_and(|token| token.special);
    let named = ENDS.iter().filter_map(|name| tokenizer.token_to_id(name)).filter(is_special);
    let ends = ["eos", "eot", "eom"].into_iter().filter_map(|name| special(fields, name));
    ends.filter_map(|token| tokenizer.token_to_id(&token)).chain(named).collect()
}

/// Has the tokenizer add the tokens that begin and end texts, as the fields say, or these if they do not.
///
/// # Errors
///
/// If such a token is not in the vocabulary.
pub(super) fn add(
    tokenizer: &mut Tokenizer,
    fields: &Map<String, Value>,
    begins: bool,
    ends: bool,
) -> Result<()> {
    let mut template = vec!["$A".to_owned()];
    let mut tokens = Vec::new();
    for (name, default) in [("bos", begins), ("eos", ends)] {
        let token = special(fields, name);
        let adds = fields.get(&format!("tokenizer.ggml.add_{name}_token")).and_then(Value::as_bool);
        if !adds.unwrap_or(default && token.is_some()) {
            continue;
        }
        let token = token.ok_or_else(|| format!("`tokenizer.ggml.{name}_token_id` is missing"))?;
        let id = tokenizer.token_to_id(&token);
        let id = id.ok_or_else(|| format!("`{token}` is not in the vocabulary"))?;
        match name {
            "bos" => template.insert(0, token.clone()),
            _ => template.push(token.clone()),
        }
        if tokens.iter().all(|(other, _)| *other != token) {
            tokens.push((token, id));
        }
    }
    if template.len() > 1 {
        let template = TemplateProcessing::builder()
            .try_single(template)
            .map_err(|problem| format!("the first and the last token: {problem}"))?
            .special_tokens(tokens)
            .build();
        tokenizer.with_post_processor(Some(template.context("the first and the last token")?));
    }
    Ok(())
}
