//! The tokens in the fields of a GGUF file.

use std::collections::HashMap;

use serde_json::{Map, Value};
use tokenizers::{AddedToken, models::bpe::Vocab};

use super::ends::names_end;
use crate::error::Result;

/// What a token is for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Kind {
    /// A piece of texts.
    Normal,
    /// Stands for what no other token is.
    Unknown,
    /// Controls the model.
    Control,
    /// Is never divided, nor made of others.
    UserDefined,
    /// A byte of a character that no other token has.
    Byte,
    /// The name of a row of the table that has no token.
    None,
}

/// The name that llama.cpp's converter has for a row of the table without a token.
pub(super) fn no_token(id: usize) -> String {
    format!("[PAD{id}]")
}

/// The tokens of a model, by their numbers.
pub(super) struct Vocabulary<'a> {
    fields: &'a Map<String, Value>,
    pub(super) tokens: Vec<String>,
    /// As many as there are tokens.
    pub(super) kinds: Vec<Kind>,
}

impl<'a> Vocabulary<'a> {
    /// Reads `tokenizer.ggml.tokens`, and if it is there `token_type`. Without it, all tokens are normal, but for those
    /// whose names say that they end texts.
    ///
    /// # Errors
    ///
    /// If a field is missing or malformed, or a token is there twice.
    pub(super) fn read(fields: &'a Map<String, Value>) -> Result<Self> {
        let mut this = Self { fields, tokens: Vec::new(), kinds: Vec::new() };
        let tokens = this.texts("tokens")?.into_iter().enumerate();
        // As llama.cpp names them, so that each has a name of its own.
        this.tokens = tokens
            .map(|(id, token)| match token {
                "" => format!("[EMPTY_{id}]"),
                token => token.to_owned(),
            })
            .collect();
        let mut ids = HashMap::new();
        for (id, token) in this.tokens.iter().enumerate() {
            if let Some(before) = ids.insert(token, id) {
                return Err(format!(
                    "`tokenizer.ggml.tokens`: `{token}` is there twice, as token {before} and {id}"
                ));
            }
        }
        let codes = match fields.get("tokenizer.ggml.token_type") {
            None | Some(Value::Null) => None,
            Some(_) => Some(this.for_each_token("token_type")?),
        };
        let kind = |(id, token): (usize, &String)| {
            let code = codes.map(|it| it[id].as_i64().unwrap_or_default());
            let kind = match code {
                Some(2) => Kind::Unknown,
                Some(3) => Kind::Control,
                Some(4) => Kind::UserDefined,
                Some(5) if token == &no_token(id) => Kind::None,
                Some(6) => Kind::Byte,
                _ => Kind::Normal,
            };
            // Some files have such tokens as others. What also may be a tag of HTML is one only if no file says more.
            let ends = names_end(token) && (token != "</s>" || code.is_none());
            if ends { Kind::Control } else { kind }
        };
        this.kinds = this.tokens.iter().enumerate().map(kind).collect();
        Ok(this)
    }

    /// A list in the fields.
    pub(super) fn list(&self, name: &str) -> Result<&'a [Value]> {
        let name = format!("tokenizer.ggml.{name}");
        match self.fields.get(&name) {
            Some(Value::Array(list)) => Ok(list),
            Some(_) => Err(format!("`{name}` must be a list")),
            None => Err(format!("`{name}` is missing")),
        }
    }

    /// A list with a value for each token.
    pub(super) fn for_each_token(&self, name: &str) -> Result<&'a [Value]> {
        let list = self.list(name)?;
        match list.len() >= self.tokens.len() {
            true => Ok(list),
            false => Err(format!(
                "`tokenizer.ggml.{name}` has {} values, and there are {} tokens",
                list.len(),
                self.tokens.len()
            )),
        }
    }

    /// A list of texts.
    pub(super) fn texts(&self, name: &str) -> Result<Vec<&'a str>> {
        let texts = self.list(name)?.iter().map(Value::as_str).collect::<Option<Vec<_>>>();
        texts.ok_or_else(|| format!("`tokenizer.ggml.{name}` must hold texts"))
    }

    /// The numbers of the tokens.
    pub(super) fn ids(&self) -> Vocab {
        let all = self.tokens.iter().cloned().zip(0..).zip(&self.kinds);
        all.filter(|(_, kind)| **kind != Kind::None).map(|(token, _)| token).collect()
    }

    /// The tokens that are looked for before all others: those that control the model, and those that are never
    /// divided.
    pub(super) fn added_tokens(&self) -> Vec<AddedToken> {
        let tokens = self.tokens.iter().zip(&self.kinds).filter_map(|(token, kind)| match kind {
            Kind::Control | Kind::Unknown => Some(AddedToken::from(token, true)),
            Kind::UserDefined => Some(AddedToken::from(token, false).normalized(false)),
            Kind::Normal | Kind::Byte | Kind::None => None,
        });
        tokens.collect()
    }
}
