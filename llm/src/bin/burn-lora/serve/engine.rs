//! Answers many requests at once: each step adds a token to every text that is under way. A finished text
//! leaves, and the next request takes its place.

use std::{
    collections::BTreeSet,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Instant,
};

use burn::tensor::{Int, Tensor, TensorData};
use burn_lora::serve::{MixedBatch, MultiLora, StoredAdapters};
use burn_lora_llm::{
    Result,
    chat::Chat,
    generate::Sampling,
    llama::{Cache, Llama},
};

use super::{metrics::Metrics, text::Growing};
use crate::backend::Plain;
use rand::{SeedableRng, rngs::StdRng};
use tokio::sync::mpsc::{Receiver, UnboundedSender};

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
    /// The name of its adapters in the engine.
    set: Option<String>,
    /// The token that was chosen last, and that the model has not read yet.
    next: u32,
    text: Growing,
    limit: usize,
    sampling: Sampling,
    rng: StdRng,
    answer: UnboundedSender<Event>,
}

pub struct Engine {
    models: MultiLora<Plain, Llama<Plain>>,
    chat: Arc<Chat>,
    /// The greatest number of texts that are under way at once.
    batch: usize,
    metrics: Arc<Metrics>,
    /// Sorted by their adapters.
    rows: Vec<Row>,
    /// The keys and values of the rows; `None` if there are none.
    cache: Option<Cache<Plain>>,
    /// The model for the rows; `None` if they have changed.
    model: Option<MixedBatch<Llama<Plain>>>,
}

impl Engine {
    pub fn new(
        llama: Llama<Plain>,
        chat: Arc<Chat>,
        batch: usize,
        metrics: Arc<Metrics>,
    ) -> Result<Self> {
        let models = MultiLora::new(llama).map_err(|error| error.to_string())?;
        Ok(Self { models, chat, batch, metrics, rows: Vec::new(), cache: None, model: None })
    }

    /// Answers until the queue is closed and empty.
    pub fn run(mut self, mut jobs: Receiver<Job>) {
        loop {
            // Reads one prompt between two steps, so that those who are being answered wait for one at most.
            let job = match self.rows.len() {
                0 => match jobs.blocking_recv() {
                    Some(job) => Some(job),
                    None => return,
                },
                rows if rows < self.batch => waiting(&mut jobs),
                _ => None,
            };
            if let Some(job) = job.filter(|job| !job.answer.is_closed()) {
                let answer = job.answer.clone();
                if let Err(problem) = caught(|| self.begin(job)) {
                    let _ = answer.send(Event::Failed(problem));
                }
            }
            if !self.rows.is_empty()
                && let Err(problem) = caught(|| self.step())
            {
                for row in self.rows.drain(..) {
                    let _ = row.answer.send(Event::Failed(problem.clone()));
                }
                self.keep(&[]);
            }
            self.metrics.batch(self.rows.len());
        }
    }

    /// Reads the prompt, and chooses the first token.
    fn begin(&mut self, job: Job) -> Result<()> {
        // The same bits have the same name, whatever their directory holds by now.
        let set = job.set.map(|set| {
            let name = format!("{} {}", set.name, set.fingerprint);
            let known = self.models.names().any(|it| it == name);
            let added = if known { Ok(()) } else { self.models.insert(&*name, &set.adapters) };
            added.map(|()| name).map_err(|error| error.to_string())
        });
        let set = set.transpose()?;
        let model = self.models.batch(&[set.as_deref()]).map_err(|error| error.to_string())?;
        let mut cache = model.model().cache();
        let scores = read(model.model(), &[&job.prompt], &mut cache);
        self.metrics.prompt_tokens.add(job.prompt.len());
        let text = match job.continues {
            true => Growing::after(&job.prompt, job.stops, &self.chat)?,
            false => Growing::new(job.stops),
        };
        let mut row = Row {
            set,
            next: 0,
            text,
            limit: job.limit,
            sampling: job.sampling,
            rng: StdRng::seed_from_u64(job.seed),
            answer: job.answer,
        };
        if !row.take(&scores[0], &self.chat, &self.metrics)? {
            self.drop_unused();
            return Ok(());
        }
        let caches: Vec<_> = self.cache.take().into_iter().chain([cache]).collect();
        self.cache = Some(Cache::join(&caches));
        self.rows.push(row);
        let mut order: Vec<_> = (0..self.rows.len()).collect();
        order.sort_by(|&a, &b| self.rows[a].set.cmp(&self.rows[b].set));
        self.keep(&order);
        Ok(())
    }

    /// Adds a token to every text.
    fn step(&mut self) -> Result<()> {
        let start = Instant::now();
        let model = match self.model.take() {
            Some(model) => model,
            None => {
                let sets: Vec<_> = self.rows.iter().map(|row| row.set.as_deref()).collect();
                self.models.batch(&sets).map_err(|error| error.to_string())?
            }
        };
        // A panic from here on leaves the cache behind, which is then dropped with all rows.
        let next: Vec<_> = self.rows.iter().map(|row| [row.next]).collect();
        let next: Vec<_> = next.iter().map(|it| &it[..]).collect();
        let cache = self.cache.as_mut().expect("there are rows");
        let scores = read(model.model(), &next, cache);
        self.model = Some(model);
        let mut left = Vec::new();
        for (index, (row, scores)) in self.rows.iter_mut().zip(&scores).enumerate() {
            if row.take(scores, &self.chat, &self.metrics)? {
                left.push(index);
            }
        }
        self.metrics.step(scores.len(), start.elapsed());
        if left.len() < self.rows.len() {
            self.keep(&left);
        }
        Ok(())
    }

    /// Keeps these rows, in this order.
    fn keep(&mut self, rows: &[usize]) {
        let mut all: Vec<_> = std::mem::take(&mut self.rows).into_iter().map(Some).collect();
        self.rows = rows.iter().filter_map(|&row| all[row].take()).collect();
        self.cache = self.cache.take().filter(|_| !rows.is_empty()).map(|it| it.select(rows));
        self.model = None;
        self.drop_unused();
    }

    /// Drops the adapters that no text uses. The store may keep them.
    fn drop_unused(&mut self) {
        let used: BTreeSet<_> = self.rows.iter().filter_map(|row| row.set.as_deref()).collect();
        let unused = self.models.names().filter(|name| !used.contains(name));
        let unused: Vec<_> = unused.map(str::to_owned).collect();
        for name in unused {
            self.models.remove(&name);
        }
    }
}

/// The next request in the queue that somebody still waits for.
fn waiting(jobs: &mut Receiver<Job>) -> Option<Job> {
    std::iter::from_fn(|| jobs.try_recv().ok()).find(|job| !job.answer.is_closed())
}

/// The result of the work. A panic is an error of the requests that it was for, and of no others.
fn caught(work: impl FnOnce() -> Result<()>) -> Result<()> {
    let panicked =
        |_| Err("the engine has panicked; its message is in the server's log".to_owned());
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(panicked)
}

impl Row {
    /// Takes the next token, of these scores. Returns whether the text goes on.
    fn take(&mut self, scores: &[f64], chat: &Chat, metrics: &Metrics) -> Result<bool> {
        let id = self.sampling.choose(scores, &mut self.rng);
        let stops = chat.stops(id);
        let mut is_end = stops;
        if !stops {
            self.next = id;
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
            return Ok(false);
        }
        Ok(taken && !self.answer.is_closed())
    }
}

/// The scores of the token after the last of each text: rows of the vocabulary's size.
fn read(llama: &Llama<Plain>, texts: &[&[u32]], cache: &mut Cache<Plain>) -> Vec<Vec<f64>> {
    let ids: Vec<_> = texts.iter().flat_map(|ids| ids.iter().map(|&id| id as i32)).collect();
    let ids = TensorData::new(ids, [texts.len(), texts[0].len()]);
    let scores = llama.read(Tensor::<Plain, 2, Int>::from_data(ids, &Default::default()), cache);
    let size = scores.dims()[1];
    let scores: Vec<f64> = scores.into_data().iter().collect();
    scores.chunks(size).map(<[f64]>::to_vec).collect()
}
