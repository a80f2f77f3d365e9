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

use super::LoraAdapter;
use crate::{
    ops::{ColumnSquares, ScaleColumns, ScaledColumns, run},
    quantized::Weight,
    tensors::{at_least_f32, cast, cat, constant, frozen, trainable},
};

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
        plain.training.observer = None;
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
        let squares = squares(weight) + ((cross + own) * b).sum_dim(0).squeeze_dim(0);
        // A column of zeros stays one, where 0/0 would be NaN. Rounding can leave less than zero.
        squares.clamp_min(f32::MIN_POSITIVE).sqrt()
    }

    /// What magnitudes multiply the columns of the weight with its update by: `[d_output]`.
    fn gain(&self, weight: impl FnOnce() -> Tensor<B, 2>) -> Option<Tensor<B, 1>> {
        let magnitude = self.magnitude.as_ref()?;
        let norms = self.norms(weight());
        Some(cast(magnitude.val(), norms.dtype()) / norms)
    }

    /// The output of a linear layer whose adapter has magnitudes: `[batch, d_input]` to `[batch, d_output]`.
    pub(crate) fn forward_rows_normalized(
        &self,
        x: Tensor<B, 2>,
        weight: Weight<B>,
        bias: Option<Tensor<B, 1>>,
    ) -> Tensor<B, 2> {
        let forward = |x, adapter: Option<&Self>| match adapter {
            Some(adapter) => adapter.forward_on(x, weight.clone(), None),
            None => weight.forward(x, None),
        };
        if self.dropout.prob == 0.0 || !B::ad_enabled(&x.device()) {
            let gain = self.gain(|| weight.matrix()).expect("there are magnitudes");
            let columns = ScaledColumns { y: forward(x, Some(&self.plain())), gain, bias };
            return run::<ScaleColumns, B>(&columns).unwrap_or_else(|| {
                let ScaledColumns { y, gain, bias } = columns;
                plus(times(y, gain, 1), bias)
            });
        }
        self.forward_normalized(x, weight.matrix(), bias, forward)
    }

    /// The outputs `y` of the weight with its update, without the bias, with the columns' lengths, if the
    /// adapter has magnitudes. `dim` is the dimension of the columns; each may be there for several groups.
    pub(crate) fn normalized<const D: usize>(
        &self,
        y: Tensor<B, D>,
        dim: usize,
        weight: impl FnOnce() -> Tensor<B, 2>,
    ) -> Tensor<B, D> {
        match self.gain(weight) {
            Some(gain) => times(y, gain, dim),
            None => y,
        }
    }

    /// The output of a layer whose adapter has magnitudes, for the input x and the weight
    /// `[d_input, d_output]`. `forward` applies the layer without its bias to an input, with an adapter or
    /// without. Channels are the last dimension of a matrix, and the second one of an image.
    ///
    /// Dropout concerns the adapter and what the magnitudes change, as in PEFT. Where x is dropped, the base
    /// sees it nevertheless.
    pub(crate) fn forward_normalized<const D: usize>(
        &self,
        x: Tensor<B, D>,
        weight: Tensor<B, 2>,
        bias: Option<Tensor<B, 1>>,
        forward: impl Fn(Tensor<B, D>, Option<&Self>) -> Tensor<B, D>,
    ) -> Tensor<B, D> {
        let drops = self.dropout.prob > 0.0 && B::ad_enabled(&x.device());
        let read = if drops { self.dropout.forward(x.clone()) } else { x.clone() };
        let y = self.normalized(forward(read.clone(), Some(&self.plain())), 1, || weight);
        let y = if drops { y + forward(x - read, None) } else { y };
        plus(y, bias)
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
        self.normalized(weight.clone() + product, 1, || weight.clone()) - weight
    }
}

/// `y` with each column, along `dim`, times a number. Each may be there for several groups.
fn times<B: Backend, const D: usize>(
    y: Tensor<B, D>,
    gain: Tensor<B, 1>,
    dim: usize,
) -> Tensor<B, D> {
    let groups = y.dims()[dim] / gain.dims()[0];
    let gain = if groups == 1 { gain } else { cat(&vec![gain; groups], 0) };
    let dtype = y.dtype();
    let gain = along(gain, dim);
    cast(cast(y, gain.dtype()) * gain, dtype)
}

/// `y` with a bias for each channel, the second dimension.
fn plus<B: Backend, const D: usize>(y: Tensor<B, D>, bias: Option<Tensor<B, 1>>) -> Tensor<B, D> {
    match bias {
        Some(bias) => {
            let bias = cast(bias, y.dtype());
            y + along(bias, 1)
        }
        None => y,
    }
}

/// The vector as a tensor whose other dimensions are 1.
fn along<B: Backend, const D: usize>(vector: Tensor<B, 1>, dim: usize) -> Tensor<B, D> {
    let mut shape = [1; D];
    shape[dim] = vector.dims()[0];
    vector.reshape(shape)
}

/// The sum of the squares of each column of a constant: `[rows, columns]` to `[columns]`.
fn squares<B: Backend>(matrix: Tensor<B, 2>) -> Tensor<B, 1> {
    run::<ColumnSquares, B>(&matrix)
        .unwrap_or_else(|| (matrix.clone() * matrix).sum_dim(0).squeeze_dim(0))
}
