//! The tokenizer in a GGUF file.

use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::{
    AddedToken, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer,
    decoders::byte_level::ByteLevel as ByteLevelDecoder,
    models::bpe::{BPE, Vocab},
    pre_tokenizers::{
        byte_level::ByteLevel,
        digits::Digits,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
    processors::template::TemplateProcessing,
};

use crate::{
    error::{Context, Result},
    tokenizer,
};

/// How Llama 3 divides texts before it looks for tokens: words with the character before them, numbers of
/// up to three digits, punctuation, and white space.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The same for Qwen, with single digits.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The kinds of tokens that texts are not divided into: those that control the model, and others.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// The tokenizer that the fields describe. If it is made of other than byte pairs, `tokenizer.json` next to
/// the file at `path` is read.
///
/// # Errors
///
/// If a field is missing or malformed, or the way in which texts are divided is unknown.
pub fn tokenizer(fields: &Map<String, Value>, path: &Path) -> Result<Tokenizer> {
    let kind = fields.get("tokenizer.ggml.model").and_then(Value::as_str).unwrap_or("missing");
    if kind != "gpt2" {
        let beside = path.with_file_name("tokenizer.json");
        return tokenizer::read(&beside).map_err(|problem| {
            format!(
                "{}: a tokenizer of the kind \"{kind}\" is not supported, and tokenizer.json in its place cannot be \
                 read: {problem}",
                path.display(),
            )
        });
    }
    byte_pairs(fields).context(path.display())
}

fn byte_pairs(fields: &Map<String, Value>) -> Result<Tokenizer> {
    let list = |name: &str| {
        let field = fields.get(&format!("tokenizer.ggml.{name}")).and_then(Value::as_array);
        field.ok_or_else(|| format!("`tokenizer.ggml.{name}` is missing"))
    };
    let strings = |name: &str| {
        let strings = list(name)?.iter().map(Value::as_str).collect::<Option<Vec<_>>>();
        strings.ok_or_else(|| format!("`tokenizer.ggml.{name}` must hold texts"))
    };
    let tokens = strings("tokens")?;
    let vocabulary = tokens.iter().map(|it| it.to_string()).zip(0..).collect::<Vocab>();
    let merges = strings("merges")?.into_iter().map(|merge| {
        // The first character of a token may be a space, and nothing else of it.
        let at = merge.char_indices().skip(1).find(|(_, it)| *it == ' ').map(|(at, _)| at);
        let at = at.ok_or_else(|| format!("`{merge}` is not a pair of tokens"))?;
        Ok((merge[..at].to_owned(), merge[at + 1..].to_owned()))
    });
    let merges = merges.collect::<Result<Vec<_>>>()?;
    let of_llama3 = is_llama3(fields);
    let model =
        BPE::builder().vocab_and_merges(vocabulary, merges).ignore_merges(of_llama3).build();
    let mut tokenizer = Tokenizer::new(model.context("the merges")?);
    tokenizer.with_pre_tokenizer(Some(division(fields)?));
    tokenizer.with_decoder(Some(ByteLevelDecoder::default()));

    let kinds = list("token_type")?;
    for (token, kind) in tokens.iter().zip(kinds) {
        let kind = kind.as_i64();
        if kind == Some(CONTROL) {
            tokenizer.add_special_tokens(&[AddedToken::from(*token, true)]);
        } else if kind == Some(USER_DEFINED) {
            tokenizer.add_tokens(&[AddedToken::from(*token, false).normalized(false)]);
        }
    }
    let begin = special(fields, "bos");
    let begins = fields.get("tokenizer.ggml.add_bos_token").and_then(Value::as_bool);
    // llama.cpp does it for Llama 3 if the file does not say.
    if begins.unwrap_or(of_llama3 && begin.is_some()) {
        let begin = begin.ok_or("`tokenizer.ggml.bos_token_id` is missing")?;
        let id = tokenizer.token_to_id(&begin).ok_or("the first token is not in the vocabulary")?;
        let template = TemplateProcessing::builder()
            .try_single(format!("{begin} $A"))?
            .special_tokens(vec![(begin, id)])
            .build();
        tokenizer.with_post_processor(Some(template.context("the first token")?));
    }
    Ok(tokenizer)
}

/// The name of the way in which texts are divided.
fn pre(fields: &Map<String, Value>) -> &str {
    fields.get("tokenizer.ggml.pre").and_then(Value::as_str).unwrap_or("default")
}

/// Whether words that are tokens need no merges, as in Llama 3.
fn is_llama3(fields: &Map<String, Value>) -> bool {
    matches!(pre(fields), "llama-bpe" | "llama3" | "llama-v3")
}

/// How texts are divided before tokens are looked for.
fn division(fields: &Map<String, Value>) -> Result<PreTokenizerWrapper> {
    let by = |pattern: &str| -> Result<Vec<PreTokenizerWrapper>> {
        let pattern = SplitPattern::Regex(pattern.to_owned());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
        let split = split.context("the division of texts")?;
        Ok(vec![split.into(), ByteLevel::new(false, true, false).into()])
    };
    let steps: Vec<PreTokenizerWrapper> = match pre(fields) {
        _ if is_llama3(fields) => by(LLAMA3)?,
        "default" | "gpt-2" => vec![ByteLevel::new(false, true, true).into()],
        "smollm" => vec![Digits::new(true).into(), ByteLevel::new(false, true, true).into()],
        "qwen2" => by(QWEN2)?,
        kind => return Err(format!("`tokenizer.ggml.pre` \"{kind}\" is not supported")),
    };
    Ok(Sequence::new(steps).into())
}

/// The token with which texts begin (`bos`) or end (`eos`).
pub fn special(fields: &Map<String, Value>, name: &str) -> Option<String> {
    let id = fields.get(&format!("tokenizer.ggml.{name}_token_id"))?.as_u64()?;
    let tokens = fields.get("tokenizer.ggml.tokens")?.as_array()?;
    Some(tokens.get(id as usize)?.as_str()?.to_owned())
}
