//! DoRA ([Liu et al. 2024](https://arxiv.org/abs/2402.09353)): the columns of the adapted weight get lengths
//! of their own, so that A and B only have to learn directions.
//!
//! With a vector of magnitudes m, the adapted weight is
//!
//! ```text
//! W' = (W + ΔW) · m/‖W + ΔW‖        column by column, ΔW = s·A·B
//! ```
//!
//! At first m is `‖W + ΔW‖`, so that nothing changes. As in the paper's section 4.3, and in PEFT, the norms
//! count as constants: no gradient flows through them.

use burn::{
    module::Param,
    tensor::{Tensor, backend::Backend},
};

use super::{
    LoraAdapter,
    tensors::{at_least_f32, cast, constant, frozen, trainable},
};
use crate::layer::cat;

impl<B: Backend> LoraAdapter<B> {
    /// The adapter with the magnitudes that the weight has with its update.
    pub(crate) fn with_magnitude(self, weight: Tensor<B, 2>) -> Self {
        let magnitude = Some(trainable(self.norms(weight)));
        Self { magnitude, ..self }
    }

    /// The adapter without its magnitudes and dropout.
    fn plain(&self) -> Self {
        let mut plain = Self { magnitude: None, ..self.clone() };
        plain.dropout.prob = 0.0;
        plain
    }

    /// The norm of each column of the weight `[d_input, d_output]` with its update, as a constant:
    /// `[d_output]`. The update is not formed:
    ///
    /// ```text
    /// ‖W + s·A·B‖² = ‖W‖² + (2s·AᵀW + s²·AᵀA·B)·B    column by column
    /// ```
    fn norms(&self, weight: Tensor<B, 2>) -> Tensor<B, 1> {
        let weight = at_least_f32(constant(weight));
        let [a, b] = self.constant_factors().map(|it| cast(it, weight.dtype()));
        let (s, a_t) = (self.scale(), a.clone().transpose());
        let cross = a_t.clone().matmul(weight.clone()).mul_scalar(2.0 * s);
        let own = a_t.matmul(a).matmul(b.clone()).mul_scalar(s * s);
        let squares = (weight.clone() * weight).sum_dim(0) + ((cross + own) * b).sum_dim(0);
        // A column of zeros stays one, where 0/0 would be NaN. Rounding can leave less than zero.
        squares.clamp_min(f32::MIN_POSITIVE).sqrt().squeeze_dim(0)
    }

    /// The outputs `y` of the weight with its update, without the bias, with the columns' lengths, if the
    /// adapter has magnitudes. `dim` is the dimension of the columns; each may be there for several groups.
    pub(crate) fn normalised<const D: usize>(
        &self,
        y: Tensor<B, D>,
        dim: usize,
        weight: impl FnOnce() -> Tensor<B, 2>,
    ) -> Tensor<B, D> {
        let Some(magnitude) = &self.magnitude else { return y };
        let norms = self.norms(weight());
        let gain = cast(magnitude.val(), norms.dtype()) / norms;
        let groups = y.dims()[dim] / gain.dims()[0];
        let gain = if groups == 1 { gain } else { cat(&vec![gain; groups], 0) };
        let mut shape = [1; D];
        shape[dim] = y.dims()[dim];
        let dtype = y.dtype();
        let gain = gain.reshape(shape);
        cast(cast(y, gain.dtype()) * gain, dtype)
    }

    /// The output of a layer whose adapter has magnitudes, for the input x and the weight
    /// `[d_input, d_output]`. `forward` applies the layer without its bias to an input, with an adapter or
    /// without. Channels are the last dimension of a matrix, and the second one of an image.
    ///
    /// Dropout concerns the adapter and what the magnitudes change, as in PEFT. Where x is dropped, the base
    /// sees it nevertheless.
    pub(crate) fn forward_normalised<const D: usize>(
        &self,
        x: Tensor<B, D>,
        weight: Tensor<B, 2>,
        bias: Option<Tensor<B, 1>>,
        forward: impl Fn(Tensor<B, D>, Option<&Self>) -> Tensor<B, D>,
    ) -> Tensor<B, D> {
        let drops = self.dropout.prob > 0.0 && B::ad_enabled(&x.device());
        let read = if drops { self.dropout.forward(x.clone()) } else { x.clone() };
        let y = self.normalised(forward(read.clone(), Some(&self.plain())), 1, || weight);
        let y = if drops { y + forward(x - read, None) } else { y };
        let Some(bias) = bias else { return y };
        let mut shape = [1; D];
        shape[1] = bias.dims()[0];
        let bias = cast(bias, y.dtype());
        y + bias.reshape(shape)
    }

    /// The update of this weight as part of the autodiff graph, magnitudes included: `[d_input, d_output]`.
    pub(crate) fn product_on(&self, weight: impl FnOnce() -> Tensor<B, 2>) -> Tensor<B, 2> {
        self.rescaled(self.product(), weight)
    }

    /// The update of this weight as a constant, magnitudes included: `[d_input, d_output]`.
    pub(crate) fn delta_on(&self, weight: impl FnOnce() -> Tensor<B, 2>) -> Tensor<B, 2> {
        let magnitude = self.magnitude.as_ref().map(|it| Param::from_tensor(frozen(it)));
        constant(Self { magnitude, ..self.clone() }.rescaled(self.delta(), weight))
    }

    fn rescaled(
        &self,
        product: Tensor<B, 2>,
        weight: impl FnOnce() -> Tensor<B, 2>,
    ) -> Tensor<B, 2> {
        if self.magnitude.is_none() {
            return product;
        }
        let weight = cast(constant(weight()), product.dtype());
        self.normalised(weight.clone() + product, 1, || weight.clone()) - weight
    }
}
