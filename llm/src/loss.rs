//! What training minimizes: the cross-entropy of the next tokens.

use burn::{
    module::{AutodiffModule, Module},
    tensor::{
        Int, Tensor,
        backend::{AutodiffBackend, Backend},
    },
};
use burn_lora::{
    Lora,
    train::{Backward, Blocks, segments},
};

use crate::{
    data::{Batch, Text},
    llama::{HostLlama, Llama, Step},
};

/// The sum over all targets of minus the logarithm of the probability that the model gives them: `[1]`.
pub fn cross_entropy<B: Backend>(llama: &Llama<B>, batch: Batch<B>) -> Tensor<B, 1> {
    let hidden = llama.hidden(batch.ids, &batch.positions);
    cross_entropy_at(llama, hidden, batch.at, batch.targets)
}

/// The same from the output of the last layer.
fn cross_entropy_at<B: Backend>(
    llama: &Llama<B>,
    hidden: Tensor<B, 3>,
    at: Tensor<B, 1, Int>,
    targets: Tensor<B, 1, Int>,
) -> Tensor<B, 1> {
    let [rows, length, width] = hidden.dims();
    // The head is as wide as there are tokens, so it reads only what is needed.
    let hidden = hidden.reshape([rows * length, width]).select(0, at);
    llama.cross_entropy(hidden, targets)
}

/// The gradients of the cross-entropy of some rows, summed over all targets. `segmented` computes each layer again
/// in the backward pass, to need less memory (gradient checkpointing).
pub fn gradients<B: AutodiffBackend>(
    model: &Lora<B, Llama<B>>,
    rows: &[Vec<&Text>],
    segmented: bool,
) -> Backward
where
    Llama<B>: AutodiffModule<B, InnerModule = Llama<B::InnerBackend>>,
{
    if segmented {
        return segments(model, rows);
    }
    let device = model.devices().into_iter().next().unwrap_or_default();
    Backward::new(model, cross_entropy(model, Batch::new(model, rows, &device)))
}

/// About how many scores the head gives at once: 16 MiB, beside which a step in segments holds little more.
const SCORES: usize = 1 << 22;

/// How many of so many targets are scored at once.
fn chunk<B: Backend>(llama: &Llama<B>, targets: usize) -> usize {
    let parts = (targets * llama.vocab_size()).div_ceil(SCORES).max(1);
    targets.div_ceil(parts).max(1)
}

impl<B: Backend> Blocks<B, 3, [Vec<&Text>]> for Llama<B> {
    type Context = Batch<B>;

    fn blocks(&self) -> usize {
        self.depth()
    }

    fn context(&self, rows: &[Vec<&Text>], device: &B::Device) -> Batch<B> {
        Batch::new(self, rows, device)
    }

    fn begin(&self, batch: &Batch<B>) -> Tensor<B, 3> {
        self.embed(batch.ids.clone())
    }

    fn block(&self, index: usize, x: Tensor<B, 3>, batch: &Batch<B>) -> Tensor<B, 3> {
        self.layer(index, x, &batch.positions)
    }

    fn parts(&self, batch: &Batch<B>) -> usize {
        let targets = batch.at.dims()[0];
        targets.div_ceil(chunk(self, targets))
    }

    fn loss(&self, part: usize, x: Tensor<B, 3>, batch: &Batch<B>) -> Tensor<B, 1> {
        let targets = batch.at.dims()[0];
        let chunk = chunk(self, targets);
        let start = part * chunk;
        let count = chunk.min(targets - start);
        let (at, targets) = (batch.at.clone(), batch.targets.clone());
        cross_entropy_at(self, x, at.narrow(0, start, count), targets.narrow(0, start, count))
    }
}

/// The mean cross-entropy per target. Its exponential is the perplexity.
pub fn evaluate<B: Backend>(
    llama: &Llama<B>,
    texts: &[Text],
    batch: usize,
    device: &B::Device,
) -> f64 {
    // Texts of about the same length need little filling.
    let mut sorted: Vec<_> = texts.iter().collect();
    sorted.sort_by_key(|text| std::cmp::Reverse(text.ids.len()));
    let mut sum = 0.0;
    for texts in sorted.chunks(batch) {
        let rows: Vec<_> = texts.iter().map(|&text| vec![text]).collect();
        let batch = Batch::new(llama, &rows, device);
        let hidden = llama.hidden(batch.ids.clone(), &batch.positions);
        // In parts, because the scores of all words at all positions would be the largest tensor by far.
        for part in 0..llama.parts(&batch) {
            let cross_entropy = llama.loss(part, hidden.clone(), &batch);
            sum += cross_entropy.into_data().iter::<f64>().sum::<f64>();
        }
    }
    let targets: usize = texts.iter().map(Text::targets).sum();
    sum / targets as f64
}

/// The same by a [`HostLlama`], token by token as answers are computed, so many texts at once. `None` where there is none.
///
/// # Panics
///
/// If `batch` is 0.
pub fn evaluate_answers<B: Backend>(
    llama: &Llama<B>,
    texts: &[Text],
    batch: usize,
    exact: bool,
) -> Option<f64> {
    let mut llama = HostLlama::of(llama, exact)?;
    let mut sum = 0.0;
    for texts in texts.chunks(batch) {
        let begin = |it: &Text| llama.text(it.ids[..it.given.max(1)].to_vec());
        let mut running: Vec<_> = texts.iter().map(|it| (begin(it), &*it.ids)).collect();
        running.retain(|(text, ids)| text.ids().len() < ids.len());
        while !running.is_empty() {
            let next: Vec<_> = running.iter().map(|(text, ids)| ids[text.ids().len()]).collect();
            let steps = running.iter_mut();
            let steps = steps.map(|(text, _)| Step { text, set: None, tokens: usize::MAX });
            for (scores, next) in llama.read(steps.collect()).into_iter().zip(&next) {
                let scores = scores.expect("all of the text was read");
                sum += cross_entropy_of(scores, *next as usize);
            }
            running.iter_mut().zip(next).for_each(|((text, _), next)| text.push(next));
            // Nothing comes after the last token.
            running.retain(|(text, ids)| text.ids().len() < ids.len());
        }
    }
    let targets: usize = texts.iter().map(Text::targets).sum();
    Some(sum / targets as f64)
}

/// The cross-entropy of a token.
fn cross_entropy_of(scores: &[f32], token: usize) -> f64 {
    let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = scores.iter().map(|it| f64::from(it - top).exp()).sum();
    total.ln() - f64::from(scores[token] - top)
}
