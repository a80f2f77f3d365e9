//! The fields of a GGUF file that describe a tokenizer.

use std::collections::HashMap;

use burn_lora::gguf::Field;
use serde_json::{Map, Value, json};
use tokenizers::Tokenizer;

use super::{division::Division, vocabulary::no_token};
use crate::error::{Context, Result};

/// Kinds of tokens, by their numbers in files.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// The tokens that begin and end texts, and the template, of a model.
pub(crate) struct Told<'a> {
    /// The token that begins texts, if there is one.
    pub begin: Option<u32>,
    /// The tokens after which an answer ends. The one that ends texts comes first.
    pub ends: &'a [u32],
    /// The chat template.
    pub template: Option<&'a str>,
}

/// The fields that describe a tokenizer of byte pairs, or of pieces of SentencePiece that are made of pairs, for a model
/// that knows so many tokens.
///
/// # Errors
///
/// If it is a tokenizer of another kind, or divides texts in a way for which llama.cpp has no name.
pub(crate) fn fields(
    tokenizer: &Tokenizer,
    known: usize,
    told: &Told<'_>,
) -> Result<Vec<(String, Field)>> {
    let text = tokenizer.to_string(false).context("the tokenizer")?;
    let json: Value = serde_json::from_str(&text).context("the tokenizer")?;
    let model = &json["model"];
    if model["type"] != "BPE" {
        return Err(format!(
            "the tokenizer is of the kind {}, and GGUF files can be written with BPE only; write the model as a \
             directory instead",
            model["type"]
        ));
    }
    let mut vocabulary = Tokens::read(&json, known)?;
    let mut fields: Vec<(&str, Field)> = Vec::new();
    let merges = merges(model)?;
    if model["byte_fallback"] == true {
        vocabulary.mark_bytes();
        fields.push(("model", "llama".into()));
        fields.push(("add_space_prefix", adds_space(&json).into()));
        fields.push(("scores", vocabulary.scores(&merges).into()));
    } else {
        fields.push(("model", "gpt2".into()));
        fields.push(("pre", division(&json)?.into()));
        let merges = merges.iter().map(|(left, right)| format!("{left} {right}"));
        fields.push(("merges", merges.collect::<Vec<_>>().into()));
    }
    if let Some(unknown) = model["unk_token"].as_str().and_then(|it| tokenizer.token_to_id(it)) {
        fields.push(("unknown_token_id", unknown.into()));
        vocabulary.kinds[unknown as usize] = UNKNOWN;
    }
    fields.push(("tokens", vocabulary.tokens.into()));
    fields.push(("token_type", vocabulary.kinds.into()));
    let empty = tokenizer.encode("", true).context("the tokenizer")?;
    let added = empty.get_ids();
    let end = told.ends.first().copied();
    if let Some(begin) = told.begin {
        fields.push(("bos_token_id", begin.into()));
    }
    if let Some(end) = end {
        fields.push(("eos_token_id", end.into()));
    }
    // The one that ends an answer, where it is another than that of texts.
    if let [_, other, ..] = told.ends {
        fields.push(("eot_token_id", (*other).into()));
    }
    let begins = told.begin.is_some() && added.first() == told.begin.as_ref();
    let ends = end.is_some() && added.last() == end.as_ref() && (!begins || added.len() > 1);
    fields.push(("add_bos_token", begins.into()));
    fields.push(("add_eos_token", ends.into()));
    let mut fields: Vec<_> =
        fields.into_iter().map(|(name, field)| (format!("tokenizer.ggml.{name}"), field)).collect();
    if let Some(template) = told.template {
        fields.push(("tokenizer.chat_template".to_owned(), template.into()));
    }
    Ok(fields)
}

/// The tokens by their numbers.
struct Tokens {
    tokens: Vec<String>,
    kinds: Vec<i32>,
}

impl Tokens {
    fn read(json: &Value, known: usize) -> Result<Self> {
        // Rows of the table without a token have a name all the same.
        let mut tokens: Vec<_> = (0..known).map(no_token).collect();
        let mut kinds = vec![UNUSED; known];
        let mut set = |token: &str, id: &Value, kind| {
            let id = id.as_u64().unwrap_or(u64::MAX);
            match tokens.get_mut(id as usize) {
                Some(name) => {
                    token.clone_into(name);
                    kinds[id as usize] = kind;
                    Ok(())
                }
                None => Err(format!(
                    "the token `{token}` has number {id}, and the model knows those below {known}"
                )),
            }
        };
        let vocabulary = json["model"]["vocab"].as_object().ok_or("the tokenizer has no tokens")?;
        for (token, id) in vocabulary {
            set(token, id, NORMAL)?;
        }
        for added in json["added_tokens"].as_array().into_iter().flatten() {
            let kind = if added["special"] == true { CONTROL } else { USER_DEFINED };
            set(added["content"].as_str().unwrap_or_default(), &added["id"], kind)?;
        }
        Ok(Self { tokens, kinds })
    }

    /// Notes which tokens are bytes of characters that no piece has.
    fn mark_bytes(&mut self) {
        for (token, kind) in self.tokens.iter().zip(&mut self.kinds) {
            let byte = token.strip_prefix("<0x").and_then(|it| it.strip_suffix('>'));
            if byte.is_some_and(|it| u8::from_str_radix(it, 16).is_ok()) {
                *kind = BYTE;
            }
        }
    }

    /// The earlier pairs are made into a piece, the higher its score.
    fn scores(&self, merges: &[(&str, &str)]) -> Vec<f32> {
        let mut ranks = HashMap::new();
        for (rank, (left, right)) in merges.iter().enumerate() {
            ranks.entry(format!("{left}{right}")).or_insert(rank);
        }
        let score = |token| ranks.get(token).copied().unwrap_or(merges.len());
        self.tokens.iter().map(|token| -(score(token) as f32)).collect()
    }
}

/// The pairs of tokens that are made into one, the first ones first.
fn merges(model: &Value) -> Result<Vec<(&str, &str)>> {
    let pairs = model["merges"].as_array().into_iter().flatten().map(|merge| match merge {
        // The older spelling.
        Value::String(merge) => merge.split_once(' '),
        merge => Some((merge[0].as_str()?, merge[1].as_str()?)),
    });
    pairs.collect::<Option<_>>().ok_or_else(|| "a merge of the tokenizer is no pair".to_owned())
}

/// Whether a space is put before each text.
fn adds_space(json: &Value) -> bool {
    let parts = |name: &str| {
        let part = &json[name];
        let several = part["normalizers"].as_array().or(part["pretokenizers"].as_array());
        several.cloned().unwrap_or_else(|| vec![part.clone()])
    };
    let prepends = parts("normalizer").iter().any(|it| it["type"] == "Prepend");
    let mut splits = parts("pre_tokenizer").into_iter();
    let scheme = splits.find(|it| it["type"] == "Metaspace").map(|it| it["prepend_scheme"].clone());
    prepends || scheme.is_some_and(|it| it != "never")
}

/// The name of the way in which texts are divided.
fn division(json: &Value) -> Result<&'static str> {
    let ignores_merges = json["model"]["ignore_merges"] == true;
    let found = steps(json["pre_tokenizer"].clone());
    let known = Division::NAMES.into_iter().find(|name| {
        let fields = Map::from_iter([("tokenizer.ggml.pre".to_owned(), json!(name))]);
        let division = Division::of(&fields).ok();
        let division = division.filter(|it| it.ignores_merges == ignores_merges);
        let own = division.and_then(|it| serde_json::to_value(it.steps().ok()?).ok());
        own.is_some_and(|own| steps(own) == found)
    });
    known.ok_or_else(|| {
        "the tokenizer divides texts in a way for which llama.cpp has no name; write the model as a directory instead"
            .to_owned()
    })
}

/// The steps of a division, without what does not matter for tokens.
fn steps(json: Value) -> Vec<Value> {
    let mut steps = match json {
        Value::Object(mut fields) if fields["type"] == "Sequence" => {
            match fields.remove("pretokenizers") {
                Some(Value::Array(steps)) => steps,
                _ => Vec::new(),
            }
        }
        one => vec![one],
    };
    for step in &mut steps {
        if let Some(fields) = step.as_object_mut() {
            fields.remove("trim_offsets");
        }
    }
    steps
}
