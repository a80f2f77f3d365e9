//! Texts as tokens, and conversations as texts, as the files of a model say.

mod json;
mod template;

use std::{collections::BTreeSet, path::Path};

use burn_lora::gguf::{Field, Gguf};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokenizers::Tokenizer;

use crate::{
    error::{Context, Result},
    files::{check_model, is_gguf, is_there, read_json_if_exists, read_text, write_atomically},
    gguf::{
        self, tokens,
        tokens::writing::{self, Told},
    },
    tokenizer,
};
use template::Template;

/// What somebody said in a conversation.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// The tokens and the chat template of a model.
pub struct Chat {
    tokenizer: Tokenizer,
    /// Writes a conversation as the model learned to read it. Base models have none. What is wrong with it matters
    /// only where it is needed.
    template: Option<Result<Template>>,
    /// The template as it was given.
    source: Option<String>,
    begin: String,
    end: String,
    /// The tokens after which an answer ends.
    stops: BTreeSet<u32>,
    /// The number of tokens that the model knows, if its files say.
    known: Option<usize>,
}

const TEMPLATE: &str = "chat_template";

impl Chat {
    /// Tokens and a template of one's own. Answers and texts end with `end`. If the tokenizer truncates or pads
    /// texts, it does so no longer.
    ///
    /// # Errors
    ///
    /// If the template is malformed.
    pub fn new(tokenizer: Tokenizer, source: &str, end: &str) -> Result<Self> {
        let (tokenizer, begin) = (tokenizer::whole(tokenizer)?, String::new());
        let chat = Self::of(tokenizer, Some(Ok(source.to_owned())), begin, end.to_owned());
        match chat.template {
            Some(Err(problem)) => Err(problem),
            _ => Ok(chat),
        }
    }

    fn of(
        tokenizer: Tokenizer,
        source: Option<Result<String>>,
        begin: String,
        end: String,
    ) -> Self {
        let template = source.clone().map(|it| Template::new(&it?, template::local));
        let source = source.and_then(Result::ok);
        let stops = tokenizer.token_to_id(&end).into_iter().collect();
        Self { tokenizer, template, source, begin, end, stops, known: None }
    }

    /// Reads the tokens of the model at `path`, a directory or a GGUF file. A template that cannot be read is an
    /// error of [`render`](Self::render) alone.
    ///
    /// # Errors
    ///
    /// If a file cannot be read, or is malformed.
    pub fn read(path: &Path) -> Result<Self> {
        check_model(path)?;
        if is_gguf(path) { Self::read_gguf(path) } else { Self::read_directory(path) }
    }

    fn read_gguf(path: &Path) -> Result<Self> {
        let Gguf { fields, tensors, .. } = gguf::open(path)?;
        let tokenizer = tokens::tokenizer(&fields, path)?;
        let [begin, end] = ["bos", "eos"].map(|it| tokens::special(&fields, it));
        let [begin, end] = [begin, end].map(Option::unwrap_or_default);
        let source = fields.get("tokenizer.chat_template").and_then(Value::as_str);
        let mut chat = Self::of(tokenizer, source.map(|it| Ok(it.to_owned())), begin, end);
        // Some models end an answer in another way than a text.
        let stops = tokens::ends(&fields, &chat.tokenizer);
        chat.stops.extend(stops);
        chat.known = tensors.get("token_embd.weight").and_then(|it| it.shape.first().copied());
        Ok(chat)
    }

    /// Reads `tokenizer.json`, and if they exist `tokenizer_config.json`, `special_tokens_map.json`, `config.json`,
    /// `generation_config.json` and `chat_template.jinja`.
    fn read_directory(dir: &Path) -> Result<Self> {
        let tokenizer = tokenizer::read(&dir.join("tokenizer.json"))?;
        let json = |file: &str| read_json_if_exists(&dir.join(file));
        let settings = [json("tokenizer_config.json")?, json("special_tokens_map.json")?];
        let configs = [json("config.json")?, json("generation_config.json")?];
        let named = |name: &str| {
            settings.iter().find_map(|settings| {
                // Some files have a string here, others an object that describes the token.
                let token = &settings[name];
                Some(token.as_str().or_else(|| token["content"].as_str())?.to_owned())
            })
        };
        let ids = |name: &str| {
            let ids = configs.iter().flat_map(|config| match &config[name] {
                Value::Array(several) => several.clone(),
                one => vec![one.clone()],
            });
            ids.filter_map(|id| u32::try_from(id.as_u64()?).ok()).collect::<Vec<_>>()
        };
        let numbered =
            |name: &str| ids(name).first().and_then(|&first| tokenizer.id_to_token(first));
        let begin = named("bos_token").or_else(|| numbered("bos_token_id"));
        let end = named("eos_token").filter(|it| tokenizer.token_to_id(it).is_some());
        let end = end.or_else(|| numbered("eos_token_id"));
        let [begin, end] = [begin, end].map(Option::unwrap_or_default);
        let stops = ids("eos_token_id");

        let path = dir.join("chat_template.jinja");
        let source = match is_there(&path) {
            true => Some(read_text(&path)),
            false => default_template(&settings[0][TEMPLATE])
                .map(|it| it.context(dir.join("tokenizer_config.json").display())),
        };
        let mut chat = Self::of(tokenizer, source, begin, end);
        chat.stops.extend(stops);
        chat.known = configs[0]["vocab_size"].as_u64().and_then(|it| it.try_into().ok());
        Ok(chat)
    }

    /// Writes `tokenizer.json` and `tokenizer_config.json`.
    pub fn save(&self, dir: &Path) -> Result<()> {
        for (name, bytes) in self.files()? {
            let path = dir.join(name);
            write_atomically(&path, &bytes).context(path.display())?;
        }
        Ok(())
    }

    /// The names and the contents of these files.
    pub(crate) fn files(&self) -> Result<[(&'static str, Vec<u8>); 2]> {
        let settings = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.begin,
            "eos_token": self.end,
            TEMPLATE: self.source,
        });
        let tokenizer = self.tokenizer.to_string(false).context("the tokenizer")?;
        let settings = serde_json::to_vec_pretty(&settings).context("the tokenizer's settings")?;
        Ok([("tokenizer.json", tokenizer.into_bytes()), ("tokenizer_config.json", settings)])
    }

    /// The fields of a GGUF file that say the same, for a model that knows so many tokens.
    ///
    /// # Errors
    ///
    /// If it is a tokenizer of another kind than byte pairs and pieces of SentencePiece that are made of pairs, or divides
    /// texts in a way for which llama.cpp has no name.
    pub fn gguf_fields(&self, known: usize) -> Result<Vec<(String, Field)>> {
        let ends = self.ends();
        let begin = self.tokenizer.token_to_id(&self.begin);
        let told = Told { begin, ends: &ends, template: self.template() };
        writing::fields(&self.tokenizer, known, &told)
    }

    /// The tokens after which an answer ends, as texts.
    pub fn stop_texts(&self) -> Vec<String> {
        self.ends().into_iter().filter_map(|id| self.tokenizer.id_to_token(id)).collect()
    }

    /// Whether an answer ends with the token.
    pub fn stops(&self, id: u32) -> bool {
        self.stops.contains(&id)
    }

    /// The tokens after which an answer ends. The one that ends texts comes first.
    pub(crate) fn ends(&self) -> Vec<u32> {
        let end = self.tokenizer.token_to_id(&self.end);
        let others = self.stops.iter().copied().filter(|&id| Some(id) != end);
        end.into_iter().chain(others).collect()
    }

    /// The conversation as one text. With `answer`, the text ends where the assistant's answer begins.
    ///
    /// # Errors
    ///
    /// If the model has no chat template, or one that cannot be read or refuses the conversation.
    pub fn render(&self, messages: &[Message], answer: bool) -> Result<String> {
        let template = self.template.as_ref().ok_or("the model has no chat template")?;
        let conversation = template::conversation(messages, answer, &self.begin, &self.end);
        template.as_ref().map_err(Clone::clone)?.render(conversation)
    }

    /// The tokens from which the model answers `prompt`, as a chat if it has a template for it.
    pub fn prompt(&self, prompt: &str) -> Result<Vec<u32>> {
        if self.template.is_none() {
            return self.encode(prompt, true);
        }
        let message = Message { role: "user".to_owned(), content: prompt.to_owned() };
        self.encode(&self.render(&[message], true)?, false)
    }

    /// The tokens of a text. With `special`, those that begin and end texts are added, as the tokenizer
    /// does it; a chat template has already written them.
    ///
    /// # Errors
    ///
    /// If a token is beyond those that the model knows.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode(text, special).context("the tokenizer")?;
        self.known(encoding.get_ids().to_vec())
    }

    /// The tokens of a text, and the one that ends texts. Errors are those of [`encode`](Self::encode).
    pub fn encode_to_end(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode(text, true)?;
        if let Some(end) = self.tokenizer.token_to_id(&self.end)
            && ids.last() != Some(&end)
        {
            ids.push(end);
        }
        self.known(ids)
    }

    /// The tokens, if the model knows them.
    fn known(&self, ids: Vec<u32>) -> Result<Vec<u32>> {
        let known = self.known.unwrap_or(usize::MAX);
        match ids.iter().find(|&&id| id as usize >= known) {
            None => Ok(ids),
            Some(&id) => Err(format!(
                "the token `{}` has number {id}, and the model knows those below {known}: its tokenizer is of \
                 another model, or has tokens that were added without training",
                self.tokenizer.id_to_token(id).unwrap_or_default(),
            )),
        }
    }

    /// The source of the chat template. Base models have none.
    pub fn template(&self) -> Option<&str> {
        self.source.as_deref()
    }

    /// The text of the tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer.decode(ids, true).context("the tokenizer")
    }
}

/// The template in `tokenizer_config.json`: the only one, or of several that have names the one named `default`.
fn default_template(setting: &Value) -> Option<Result<String>> {
    let named: Vec<_> = match setting {
        Value::Null => return None,
        Value::String(source) => return Some(Ok(source.clone())),
        Value::Array(list) => list.iter().map(|it| (&it["name"], &it["template"])).collect(),
        _ => return Some(Err(format!("`{TEMPLATE}` must be a template, or a list of them"))),
    };
    let default = named.iter().find(|(name, _)| *name == "default");
    Some(match default.and_then(|(_, template)| template.as_str()) {
        Some(source) => Ok(source.to_owned()),
        None => {
            let names = named.iter().filter_map(|(name, _)| name.as_str());
            let names = names.collect::<Vec<_>>().join("`, `");
            Err(format!(
                "`{TEMPLATE}` has the templates `{names}`, and none that is named `default`"
            ))
        }
    })
}
