//! Answers many requests at once: each step adds a token to every text that is under way. A finished text
//! leaves, and the next request takes its place.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

use burn_lora::serve::StoredAdapters;
use burn_lora_llm::{
    Result,
    chat::Chat,
    generate::Sampling,
    llama::Llama,
    texts::{PART, Reading, TextId, Texts},
};

use super::{metrics::Metrics, text::Growing};
use crate::backend::Plain;
use rand::{SeedableRng, rngs::StdRng};
use tokio::sync::mpsc::{Receiver, UnboundedSender};

/// For how long a part of a prompt may keep those waiting who are being answered.
const PAUSE: Duration = Duration::from_millis(40);

/// The seconds that a token of a prompt takes, until one is read.
const FIRST_PACE: f64 = 1.0 / 500.0;

/// The least tokens of a prompt that are read at once. Others are multiples: they fill whole vectors.
const LEAST: usize = 16;

/// What is asked for.
pub struct Job {
    /// The adapters; `None` for the base alone.
    pub set: Option<Arc<StoredAdapters<Plain>>>,
    pub prompt: Vec<u32>,
    /// Whether the answer goes on with the text of the prompt, and is not a text of its own.
    pub continues: bool,
    /// The greatest number of new tokens.
    pub limit: usize,
    pub sampling: Sampling,
    pub seed: u64,
    /// When the request came.
    pub asked: Instant,
    /// Texts at which the answer ends.
    pub stops: Vec<String>,
    /// Where the answer goes, piece by piece. If nobody takes it any more, the text is given up.
    pub answer: UnboundedSender<Event>,
}

/// A part of an answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    Text(String),
    /// The answer is complete.
    End {
        /// Whether the greatest number of tokens was reached.
        cut: bool,
        /// The number of new tokens.
        tokens: usize,
    },
    Failed(String),
}

/// One text that is under way.
struct Row {
    id: TextId,
    text: Growing,
    limit: usize,
    sampling: Sampling,
    rng: StdRng,
    answer: UnboundedSender<Event>,
    /// When the request came, or the last token was handed out.
    last: Instant,
}

pub struct Engine {
    texts: Texts<Plain>,
    chat: Arc<Chat>,
    /// The greatest number of texts that are under way at once.
    batch: usize,
    metrics: Arc<Metrics>,
    rows: Vec<Row>,
    /// The fingerprints of the sets that were last asked for, by their names.
    sets: BTreeMap<String, String>,
    /// The seconds that a token of a prompt took lately, and that a step without any took.
    pace: f64,
    without: f64,
}

impl Engine {
    pub fn new(
        llama: Llama<Plain>,
        reading: Reading,
        chat: Arc<Chat>,
        batch: usize,
        metrics: Arc<Metrics>,
    ) -> Result<Self> {
        let texts = Texts::new(llama, reading).map_err(|error| error.to_string())?;
        let (rows, sets) = Default::default();
        Ok(Self { texts, chat, batch, metrics, rows, sets, pace: FIRST_PACE, without: 0.0 })
    }

    /// Answers until the queue is closed and empty.
    pub fn run(mut self, mut jobs: Receiver<Job>) {
        loop {
            if self.rows.is_empty() {
                match jobs.blocking_recv() {
                    Some(job) => self.take(job),
                    None => return,
                }
            }
            while self.rows.len() < self.batch {
                let Some(job) = waiting(&mut jobs) else { break };
                self.take(job);
            }
            if !self.rows.is_empty()
                && let Err(problem) = caught(|| self.step())
            {
                for row in self.rows.drain(..) {
                    let _ = row.answer.send(Event::Failed(problem.clone()));
                }
                let clear = || {
                    self.texts.clear();
                    Ok(())
                };
                if let Err(problem) = caught(clear) {
                    eprintln!("error: {problem}");
                }
            }
            self.metrics.batch(self.rows.len());
        }
    }

    /// Begins to answer.
    fn take(&mut self, job: Job) {
        if job.answer.is_closed() {
            return;
        }
        let answer = job.answer.clone();
        if let Err(problem) = caught(|| self.begin(job)) {
            let _ = answer.send(Event::Failed(problem));
        }
    }

    fn begin(&mut self, job: Job) -> Result<()> {
        // The same bits have the same name, whatever their directory holds by now.
        let key = |name: &str, fingerprint: &str| format!("{name} {fingerprint}");
        let set = match job.set {
            None => None,
            Some(set) => {
                let now = set.fingerprint.clone();
                let before = self.sets.insert(set.name.clone(), now);
                if let Some(before) = before.filter(|it| *it != set.fingerprint) {
                    self.texts.forget(&key(&set.name, &before));
                }
                let name = key(&set.name, &set.fingerprint);
                self.texts.insert(&name, &set.adapters).map_err(|error| error.to_string())?;
                Some(name)
            }
        };
        let text = match job.continues {
            true => Growing::after(&job.prompt, job.stops, &self.chat)?,
            false => Growing::new(job.stops),
        };
        self.rows.push(Row {
            id: self.texts.begin(set.as_deref(), job.prompt),
            text,
            limit: job.limit,
            sampling: job.sampling,
            rng: StdRng::seed_from_u64(job.seed),
            answer: job.answer,
            last: job.asked,
        });
        Ok(())
    }

    /// Reads parts of prompts, and adds a token to every text that was read.
    fn step(&mut self) -> Result<()> {
        let (start, before) = (Instant::now(), self.texts.counts());
        let answering = self.rows.iter().filter(|it| it.text.tokens() > 0).count();
        let part = match answering {
            0 => PART,
            _ => {
                let tokens = (PAUSE.as_secs_f64() / self.pace) as usize;
                (tokens / LEAST * LEAST).clamp(LEAST, PART)
            }
        };
        let scores = self.texts.step(part).map_err(|error| error.to_string())?;
        let counts = self.texts.counts();
        let read = counts.read - before.read;
        self.metrics.prompt_tokens.add(read);
        self.metrics.reused_tokens.add(counts.reused - before.reused);
        let spent = start.elapsed().as_secs_f64();
        match read {
            0 => self.without = spent,
            // Noise must not let it come out as nothing.
            _ if read >= LEAST => self.pace = (spent - self.without).max(spent / 4.0) / read as f64,
            _ => {}
        }
        let count = scores.len();
        for (id, scores) in scores {
            let place = self.rows.iter().position(|it| it.id == id).expect("it is under way");
            let row = &mut self.rows[place];
            match row.take(&scores, &self.chat, &self.metrics)? {
                Some(token) => self.texts.push(id, token),
                None => {
                    self.rows.remove(place);
                    self.texts.end(id);
                }
            }
        }
        // Those that nobody waits for any more, before their prompts are read to the end.
        for gone in self.rows.extract_if(.., |it| it.answer.is_closed()) {
            self.texts.end(gone.id);
        }
        self.metrics.step(count, start.elapsed());
        Ok(())
    }
}

/// The next request in the queue that somebody still waits for.
fn waiting(jobs: &mut Receiver<Job>) -> Option<Job> {
    std::iter::from_fn(|| jobs.try_recv().ok()).find(|job| !job.answer.is_closed())
}

/// The result of the work. A panic is an error of the requests that it was for: all texts that are under way, if it was a step.
fn caught(work: impl FnOnce() -> Result<()>) -> Result<()> {
    let panicked =
        |_| Err("the engine has panicked; its message is in the server's log".to_owned());
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(panicked)
}

impl Row {
    /// Takes the next token, of these scores. Returns it if the text goes on.
    fn take(&mut self, scores: &[f32], chat: &Chat, metrics: &Metrics) -> Result<Option<u32>> {
        let id = self.sampling.choose(scores, &mut self.rng);
        let stops = chat.stops(id);
        let mut is_end = stops;
        if !stops {
            let times = if self.text.tokens() == 0 { &metrics.first } else { &metrics.next };
            times.note(self.last.elapsed());
            self.last = Instant::now();
            metrics.new_tokens.add(1);
            is_end = self.text.push(id, chat)?;
        }
        let cut = !is_end && self.text.tokens() >= self.limit;
        let piece = if is_end || cut { self.text.rest() } else { self.text.piece() };
        let mut taken = true;
        if !piece.is_empty() {
            taken = self.answer.send(Event::Text(piece)).is_ok();
        }
        if is_end || cut {
            let _ = self.answer.send(Event::End { cut, tokens: self.text.tokens() });
            return Ok(None);
        }
        Ok((taken && !self.answer.is_closed()).then_some(id))
    }
}
