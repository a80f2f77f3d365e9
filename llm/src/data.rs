//! Texts to learn from: `train.jsonl`, `valid.jsonl` and `test.jsonl`, as mlx-lm reads them.

use std::path::Path;

use burn::tensor::{Int, Tensor, TensorData, backend::Backend};
use serde_json::Value;

use crate::{
    chat::{Chat, Message},
    error::{Context, Result},
    files::read_text,
    llama::{Llama, Positions},
};

/// The roles of those who speak in a conversation.
const ROLES: [&str; 3] = ["system", "user", "assistant"];

/// A text as tokens.
#[derive(Clone, Debug, PartialEq, Hash)]
pub struct Text {
    /// The ids of its tokens.
    pub ids: Vec<u32>,
    /// The number of tokens at its beginning that are given, and not learned.
    pub given: usize,
}

/// How lines become texts.
pub struct Reading {
    /// Longer texts are cut off, in tokens.
    pub max_length: usize,
    /// Learn only the answers, not what they answer.
    pub mask_prompt: bool,
}

/// The texts of a file that there is something to learn of.
#[derive(Debug, Default)]
pub struct Texts {
    /// In the order of the file.
    pub texts: Vec<Text>,
    /// How many of them were cut off at the greatest length.
    pub cut: usize,
    /// How many were left out, because nothing is to be learned of what is left of them.
    pub skipped: usize,
}

/// A number of texts, in rows of one length.
pub struct Batch<B: Backend> {
    /// `[rows, length]`
    pub ids: Tensor<B, 2, Int>,
    /// The positions of the tokens, and which of them see which.
    pub positions: Positions<B>,
    /// Where the next token is learned, in the rows one after the other: `[targets]`.
    pub at: Tensor<B, 1, Int>,
    /// These next tokens: `[targets]`.
    pub targets: Tensor<B, 1, Int>,
}

/// Reads the texts of a file.
///
/// # Errors
///
/// If the file cannot be read, a line is none of the three forms, or there is no text to learn. The error names
/// the line.
pub fn read(path: &Path, chat: &Chat, reading: &Reading) -> Result<Texts> {
    let content = read_text(path)?;
    let first = content.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default();
    let instead = match first {
        "{" => Some(("its texts are spread over several lines", ".")),
        _ if first.starts_with('[') => Some(("it is a list in JSON", ".[]")),
        _ => None,
    };
    if let Some((found, filter)) = instead {
        let path = path.display();
        return Err(format!(
            "{path}: {found}, and each text is needed on a line of its own, as `jq -c '{filter}' {path}` writes them"
        ));
    }
    let lines = content.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let texts = lines.map(|(number, line)| {
        text(line, chat, reading.mask_prompt).context(format!(
            "{}, line {}",
            path.display(),
            number + 1
        ))
    });
    Texts::new(texts.collect::<Result<Vec<_>>>()?, reading.max_length).context(path.display())
}

impl Texts {
    /// Cuts texts off at `max_length` tokens, and leaves out those of which then nothing is to be learned: empty
    /// ones, and those whose given tokens are as long.
    ///
    /// # Errors
    ///
    /// If no text is left.
    pub fn new(whole: Vec<Text>, max_length: usize) -> Result<Self> {
        let count = whole.len();
        let mut found = Self { texts: Vec::new(), cut: 0, skipped: 0 };
        for mut text in whole {
            let is_longer = text.ids.len() > max_length;
            text.ids.truncate(max_length);
            if text.targets() == 0 {
                found.skipped += 1;
                continue;
            }
            found.cut += usize::from(is_longer);
            found.texts.push(text);
        }
        match (found.texts.is_empty(), count) {
            (false, _) => Ok(found),
            (true, 0) => Err("it holds no text".to_owned()),
            (true, _) => Err(format!(
                "none of its {count} texts has a token to learn within the greatest length, {max_length} \
                 tokens: they are empty, or their prompts are as long"
            )),
        }
    }
}

/// Keys of a line and of a message that say what the model reads or learns, and are not supported.
const UNSUPPORTED: [&str; 5] =
    ["documents", "functions", "reasoning_content", "tool_calls", "tools"];
const UNSUPPORTED_IN_MESSAGES: [&str; 12] = [
    "audio",
    "function_call",
    "name",
    "reasoning",
    "reasoning_content",
    "refusal",
    "thinking",
    "tool_call_id",
    "tool_calls",
    "tools",
    "train",
    "weight",
];

/// The keys of the three forms of lines.
const KEYS: [&str; 4] = ["messages", "prompt", "completion", "text"];

/// The form is told by the keys: `messages`, `prompt` and `completion`, or `text`.
fn text(line: &str, chat: &Chat, mask_prompt: bool) -> Result<Text> {
    let mut json: Value = serde_json::from_str(line).map_err(|error| error.to_string())?;
    check_keys(&json, &UNSUPPORTED)?;
    // Some programs write `null` for what a line has not.
    let keys: Vec<_> = KEYS.into_iter().filter(|key| !json[key].is_null()).collect();
    let string = |key: &str| {
        let text = json[key].as_str().ok_or_else(|| format!("`{key}` must be a text"))?;
        Ok::<_, String>(text.to_owned())
    };
    let messages = match keys[..] {
        ["messages"] => {
            let messages = json["messages"].take();
            for message in messages.as_array().into_iter().flatten() {
                check_keys(message, &UNSUPPORTED_IN_MESSAGES).context("`messages`")?;
            }
            serde_json::from_value(messages).context("`messages`")?
        }
        ["prompt", "completion"] => {
            let message = |role: &str, content| Message { role: role.to_owned(), content };
            vec![message("user", string("prompt")?), message("assistant", string("completion")?)]
        }
        ["text"] => {
            return Ok(Text { ids: chat.encode_to_end(&string("text")?)?, given: 0 });
        }
        _ => {
            let found = match keys[..] {
                [] => "none of them is there".to_owned(),
                _ => format!("there is `{}`", keys.join("`, `")),
            };
            return Err(format!(
                "`messages`, or `prompt` and `completion`, or `text` is needed, and {found}"
            ));
        }
    };
    check_roles(&messages)?;
    conversation(&messages, chat, mask_prompt)
}

/// Fails if one of the keys says something, which would be left out.
fn check_keys(json: &Value, unsupported: &[&str]) -> Result<()> {
    let says_nothing = |key: &str| match json.get(key) {
        None | Some(Value::Null) => true,
        Some(Value::Array(list)) => list.is_empty(),
        Some(Value::Object(fields)) => fields.is_empty(),
        Some(Value::String(text)) => text.is_empty(),
        // All messages are learned, with the weight 1.
        Some(Value::Bool(value)) => key == "train" && *value,
        Some(Value::Number(number)) => key == "weight" && number.as_f64() == Some(1.0),
    };
    match unsupported.iter().find(|key| !says_nothing(key)) {
        None => Ok(()),
        Some(key) => Err(format!(
            "`{key}` is not supported; write what it says into a message's `content`, or remove it"
        )),
    }
}

/// Fails if a role is none: most templates write any word.
fn check_roles(messages: &[Message]) -> Result<()> {
    let is_none = |it: &&Message| !ROLES.contains(&&*it.role);
    match messages.iter().find(is_none) {
        Some(Message { role, .. }) => {
            Err(format!("{role:?} is not a role; `{}` is expected", ROLES.join("`, `")))
        }
        None => Ok(()),
    }
}

/// A conversation as a text. With `mask_prompt`, all before the last answer is given.
///
/// # Errors
///
/// If the model has no chat template, or writes questions without answers in another way.
pub fn conversation(messages: &[Message], chat: &Chat, mask_prompt: bool) -> Result<Text> {
    let ids = chat.encode(&chat.render(messages, false)?, false)?;
    let mut given = 0;
    if mask_prompt {
        let (last, before) = messages.split_last().ok_or("`messages` is empty")?;
        if last.role != "assistant" {
            return Err(format!(
                "the last message must be the assistant's, and is `{}`'s",
                last.role
            ));
        }
        let prompt = chat.encode(&chat.render(before, true)?, false)?;
        if !ids.starts_with(&prompt) {
            return Err(
                "the chat template writes the question in another way than with an answer, \
                        so that it cannot be masked"
                    .to_owned(),
            );
        }
        given = prompt.len();
    }
    Ok(Text { ids, given })
}

impl Text {
    /// The number of tokens that are learned: all that follow another, but those that are given.
    pub fn targets(&self) -> usize {
        self.ids.len().saturating_sub(self.given.max(1))
    }
}

/// Puts texts one after the other into rows of up to `length` tokens.
pub fn pack<'a>(texts: &[&'a Text], length: usize) -> Vec<Vec<&'a Text>> {
    let mut rows: Vec<Vec<&Text>> = Vec::new();
    let mut used = length;
    for &text in texts {
        if used + text.ids.len() > length {
            rows.push(Vec::new());
            used = 0;
        }
        used += text.ids.len();
        rows.last_mut().expect("there is a row").push(text);
    }
    rows
}

/// Shares rows among workers, so that each has about as many tokens. The longest rows are together, so that
/// little is filled up.
pub fn deal(mut rows: Vec<Vec<&Text>>, workers: usize) -> Vec<Vec<Vec<&Text>>> {
    rows.sort_by_key(|row| std::cmp::Reverse(tokens(row)));
    let mut left: usize = rows.iter().map(|row| tokens(row)).sum();
    let mut rows = rows.into_iter().peekable();
    let mut parts = Vec::new();
    for worker in 0..workers {
        let fair = left.div_ceil(workers - worker);
        let (mut part, mut size) = (Vec::new(), 0);
        // Half of a row decides who gets it.
        while let Some(row) =
            rows.next_if(|row| 2 * size + tokens(row) <= 2 * fair || part.is_empty())
        {
            size += tokens(&row);
            part.push(row);
        }
        left -= size;
        parts.push(part);
    }
    parts.retain(|part| !part.is_empty());
    parts
}

/// The parts of replica `index` of `count`, one for each of its workers. The replicas take the parts in turn, so
/// that none has several while another has none.
pub fn deal_to(
    rows: Vec<Vec<&Text>>,
    workers: usize,
    index: usize,
    count: usize,
) -> Vec<Vec<Vec<&Text>>> {
    deal(rows, count * workers).into_iter().skip(index).step_by(count).collect()
}

/// The number of tokens in a row.
pub fn tokens(row: &[&Text]) -> usize {
    row.iter().map(|text| text.ids.len()).sum()
}

impl<B: Backend> Batch<B> {
    /// Rows of one or more texts, filled up to the length of the longest.
    pub fn new(llama: &Llama<B>, rows: &[Vec<&Text>], device: &B::Device) -> Self {
        let length = rows.iter().map(|row| tokens(row)).max().unwrap_or(0);
        let mut ids = Vec::with_capacity(rows.len() * length);
        let (mut at, mut targets, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
        for row in rows {
            for text in row {
                let learned = text.given.max(1)..text.ids.len();
                at.extend(learned.clone().map(|next| (ids.len() + next - 1) as i32));
                targets.extend(text.ids[learned].iter().map(|&id| id as i32));
                ids.extend(text.ids.iter().map(|&id| id as i32));
            }
            ids.resize(ids.len() + length - tokens(row), 0);
            lengths.push(row.iter().map(|text| text.ids.len()).collect::<Vec<_>>());
        }
        let int =
            |values: Vec<i32>| Tensor::<B, 1, Int>::from_data(TensorData::from(&*values), device);
        // Texts of one length in rows of their own are all placed in the same way.
        let positions = match lengths.iter().all(|row| *row == [length]) {
            true => llama.positions(length, device),
            false => llama.packed(&lengths, device),
        };
        let ids = int(ids).reshape([rows.len(), length]);
        Self { ids, positions, at: int(at), targets: int(targets) }
    }
}
