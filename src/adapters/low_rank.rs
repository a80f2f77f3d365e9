//! The best approximation of a given rank, of adapters of a higher rank and of fully trained weights.

use std::collections::BTreeMap;

use burn::{
    module::Param,
    tensor::{Tensor, backend::Backend},
};

use super::LoraAdapters;
use crate::{
    adapter::LoraAdapter,
    config::Scaling,
    decomposition::{Svd, sum_of_squares},
};

/// Adapters that approximate updates of a higher rank.
#[derive(Clone, Debug)]
pub struct Approximation<B: Backend> {
    /// The adapters.
    pub adapters: LoraAdapters<B>,
    /// The share of each layer's update that is kept, from 0 to 1, by the paths in `adapters`. It is a
    /// share of the sum of the update's squared elements. The relative error of the update, in the
    /// Frobenius norm, is `√(1 - kept)`.
    pub kept: BTreeMap<String, f64>,
}

impl<B: Backend> LoraAdapters<B> {
    /// The best approximation of the updates by adapters of at most `rank`. The dense updates are
    /// never formed. The factors are decomposed by QR, which leaves a matrix whose sides are at most the
    /// old rank.
    ///
    /// Biases, magnitudes, and parameters that were trained in full, stay as they are.
    ///
    /// # Panics
    ///
    /// If the rank is 0, or an adapter holds NaN or infinite values.
    pub fn truncate(&self, rank: usize) -> Approximation<B> {
        assert!(rank > 0, "the rank must be at least 1, got 0");
        let mut adapters = self.clone();
        let mut kept = BTreeMap::new();
        for (path, adapter) in &mut adapters.adapters {
            let (truncated, share) = truncate(adapter, rank);
            kept.insert(path.clone(), share);
            **adapter = truncated;
        }
        Approximation { adapters, kept }
    }
}

/// The best adapter of at most `rank`, and the share that it keeps.
pub(super) fn truncate<B: Backend>(adapter: &LoraAdapter<B>, rank: usize) -> (LoraAdapter<B>, f64) {
    let [a, b] = adapter.constant_factors();
    let svd = Svd::of_product(a, b, adapter.scale());
    let truncated = LoraAdapter {
        bias: adapter.bias_delta().map(|bias| Param::from_tensor(bias.detach())),
        dropout: adapter.dropout.clone(),
        magnitude: adapter.magnitude.clone(),
        layout: adapter.layout.clone(),
        tie: adapter.tie,
        ..of(&svd, rank, &adapter.a.device())
    };
    (truncated, svd.kept(rank, svd.total()))
}

/// The best adapter of `rank` for the update `delta: [d_input, d_output]`, and the share that it
/// keeps.
pub(crate) fn extract<B: Backend>(delta: Tensor<B, 2>, rank: usize) -> (LoraAdapter<B>, f64) {
    /// Directions beyond the rank, and rounds. With these numbers the result is nearly exact.
    const SPARE: usize = 10;
    const ROUNDS: usize = 8;

    let device = delta.device();
    let total = sum_of_squares(delta.clone());
    let svd = Svd::leading(delta, rank, SPARE, ROUNDS);
    (of(&svd, rank, &device), svd.kept(rank, total))
}

/// The adapter of the `rank` largest singular values, with scale 1.
fn of<B: Backend>(svd: &Svd, rank: usize, device: &B::Device) -> LoraAdapter<B> {
    let [a, b] = svd.factors(rank, device);
    LoraAdapter::new(a, b, 1.0, Scaling::Alpha)
}
