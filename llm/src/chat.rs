//! Texts as tokens, and conversations as texts, as the files of a model say.

use std::{collections::BTreeSet, fs, path::Path};

use minijinja::{Environment, context};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokenizers::Tokenizer;

use crate::{
    error::{Context, Result},
    files::write_atomically,
    gguf::{Gguf, tokens},
    pretrained::is_gguf,
};

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
    /// Writes a conversation as the model learned to read it, and its source. Base models have none.
    template: Option<(Environment<'static>, String)>,
    begin: String,
    end: String,
    /// The tokens after which an answer ends.
    stops: BTreeSet<u32>,
}

const TEMPLATE: &str = "chat_template";

impl Chat {
    /// Tokens and a template of one's own. Answers and texts end with `end`.
    ///
    /// # Errors
    ///
    /// If the template is malformed.
    pub fn new(tokenizer: Tokenizer, source: &str, end: &str) -> Result<Self> {
        let template = template(Some(source.to_owned())).context("the chat template")?;
        let stops = tokenizer.token_to_id(end).into_iter().collect();
        Ok(Self { tokenizer, template, begin: String::new(), end: end.to_owned(), stops })
    }

    /// Reads the tokens of the model at `path`, a directory or a GGUF file.
    ///
    /// # Errors
    ///
    /// If a file cannot be read, or is malformed.
    pub fn read(path: &Path) -> Result<Self> {
        if is_gguf(path) { Self::read_gguf(path) } else { Self::read_directory(path) }
    }

    fn read_gguf(path: &Path) -> Result<Self> {
        let fields = Gguf::open(path)?.fields;
        let tokenizer = tokens::tokenizer(&fields, path)?;
        let [begin, end] = ["bos", "eos"].map(|it| tokens::special(&fields, it));
        let [begin, end] = [begin, end].map(Option::unwrap_or_default);
        // Some models end an answer in another way than a text.
        let stops = ["eos", "eot"].iter().filter_map(|it| tokens::special(&fields, it));
        let stops = stops.filter_map(|token| tokenizer.token_to_id(&token)).collect();
        let source = fields.get("tokenizer.chat_template").and_then(Value::as_str);
        let template = template(source.map(str::to_owned)).context(path.display())?;
        Ok(Self { tokenizer, template, begin, end, stops })
    }

    /// Reads `tokenizer.json`, and if they exist `tokenizer_config.json`, `generation_config.json`,
    /// `config.json` and `chat_template.jinja`.
    fn read_directory(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let tokenizer = Tokenizer::from_file(&path).context(path.display())?;
        let settings = read_json(&dir.join("tokenizer_config.json"))?;
        let special = |name: &str| {
            // Some files have a string here, others an object that describes the token.
            let token = &settings[name];
            let token = token.as_str().or_else(|| token["content"].as_str());
            token.unwrap_or_default().to_owned()
        };
        let (begin, end) = (special("bos_token"), special("eos_token"));

        let mut stops: BTreeSet<u32> = tokenizer.token_to_id(&end).into_iter().collect();
        for file in ["config.json", "generation_config.json"] {
            let stop = read_json(&dir.join(file))?["eos_token_id"].take();
            let several = stop.as_array().cloned().unwrap_or_else(|| vec![stop]);
            stops.extend(several.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()));
        }

        let path = dir.join("chat_template.jinja");
        let source = match fs::read_to_string(&path) {
            Ok(source) => Some(source),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                settings[TEMPLATE].as_str().map(str::to_owned)
            }
            Err(error) => return Err(format!("{}: {error}", path.display())),
        };
        let template = template(source).context(dir.display())?;
        Ok(Self { tokenizer, template, begin, end, stops })
    }

    /// Writes `tokenizer.json` and `tokenizer_config.json`.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let path = dir.join("tokenizer.json");
        self.tokenizer.save(&path, false).context(path.display())?;
        let settings = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.begin,
            "eos_token": self.end,
            TEMPLATE: self.template.as_ref().map(|(_, source)| source),
        });
        let path = dir.join("tokenizer_config.json");
        let settings = serde_json::to_vec_pretty(&settings).context(path.display())?;
        write_atomically(&path, &settings).context(path.display())
    }

    /// Whether an answer ends with the token.
    pub fn stops(&self, id: u32) -> bool {
        self.stops.contains(&id)
    }

    /// The conversation as one text. With `answer`, the text ends where the assistant's answer begins.
    ///
    /// # Errors
    ///
    /// If the model has no chat template, or its template refuses the conversation.
    pub fn render(&self, messages: &[Message], answer: bool) -> Result<String> {
        let (template, _) = self.template.as_ref().ok_or("the model has no chat template")?;
        let context = context! {
            messages => messages,
            add_generation_prompt => answer,
            bos_token => self.begin,
            eos_token => self.end,
        };
        let rendered = template.get_template(TEMPLATE).and_then(|it| it.render(context));
        rendered.context("the chat template")
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
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode(text, special).context("the tokenizer")?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The tokens of a text, and the one that ends texts.
    pub fn encode_to_end(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode(text, true)?;
        if let Some(end) = self.tokenizer.token_to_id(&self.end)
            && ids.last() != Some(&end)
        {
            ids.push(end);
        }
        Ok(ids)
    }

    /// The source of the chat template. Base models have none.
    pub fn template(&self) -> Option<&str> {
        self.template.as_ref().map(|(_, source)| source.as_str())
    }

    /// The text of the tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer.decode(ids, true).context("the tokenizer")
    }
}

/// The file as JSON, or `null` if it does not exist.
fn read_json(path: &Path) -> Result<Value> {
    match fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Value::Null),
        bytes => serde_json::from_slice(&bytes.context(path.display())?).context(path.display()),
    }
}

/// Templates are written for Python's Jinja: they call Python's methods, and refuse conversations with
/// `raise_exception`.
fn template(
    source: Option<String>,
) -> std::result::Result<Option<(Environment<'static>, String)>, minijinja::Error> {
    let Some(source) = source else { return Ok(None) };
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function(
        "raise_exception",
        |message: String| -> std::result::Result<String, _> {
            Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, message))
        },
    );
    environment.add_template_owned(TEMPLATE, source.clone())?;
    Ok(Some((environment, source)))
}
