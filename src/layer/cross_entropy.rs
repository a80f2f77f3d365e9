//! The cross-entropy of a language model's head.

use burn::tensor::{Int, Tensor, activation::log_softmax, backend::Backend};

use super::{LoraEmbedding, LoraLinear, soft_cap as capped};
use crate::{
    ops::{CrossEntropy, Scored, run},
    quantized::Weight,
};

impl<B: Backend> LoraLinear<B> {
    /// The cross-entropy of the layer's outputs, as scores of classes: the sum over all rows of minus the logarithm
    /// of the probability of the right class, `[1]`. `x` is `[rows, d_input]`, and `targets` is `[rows]`.
    ///
    /// On the CPU backends of the features `flex` and `ndarray`, and where the layer has no adapter and no bias and
    /// does not train, the scores of a few rows at a time are computed, and forgotten. As a language model's head has
    /// an output for each token that it knows, its scores would be the largest tensor by far. Elsewhere this is
    /// composed of Burn's operations.
    ///
    /// # Panics
    ///
    /// If the shapes do not fit.
    pub fn cross_entropy(&self, x: Tensor<B, 2>, targets: Tensor<B, 1, Int>) -> Tensor<B, 1> {
        self.capped_cross_entropy(x, targets, None)
    }

    /// The same of scores that are capped, if there is a cap: s becomes `soft_cap·tanh(s/soft_cap)`, as in Gemma 2.
    ///
    /// # Panics
    ///
    /// If the shapes do not fit.
    pub fn capped_cross_entropy(
        &self,
        x: Tensor<B, 2>,
        targets: Tensor<B, 1, Int>,
        soft_cap: Option<f64>,
    ) -> Tensor<B, 1> {
        let fused = self.plain_weight().map(|weight| (x.clone(), weight));
        fused_or(fused, targets, soft_cap, || self.forward(x))
    }
}

impl<B: Backend> LoraEmbedding<B> {
    /// The cross-entropy of what [`project`](Self::project) gives, as scores of the next token: `x` is `[rows,
    /// d_model]`, and `targets` is `[rows]`. As [`LoraLinear::cross_entropy`].
    ///
    /// # Panics
    ///
    /// If the shapes do not fit.
    pub fn cross_entropy(&self, x: Tensor<B, 2>, targets: Tensor<B, 1, Int>) -> Tensor<B, 1> {
        self.capped_cross_entropy(x, targets, None)
    }

    /// The same of scores that are capped, if there is a cap. As [`LoraLinear::capped_cross_entropy`].
    ///
    /// # Panics
    ///
    /// If the shapes do not fit.
    pub fn capped_cross_entropy(
        &self,
        x: Tensor<B, 2>,
        targets: Tensor<B, 1, Int>,
        soft_cap: Option<f64>,
    ) -> Tensor<B, 1> {
        let fused = self.plain_table().map(|weight| (x.clone(), weight));
        fused_or(fused, targets, soft_cap, || self.project(x.unsqueeze()).squeeze_dim(0))
    }
}

fn fused_or<B: Backend>(
    fused: Option<(Tensor<B, 2>, Weight<B>)>,
    targets: Tensor<B, 1, Int>,
    soft_cap: Option<f64>,
    scores: impl FnOnce() -> Tensor<B, 2>,
) -> Tensor<B, 1> {
    let fused = fused.and_then(|(x, weight)| {
        let (targets, soft_cap) = (targets.clone(), soft_cap.map(|it| it as f32));
        run::<CrossEntropy, B>(&Scored { x, weight, targets, soft_cap })
    });
    fused.unwrap_or_else(|| {
        let (scores, targets) = (scores(), targets.unsqueeze_dim(1));
        let scores = match soft_cap {
            Some(cap) => capped(scores, cap),
            None => scores,
        };
        log_softmax(scores, 1).gather(1, targets).sum().neg()
    })
}
