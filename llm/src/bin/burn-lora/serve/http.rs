//! The server's addresses, and what is done at each of them.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Bytes,
    extract::{self, DefaultBodyLimit, FromRequest, Path, State, rejection::PathRejection},
    http::{HeaderMap, StatusCode, header},
    response::{
        IntoResponse, Response,
        sse::{self, KeepAlive, Sse},
    },
    routing::{get, post},
};
use burn_lora::LoraError;
use burn_lora_llm::chat::Chat;

use super::{
    engine::{Event, Job},
    metrics::Metrics,
    protocol::{self, BASE, Fault, Head, Input, Kind, Request, usage},
    sets::Sets,
};
use futures_util::stream;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokio::{
    sync::mpsc::{self, UnboundedReceiver, error::TrySendError},
    time::timeout,
};

/// The largest body of a request, in bytes.
const LARGEST: usize = 1 << 20;

/// How long a body may take to arrive.
const PATIENCE: Duration = Duration::from_secs(20);

/// The status in the log of a request whose client did not wait.
const GONE: u16 = 499;

/// What the addresses have in common.
pub struct Server {
    pub chat: Arc<Chat>,
    pub sets: Option<Sets>,
    pub queue: mpsc::Sender<Job>,
    pub metrics: Arc<Metrics>,
    /// The greatest length of a text that the model reads, in tokens.
    pub max_length: usize,
    /// The number of tokens that the model knows.
    pub vocab_size: usize,
    /// The greatest number of new tokens.
    pub limit: usize,
    /// The hash of the token that clients must send.
    pub token: Option<[u8; 32]>,
}

type Shared = State<Arc<Server>>;

pub fn routes(server: Server) -> Router {
    Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{name}", get(model))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completion))
        .route("/metrics", get(metrics))
        .fallback(async || respond(Err(Fault::new(404, "there is nothing at this address"))))
        .method_not_allowed_fallback(async || {
            respond(Err(Fault::new(405, "this address takes another method")))
        })
        .layer(DefaultBodyLimit::max(LARGEST))
        .with_state(Arc::new(server))
}

async fn models(State(server): Shared, headers: HeaderMap) -> Response {
    let listed = looked(server, headers, |server| {
        Ok(protocol::models(&server.names(), &server.problems(), protocol::now()))
    });
    respond(listed.await)
}

async fn model(
    State(server): Shared,
    name: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
) -> Response {
    let Ok(Path(name)) = name else {
        return respond(Err(Fault::unknown_model("there is no such model")));
    };
    let found = looked(server, headers, move |server| {
        match server.names().contains(&name) || name == BASE {
            true => {
                let problem = server.problems().remove(&name);
                Ok(protocol::model(&name, problem.as_deref(), protocol::now()))
            }
            false => Err(Fault::unknown_model(format!("there is no model `{name}`"))),
        }
    });
    respond(found.await)
}

async fn metrics(State(server): Shared, headers: HeaderMap) -> Response {
    let text = looked(server, headers, |server| {
        let queue = server.queue.max_capacity() - server.queue.capacity();
        let [resident, bytes] = server.sets.as_ref().map_or([0; 2], Sets::resident);
        Ok(server.metrics.text(queue, resident, bytes, server.problems().len()))
    });
    match text.await {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response(),
        Err(fault) => respond(Err(fault)),
    }
}

/// The result of the work for a client that has the token. Looking at files takes its time, in which other requests
/// are served.
async fn looked<T: Send + 'static>(
    server: Arc<Server>,
    headers: HeaderMap,
    work: impl FnOnce(&Server) -> Result<T, Fault> + Send + 'static,
) -> Result<T, Fault> {
    server.check(&headers)?;
    let done = tokio::task::spawn_blocking(move || work(&server)).await;
    done.unwrap_or_else(|_| Err(Fault::new(500, "this request made us panic")))
}

async fn chat(server: Shared, headers: HeaderMap, request: extract::Request) -> Response {
    answer(server, headers, request, Kind::Chat).await
}

async fn completion(server: Shared, headers: HeaderMap, request: extract::Request) -> Response {
    answer(server, headers, request, Kind::Completion).await
}

async fn answer(
    State(server): Shared,
    headers: HeaderMap,
    request: extract::Request,
    kind: Kind,
) -> Response {
    let mut log = Log::new(server.clone(), kind);
    let body = match server.check(&headers) {
        Ok(()) => body(request).await,
        Err(fault) => Err(fault),
    };
    // Reading adapters and splitting texts into tokens takes its time, in which other requests are served.
    let prepared = tokio::task::spawn_blocking(move || server.prepare(&body?, kind)).await;
    let prepared = prepared.unwrap_or_else(|_| Err(Fault::new(500, "this request made us panic")));
    let answering = match prepared {
        Ok(answering) => answering,
        Err(fault) => {
            log.end(fault.status, &fault.message);
            return respond(Err(fault));
        }
    };
    log.about = format!(
        "model={:?} adapters={} prompt={}",
        answering.head.model, answering.head.fingerprint, answering.prompt,
    );
    if answering.stream { streamed(answering, log) } else { whole(answering, log).await }
}

/// The body of the request, which may not keep others waiting for ever, nor the end of the server.
async fn body(request: extract::Request) -> Result<Bytes, Fault> {
    let Ok(read) = timeout(PATIENCE, Bytes::from_request(request, &())).await else {
        let message = format!("the body did not arrive within {} s", PATIENCE.as_secs());
        return Err(Fault::new(408, message));
    };
    read.map_err(|error| match error.status() {
        StatusCode::PAYLOAD_TOO_LARGE => {
            Fault::new(413, format!("the body has more than {LARGEST} bytes"))
        }
        status => Fault::new(status.as_u16(), error.body_text()),
    })
}

/// A request that is in the queue.
struct Answering {
    head: Head,
    events: UnboundedReceiver<Event>,
    /// The number of tokens of the prompt.
    prompt: usize,
    stream: bool,
    usage: bool,
}

impl Server {
    /// Fails unless the client has sent the token.
    fn check(&self, headers: &HeaderMap) -> Result<(), Fault> {
        let Some(expected) = &self.token else { return Ok(()) };
        let sent = headers.get(header::AUTHORIZATION).and_then(|it| it.to_str().ok());
        let sent = sent.and_then(|it| it.split_once(' '));
        let sent = sent.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        let sent = sent.map_or("", |(_, token)| token);
        match <[u8; 32]>::from(Sha256::digest(sent)) == *expected {
            true => Ok(()),
            false => Err(Fault::new(401, "a token is needed: `Authorization: Bearer TOKEN`")),
        }
    }

    fn names(&self) -> Vec<String> {
        self.sets.as_ref().map_or(vec![], Sets::names)
    }

    fn problems(&self) -> BTreeMap<String, String> {
        self.sets.as_ref().map_or(BTreeMap::new(), Sets::problems)
    }

    /// Reads a request, and puts it into the queue.
    fn prepare(&self, body: &[u8], kind: Kind) -> Result<Answering, Fault> {
        let asked = Instant::now();
        let request = Request::parse(kind, body)?;
        let set = match (&*request.model, &self.sets) {
            (BASE, _) => None,
            (name, Some(sets)) => Some(sets.get(name).map_err(|error| match error {
                LoraError::UnknownAdapters { .. } => Fault::unknown_model(error.to_string()),
                // Not one of the server's own: clients repeat those.
                error => Fault::new(422, error.to_string()),
            })?),
            (name, None) => {
                return Err(Fault::unknown_model(format!("there is no model `{name}`")));
            }
        };
        let alone = set.as_ref().zip(self.sets.as_ref());
        if let Some(problem) = alone.and_then(|(set, sets)| sets.only_alone(set)) {
            return Err(Fault::new(422, problem));
        }
        let refused = |message: String| Fault::new(400, message);
        let prompt = match request.input {
            Input::Messages(messages) => {
                let text = self.chat.render(&messages, true).map_err(refused)?;
                self.chat.encode(&text, false).map_err(refused)?
            }
            Input::Text(text) => self.chat.encode(&text, true).map_err(refused)?,
        };
        if prompt.iter().any(|&id| id as usize >= self.vocab_size) {
            return Err(refused("the prompt has a token that the model does not know".to_owned()));
        }
        let room = self.max_length.saturating_sub(prompt.len());
        if prompt.is_empty() || room == 0 {
            let message = format!(
                "the prompt has {} tokens, and the model reads from 1 to {}",
                prompt.len(),
                self.max_length.saturating_sub(1),
            );
            return Err(Fault {
                code: Some("context_length_exceeded"),
                ..Fault::new(400, message)
            });
        }
        let limit = request.limit.unwrap_or(self.limit).min(self.limit).min(room);
        let (answer, events) = mpsc::unbounded_channel();
        let fingerprint = set.as_ref().map_or("none".to_owned(), |set| set.fingerprint.clone());
        let random = rand::random::<u64>();
        let head = Head {
            kind,
            id: format!("{}-{random:016x}", if kind == Kind::Chat { "chatcmpl" } else { "cmpl" }),
            model: request.model,
            fingerprint,
            created: protocol::now(),
        };
        let tokens = prompt.len();
        let seed = request.seed.unwrap_or(random);
        let (sampling, stops) = (request.sampling, request.stops);
        let continues = kind != Kind::Chat;
        let job = Job { set, prompt, continues, limit, sampling, seed, asked, stops, answer };
        self.queue.try_send(job).map_err(|error| match error {
            TrySendError::Full(_) => Fault::new(429, "too many requests wait; try again later"),
            TrySendError::Closed(_) => Fault::new(503, "the server is about to end"),
        })?;
        let (stream, usage) = (request.stream, request.usage);
        Ok(Answering { head, events, prompt: tokens, stream, usage })
    }
}

/// The answer in one piece.
async fn whole(mut answering: Answering, mut log: Log) -> Response {
    let mut text = String::new();
    loop {
        match answering.events.recv().await {
            Some(Event::Text(piece)) => text.push_str(&piece),
            Some(Event::End { cut, tokens }) => {
                log.end(200, &format!("new={tokens}"));
                let usage = usage(answering.prompt, tokens);
                return respond(Ok(answering.head.answer(&text, reason(cut), usage)));
            }
            event => {
                let fault = Fault::new(500, failure(event));
                log.end(500, &fault.message);
                return respond(Err(fault));
            }
        }
    }
}

/// The answer as a stream of server-sent events.
fn streamed(answering: Answering, log: Log) -> Response {
    let Answering { head, events, prompt, usage: with_usage, .. } = answering;
    let first = (head.kind == Kind::Chat).then(|| head.piece(None, None).to_string());
    let first = stream::iter(first.map(as_event));
    let rest = stream::unfold((events, log, false), move |(mut events, mut log, ended)| {
        let head = head.clone();
        async move {
            if ended {
                return None;
            }
            let (pieces, ended) = match events.recv().await {
                Some(Event::Text(piece)) => (vec![head.piece(Some(&piece), None)], false),
                Some(Event::End { cut, tokens }) => {
                    log.end(200, &format!("new={tokens}"));
                    let mut pieces = vec![head.piece(None, Some(reason(cut)))];
                    if with_usage {
                        pieces.push(head.numbers(usage(prompt, tokens)));
                    }
                    (pieces, true)
                }
                event => {
                    let fault = Fault::new(500, failure(event));
                    log.end(500, &fault.message);
                    (vec![fault.json()], true)
                }
            };
            let mut pieces: Vec<_> = pieces.iter().map(Value::to_string).collect();
            if ended {
                pieces.push("[DONE]".to_owned());
            }
            let pieces: Vec<_> = pieces.into_iter().map(as_event).collect();
            Some((stream::iter(pieces), (events, log, ended)))
        }
    });
    let all = stream::StreamExt::chain(first, stream::StreamExt::flatten(rest));
    Sse::new(all).keep_alive(KeepAlive::new().interval(Duration::from_secs(10))).into_response()
}

fn as_event(data: String) -> Result<sse::Event, Infallible> {
    Ok(sse::Event::default().data(data))
}

fn reason(cut: bool) -> &'static str {
    if cut { "length" } else { "stop" }
}

fn failure(event: Option<Event>) -> String {
    match event {
        Some(Event::Failed(problem)) => problem,
        _ => "the answer broke off".to_owned(),
    }
}

fn respond(result: Result<Value, Fault>) -> Response {
    let (status, json) = match result {
        Ok(json) => (200, json),
        Err(fault) => (fault.status, fault.json()),
    };
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (status, axum::Json(json)).into_response()
}

/// The line of a request in the log. A request that is dropped before its end was given up by its client.
struct Log {
    server: Arc<Server>,
    kind: Kind,
    start: Instant,
    about: String,
    ended: bool,
}

impl Log {
    fn new(server: Arc<Server>, kind: Kind) -> Self {
        server.metrics.requests.add(1);
        Self { server, kind, start: Instant::now(), about: String::new(), ended: false }
    }

    fn end(&mut self, status: u16, what: &str) {
        self.ended = true;
        if status >= 400 && status != GONE {
            self.server.metrics.errors.add(1);
        }
        let kind = if self.kind == Kind::Chat { "chat" } else { "completion" };
        let seconds = self.start.elapsed().as_secs_f64();
        let about = if self.about.is_empty() { String::new() } else { format!(" {}", self.about) };
        // One line, whatever a message has in it.
        let what = what.escape_debug();
        eprintln!("{kind} status={status}{about} {what} seconds={seconds:.3}");
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        if !self.ended {
            self.server.metrics.abandoned.add(1);
            self.end(GONE, "the client went away");
        }
    }
}
