//! What training makes small: how much the next tokens surprise the model.

use burn::tensor::{Tensor, activation::log_softmax, backend::Backend};

use crate::{
    data::{Batch, Text},
    llama::Llama,
};

/// The sum over all targets of minus the logarithm of the probability that the model gives them: `[1]`.
pub fn surprise<B: Backend>(llama: &Llama<B>, batch: Batch<B>) -> Tensor<B, 1> {
    let hidden = llama.hidden(batch.ids, &batch.places);
    let [rows, length, width] = hidden.dims();
    // The head is as wide as there are tokens, so it reads only what is needed.
    let hidden = hidden.reshape([rows * length, width]).select(0, batch.at);
    let scores = llama.logits(hidden.unsqueeze()).squeeze_dim::<2>(0);
    log_softmax(scores, 1).gather(1, batch.targets).sum().neg()
}

/// The mean surprise per target. Its exponential is the perplexity.
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
        let surprise = surprise(llama, Batch::new(llama, &rows, device));
        sum += surprise.into_data().iter::<f64>().sum::<f64>();
    }
    let targets: usize = texts.iter().map(Text::targets).sum();
    sum / targets as f64
}
