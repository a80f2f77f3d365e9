//! The requests and answers of OpenAI's protocol, as far as they mean something here.

use std::{
    collections::BTreeMap,
    time::{SystemTime, UNIX_EPOCH},
};

use serde::Deserialize;
use serde_json::{Value, json};

use burn_lora_llm::{chat::Message, generate::Sampling};

/// The name under which the base answers without adapters.
pub const BASE: &str = "base";

/// What is wrong with a request, or went wrong with it.
#[derive(Debug)]
pub struct Fault {
    pub status: u16,
    pub message: String,
    /// The field that is wrong.
    pub field: Option<&'static str>,
    pub code: Option<&'static str>,
}

impl Fault {
    pub fn new(status: u16, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), field: None, code: None }
    }

    fn of(field: &'static str, message: impl Into<String>) -> Self {
        Self { field: Some(field), ..Self::new(400, message) }
    }

    /// There is no such model.
    pub fn unknown_model(message: impl Into<String>) -> Self {
        let (field, code) = (Some("model"), Some("model_not_found"));
        Self { field, code, ..Self::new(404, message) }
    }

    pub fn json(&self) -> Value {
        let kind = match self.status {
            401 => "authentication_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        let Self { message, field, code, .. } = self;
        json!({ "error": { "message": message, "type": kind, "param": field, "code": code } })
    }
}

/// The two kinds of requests.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    Chat,
    Completion,
}

/// A request, as it is sent.
#[derive(Debug, Deserialize)]
struct Sent {
    model: Option<String>,
    messages: Option<Vec<SentMessage>>,
    prompt: Option<Value>,
    max_tokens: Option<i64>,
    max_completion_tokens: Option<i64>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    seed: Option<i64>,
    stop: Option<OneOrMany>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    n: Option<i64>,
    /// Fields without a meaning here, and those that nobody knows.
    #[serde(flatten)]
    others: serde_json::Map<String, Value>,
}

#[derive(Debug, Deserialize)]
struct SentMessage {
    role: String,
    content: Option<Content>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

#[derive(Debug, Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

/// What a request asks for, with all values in their ranges.
#[derive(Debug)]
pub struct Request {
    pub model: String,
    pub input: Input,
    /// The greatest number of new tokens, if the request says.
    pub limit: Option<usize>,
    pub sampling: Sampling,
    /// `None` if any will do.
    pub seed: Option<u64>,
    pub stops: Vec<String>,
    pub stream: bool,
    /// Whether a stream ends with the numbers of tokens.
    pub usage: bool,
}

#[derive(Debug)]
pub enum Input {
    Messages(Vec<Message>),
    Text(String),
}

/// Fields that would change the answer.
const UNSUPPORTED: [&str; 14] = [
    "best_of",
    "echo",
    "frequency_penalty",
    "functions",
    "logit_bias",
    "logprobs",
    "min_p",
    "presence_penalty",
    "repetition_penalty",
    "response_format",
    "suffix",
    "tools",
    "top_k",
    "top_logprobs",
];

impl Request {
    /// Reads a request.
    pub fn parse(kind: Kind, body: &[u8]) -> Result<Self, Fault> {
        let sent: Sent = serde_json::from_slice(body)
            .map_err(|error| Fault::new(400, format!("the body is not such a request: {error}")))?;
        for field in UNSUPPORTED {
            if sent.others.get(field).is_some_and(|value| !means_nothing(field, value)) {
                return Err(Fault::of(field, format!("`{field}` is not supported")));
            }
        }
        let model = sent.model.ok_or_else(|| Fault::of("model", "`model` is missing"))?;
        let input = match kind {
            Kind::Chat => Input::Messages(messages(sent.messages)?),
            Kind::Completion => Input::Text(match sent.prompt {
                Some(Value::Array(texts)) if texts.len() == 1 && texts[0].is_string() => {
                    texts[0].as_str().unwrap_or_default().to_owned()
                }
                Some(Value::String(text)) if !text.is_empty() => text,
                Some(Value::String(_)) => return Err(Fault::of("prompt", "`prompt` is empty")),
                Some(_) => {
                    return Err(Fault::of("prompt", "`prompt` must be one text"));
                }
                None => return Err(Fault::of("prompt", "`prompt` is missing")),
            }),
        };
        if sent.n.is_some_and(|n| n != 1) {
            return Err(Fault::of("n", "`n` must be 1: one answer for each request"));
        }
        let (field, limit) = match sent.max_completion_tokens {
            Some(limit) => ("max_completion_tokens", Some(limit)),
            None => ("max_tokens", sent.max_tokens),
        };
        let limit = limit.map(|limit| {
            let limit = usize::try_from(limit).ok().filter(|&limit| limit > 0);
            limit.ok_or_else(|| Fault::of(field, format!("`{field}` must be at least 1")))
        });
        let temperature = sent.temperature.unwrap_or(1.0);
        if !(0.0..=2.0).contains(&temperature) {
            return Err(Fault::of("temperature", "`temperature` must be from 0 to 2"));
        }
        let top_p = sent.top_p.unwrap_or(1.0);
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(Fault::of("top_p", "`top_p` must be above 0 and at most 1"));
        }
        let stops = match sent.stop {
            None => vec![],
            Some(OneOrMany::One(stop)) => vec![stop],
            Some(OneOrMany::Many(stops)) => stops,
        };
        if stops.len() > 4 || stops.iter().any(String::is_empty) {
            return Err(Fault::of("stop", "`stop` must be at most 4 texts, none of them empty"));
        }
        Ok(Self {
            model,
            input,
            limit: limit.transpose()?,
            sampling: Sampling { temperature, top_p },
            seed: sent.seed.map(|seed| seed as u64),
            stops,
            stream: sent.stream.unwrap_or(false),
            usage: sent.stream_options.is_some_and(|it| it.include_usage),
        })
    }
}

/// Whether the field has the value that it has if it is left out.
fn means_nothing(field: &str, value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        // As a number, it asks for those of the chosen tokens at least.
        Value::Number(_) if field == "logprobs" => false,
        Value::Number(number) => {
            let is_one = ["best_of", "repetition_penalty"].contains(&field);
            number.as_f64() == Some(if is_one { 1.0 } else { 0.0 })
        }
        Value::Array(values) => values.is_empty(),
        Value::Object(values) => values.is_empty() || values.get("type") == Some(&json!("text")),
        Value::String(text) => text.is_empty(),
        Value::Bool(true) => false,
    }
}

fn messages(sent: Option<Vec<SentMessage>>) -> Result<Vec<Message>, Fault> {
    let fault = |message| Fault::of("messages", message);
    let sent = sent.filter(|it| !it.is_empty());
    let sent = sent.ok_or_else(|| fault("`messages` are missing".to_owned()))?;
    let message = |SentMessage { role, content }| {
        let role = match &*role {
            "developer" => "system".to_owned(),
            "system" | "user" | "assistant" => role,
            _ => {
                let roles = "system, developer, user, assistant";
                return Err(fault(format!("`{role}` is none of the roles {roles}")));
            }
        };
        let content = match content {
            None => String::new(),
            Some(Content::Text(text)) => text,
            Some(Content::Parts(parts)) => {
                let texts = parts.into_iter().map(|part| match part {
                    Part { text: Some(text), kind } if kind == "text" => Ok(text),
                    part => Err(fault(format!("`{}` is not supported: only text is", part.kind))),
                });
                texts.collect::<Result<Vec<_>, _>>()?.concat()
            }
        };
        Ok(Message { role, content })
    };
    sent.into_iter().map(message).collect()
}

/// What all parts of an answer have in common.
#[derive(Clone, Debug)]
pub struct Head {
    pub kind: Kind,
    pub id: String,
    pub model: String,
    /// What distinguishes the adapters that answer from others of their name.
    pub fingerprint: String,
    pub created: u64,
}

impl Head {
    fn object(&self, object: &str, choice: Value) -> Value {
        json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model,
            "system_fingerprint": self.fingerprint, "choices": [choice],
        })
    }

    /// The whole answer.
    pub fn answer(&self, text: &str, reason: &str, usage: Value) -> Value {
        let (object, choice) = match self.kind {
            Kind::Chat => {
                let message = json!({ "role": "assistant", "content": text });
                (
                    "chat.completion",
                    json!({ "index": 0, "message": message, "finish_reason": reason }),
                )
            }
            Kind::Completion => {
                ("text_completion", json!({ "index": 0, "text": text, "finish_reason": reason }))
            }
        };
        let mut answer = self.object(object, choice);
        answer["usage"] = usage;
        answer
    }

    /// A piece of a streamed answer; its end, if there is a reason.
    pub fn piece(&self, text: Option<&str>, reason: Option<&str>) -> Value {
        match self.kind {
            Kind::Chat => {
                let delta = match (text, reason) {
                    (Some(text), _) => json!({ "content": text }),
                    (None, None) => json!({ "role": "assistant", "content": "" }),
                    (None, Some(_)) => json!({}),
                };
                let choice = json!({ "index": 0, "delta": delta, "finish_reason": reason });
                self.object("chat.completion.chunk", choice)
            }
            Kind::Completion => {
                let text = text.unwrap_or_default();
                let choice = json!({ "index": 0, "text": text, "finish_reason": reason });
                self.object("text_completion", choice)
            }
        }
    }

    /// The end of a stream, with the numbers of tokens.
    pub fn numbers(&self, usage: Value) -> Value {
        let mut piece = self.piece(None, None);
        piece["choices"] = json!([]);
        piece["usage"] = usage;
        piece
    }
}

pub fn usage(prompt: usize, new: usize) -> Value {
    json!({ "prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new })
}

/// The models that can be asked, with what is wrong with some of them.
pub fn models(names: &[String], problems: &BTreeMap<String, String>, created: u64) -> Value {
    let model = |name: &str| model(name, problems.get(name).map(String::as_str), created);
    let data: Vec<_> =
        [BASE].into_iter().chain(names.iter().map(String::as_str)).map(model).collect();
    json!({ "object": "list", "data": data })
}

/// One model that can be asked. `problem` is a field that the protocol does not have.
pub fn model(name: &str, problem: Option<&str>, created: u64) -> Value {
    let mut model =
        json!({ "id": name, "object": "model", "created": created, "owned_by": "burn-lora" });
    if let Some(problem) = problem {
        model["problem"] = problem.into();
    }
    model
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |it| it.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(kind: Kind, body: &str) -> Fault {
        Request::parse(kind, body.as_bytes()).unwrap_err()
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (body, field) in [
            (r#"{"prompt": "a"}"#, Some("model")),
            (r#"{"model": "m"}"#, Some("prompt")),
            (r#"{"model": "m", "prompt": ""}"#, Some("prompt")),
            (r#"{"model": "m", "prompt": [1, 2]}"#, Some("prompt")),
            (r#"{"model": "m", "prompt": "a", "max_tokens": -3}"#, Some("max_tokens")),
            (r#"{"model": "m", "prompt": "a", "max_tokens": 0}"#, Some("max_tokens")),
            (r#"{"model": "m", "prompt": "a", "temperature": -0.1}"#, Some("temperature")),
            (r#"{"model": "m", "prompt": "a", "top_p": 0}"#, Some("top_p")),
            (r#"{"model": "m", "prompt": "a", "n": 2}"#, Some("n")),
            (r#"{"model": "m", "prompt": "a", "stop": [""]}"#, Some("stop")),
            (r#"{"model": "m", "prompt": "a", "logprobs": 3}"#, Some("logprobs")),
            (r#"{"model": "m", "prompt": "a", "max_tokens": "many"}"#, None),
            (r#"{"model": 3, "prompt": "a"}"#, None),
            ("[]", None),
            ("{", None),
            ("", None),
        ] {
            let fault = fault(Kind::Completion, body);
            assert_eq!((fault.status, fault.field), (400, field), "{body}: {}", fault.message);
        }
        for messages in [
            "[]",
            r#"[{"role": "robot", "content": "a"}]"#,
            r#"[{"role": "user", "content":
            [{"type": "image_url"}]}]"#,
        ] {
            let body = format!(r#"{{"model": "m", "messages": {messages}}}"#);
            assert_eq!(fault(Kind::Chat, &body).field, Some("messages"), "{body}");
        }
    }

    #[test]
    fn what_is_left_out_has_the_values_of_the_protocol() {
        let body = r#"{"model": "m", "messages": [{"role": "user", "content": [
            {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
            "user": "somebody", "presence_penalty": 0, "response_format": {"type": "text"}}"#;
        let request = Request::parse(Kind::Chat, body.as_bytes()).unwrap();
        let Input::Messages(messages) = &request.input else { panic!("{request:?}") };
        assert_eq!(messages[0].content, "ab");
        assert_eq!((request.sampling.temperature, request.sampling.top_p), (1.0, 1.0));
        assert!(request.limit.is_none() && request.seed.is_none() && request.stops.is_empty());
        assert!(!request.stream && !request.usage);
    }
}
