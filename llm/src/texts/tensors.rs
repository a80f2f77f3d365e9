//! Texts on any backend.

use burn::tensor::{Int, Tensor, TensorData, backend::Backend};
use burn_lora::{
    LoraError,
    serve::{MixedBatch, MultiLora},
};

use super::{Counts, Scores, TextId};
use crate::llama::{Cache, Llama};

/// Texts whose keys and values are in one cache.
#[derive(Debug)]
pub(super) struct TensorTexts<B: Backend> {
    waiting: Vec<Waiting>,
    /// Sorted by their sets.
    rows: Vec<Row>,
    /// The keys and values of the rows; `None` if there are none.
    cache: Option<Cache<B>>,
    /// The model for the rows; `None` if they have changed.
    model: Option<MixedBatch<Llama<B>>>,
    pub counts: Counts,
}

/// A text that was not read.
#[derive(Debug)]
struct Waiting {
    id: TextId,
    set: Option<String>,
    prompt: Vec<u32>,
}

/// A text whose prompt was read.
#[derive(Debug)]
struct Row {
    id: TextId,
    set: Option<String>,
    /// The token that was chosen last, and was not read.
    next: Option<u32>,
}

impl<B: Backend> Default for TensorTexts<B> {
    fn default() -> Self {
        let (waiting, rows, counts) = Default::default();
        Self { waiting, rows, cache: None, model: None, counts }
    }
}

impl<B: Backend> TensorTexts<B> {
    pub fn begin(&mut self, id: TextId, set: Option<String>, prompt: Vec<u32>) {
        self.waiting.push(Waiting { id, set, prompt });
    }

    pub fn push(&mut self, id: TextId, token: u32) {
        let row = self.rows.iter_mut().find(|it| it.id == id);
        row.expect("the text was read to its end").next = Some(token);
    }

    pub fn end(&mut self, id: TextId) {
        self.waiting.retain(|it| it.id != id);
        let left: Vec<_> = (0..self.rows.len()).filter(|&row| self.rows[row].id != id).collect();
        if left.len() < self.rows.len() {
            self.keep(&left);
        }
    }

    /// Drops all texts, without any work on the device.
    pub fn clear(&mut self) {
        self.waiting.clear();
        self.rows.clear();
        (self.cache, self.model) = (None, None);
    }

    pub fn uses(&self, set: &str) -> bool {
        let waiting = self.waiting.iter().map(|it| &it.set);
        waiting.chain(self.rows.iter().map(|it| &it.set)).any(|it| it.as_deref() == Some(set))
    }

    pub fn step(&mut self, models: &MultiLora<B, Llama<B>>) -> Result<Scores, LoraError> {
        let mut all = self.read_on(models)?;
        // One prompt, so that those who are being answered wait for one at most.
        if !self.waiting.is_empty() {
            let Waiting { id, set, prompt } = self.waiting.remove(0);
            let model = models.batch(&[set.as_deref()])?;
            let mut cache = model.model().cache();
            let scores = read(model.model(), &[&prompt], &mut cache).swap_remove(0);
            self.counts.read += prompt.len();
            let caches: Vec<_> = self.cache.take().into_iter().chain([cache]).collect();
            self.cache = Some(Cache::join(&caches));
            self.rows.push(Row { id, set, next: None });
            let mut order: Vec<_> = (0..self.rows.len()).collect();
            order.sort_by(|&a, &b| self.rows[a].set.cmp(&self.rows[b].set));
            self.keep(&order);
            all.push((id, scores));
        }
        Ok(all)
    }

    /// Reads a token of every text, once all have one.
    fn read_on(&mut self, models: &MultiLora<B, Llama<B>>) -> Result<Scores, LoraError> {
        let next: Option<Vec<_>> = self.rows.iter().map(|row| row.next.map(|it| [it])).collect();
        let Some(next) = next.filter(|it| !it.is_empty()) else { return Ok(Vec::new()) };
        let model = match self.model.take() {
            Some(model) => model,
            None => {
                let sets: Vec<_> = self.rows.iter().map(|row| row.set.as_deref()).collect();
                models.batch(&sets)?
            }
        };
        let next: Vec<_> = next.iter().map(|it| &it[..]).collect();
        let cache = self.cache.as_mut().expect("there are rows");
        let scores = read(model.model(), &next, cache);
        self.model = Some(model);
        let rows = self.rows.iter_mut().zip(scores);
        let rows = rows.map(|(row, scores)| {
            row.next = None;
            (row.id, scores)
        });
        Ok(rows.collect())
    }

    /// Keeps these rows, in this order.
    fn keep(&mut self, rows: &[usize]) {
        let mut all: Vec<_> = std::mem::take(&mut self.rows).into_iter().map(Some).collect();
        self.rows = rows.iter().filter_map(|&row| all[row].take()).collect();
        self.cache = self.cache.take().filter(|_| !rows.is_empty()).map(|it| it.select(rows));
        self.model = None;
    }
}

/// The scores of the token after the last of each text: rows of the vocabulary's size.
pub(super) fn read<B: Backend>(
    llama: &Llama<B>,
    texts: &[&[u32]],
    cache: &mut Cache<B>,
) -> Vec<Vec<f32>> {
    let ids: Vec<_> = texts.iter().flat_map(|ids| ids.iter().map(|&id| id as i32)).collect();
    let ids = TensorData::new(ids, [texts.len(), texts[0].len()]);
    let scores = llama.read(Tensor::<B, 2, Int>::from_data(ids, &Default::default()), cache);
    let size = scores.dims()[1];
    let scores: Vec<f32> = scores.into_data().iter().collect();
    scores.chunks(size).map(<[f32]>::to_vec).collect()
}
