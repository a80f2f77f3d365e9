//! The fields of a GGUF file that describe a tokenizer.

use std::collections::{HashMap, HashSet};

use burn_lora::gguf::Field;
use serde_json::{Map, Value, json};
use tokenizers::Tokenizer;

use super::{
    division::Division,
    ends::is_turn_end,
    pieces,
    vocabulary::{Vocabulary, no_token},
};
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
        check_steps(&json, "normalizer", &["Prepend", "Replace"])?;
        check_steps(&json, "pre_tokenizer", &["Metaspace", "Split"])?;
        vocabulary.mark_bytes();
        vocabulary.check_merges(&merges)?;
        fields.push(("model", "llama".into()));
        fields.push(("add_space_prefix", adds_space(&json).into()));
        fields.push(("scores", vocabulary.scores(&merges).into()));
    } else {
        // llama.cpp has no normal forms, which matter for few texts.
        check_steps(&json, "normalizer", &["NFC"])?;
        for affix in ["continuing_subword_prefix", "end_of_word_suffix"] {
            if model[affix].as_str().is_some_and(|it| !it.is_empty()) {
                return Err(format!(
                    "the tokenizer has a `{affix}`, which llama.cpp does not have"
                ));
            }
        }
        fields.push(("model", "gpt2".into()));
        fields.push(("pre", division(&json)?.into()));
        let merges = merges.iter().map(|(left, right)| format!("{left} {right}"));
        fields.push(("merges", merges.collect::<Vec<_>>().into()));
    }
    if let Some(unknown) = model["unk_token"].as_str().and_then(|it| tokenizer.token_to_id(it))
        && let Some(kind) = vocabulary.kinds.get_mut(unknown as usize)
    {
        fields.push(("unknown_token_id", unknown.into()));
        *kind = UNKNOWN;
    }
    fields.push(("tokens", vocabulary.tokens.into()));
    fields.push(("token_type", vocabulary.kinds.into()));
    let empty = tokenizer.encode("", true).context("the tokenizer")?;
    let added = empty.get_ids();
    let is_known = |id: &u32| (*id as usize) < known;
    let Some(end) = told.ends.iter().copied().find(is_known) else {
        // llama.cpp would take a token for it that is none.
        return Err(
            "no token ends texts; name it as `eos_token` in tokenizer_config.json".to_owned()
        );
    };
    fields.push(("eos_token_id", end.into()));
    let first = added.first().copied().filter(|it| !told.ends.contains(it));
    let begin = told.begin.or(first).filter(is_known);
    if let Some(begin) = begin {
        fields.push(("bos_token_id", begin.into()));
    }
    // The one that ends an answer, where it is another than that of texts.
    let others = told.ends.iter().filter(|id| **id != end && is_known(id));
    let ends_answers = |id: &&u32| tokenizer.id_to_token(**id).is_some_and(|it| is_turn_end(&it));
    if let Some(other) = others.copied().collect::<Vec<_>>().iter().find(ends_answers) {
        fields.push(("eot_token_id", (*other).into()));
    }
    let begins = begin.is_some() && added.first() == begin.as_ref();
    let ends = added.last() == Some(&end) && (!begins || added.len() > 1);
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
                // Tokens that were added without training.
                None if kind != NORMAL => Ok(()),
                None => Err(format!(
                    "the token `{token}` has number {id}, and the model knows those below {known}: its tokenizer is of \
                     another model"
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

    /// Fails unless the pairs are those that SentencePiece finds in the pieces.
    fn check_merges(&self, merges: &[(&str, &str)]) -> Result<()> {
        let fields = Map::from_iter([
            ("tokenizer.ggml.tokens".to_owned(), json!(self.tokens)),
            ("tokenizer.ggml.token_type".to_owned(), json!(self.kinds)),
            ("tokenizer.ggml.scores".to_owned(), json!(self.scores(merges))),
        ]);
        let found = pieces::merges(&Vocabulary::read(&fields)?)?;
        let found: HashSet<_> =
            found.iter().map(|(one, two)| (one.as_str(), two.as_str())).collect();
        match merges.iter().copied().collect::<HashSet<_>>() == found {
            true => Ok(()),
            false => Err("the tokenizer's merges are not those of SentencePiece, which llama.cpp finds in the pieces; \
                          write the model as a directory instead"
                .to_owned()),
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

/// The steps of a part of a tokenizer.
fn parts<'j>(json: &'j Value, name: &str) -> &'j [Value] {
    let part = &json[name];
    let several = part["normalizers"].as_array().or(part["pretokenizers"].as_array());
    match several {
        Some(several) => several,
        None if part.is_null() => &[],
        None => std::slice::from_ref(part),
    }
}

/// Fails if a part of a tokenizer has other steps than these.
fn check_steps(json: &Value, name: &str, known: &[&str]) -> Result<()> {
    let is_other = |it: &&Value| it["type"].as_str().is_none_or(|it| !known.contains(&it));
    match parts(json, name).iter().find(is_other) {
        None => Ok(()),
        Some(step) => Err(format!(
            "the tokenizer's `{name}` has the step {}, which llama.cpp does not have; write the model as a directory \
             instead",
            step["type"]
        )),
    }
}

/// Whether a space is put before each text.
fn adds_space(json: &Value) -> bool {
    let prepends = parts(json, "normalizer").iter().any(|it| it["type"] == "Prepend");
    let scheme = parts(json, "pre_tokenizer").iter().find(|it| it["type"] == "Metaspace");
    prepends || scheme.is_some_and(|it| it["prepend_scheme"] != "never")
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
