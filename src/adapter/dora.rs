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
    tensor::{ElementConversion, Tensor, backend::Backend},
};

use super::LoraAdapter;
use crate::{
    ops::{ColumnSquares, ScaleColumns, ScaledColumns, run, runs_on},
    quantized::Weight,
    tensors::{add, at_least_f32, cast, cat, constant, frozen, trainable},
};

/// The update cancels a column where less than this share is left of the squares of the weight and of the update.
/// Rounding in the sums then weighs more than a few bits.
const CANCELED: f64 = 1.0 / 16.0;

/// What a layer multiplies its input by.
pub(crate) enum Factor<'a, B: Backend> {
    /// The weight of the base.
    Base,
    /// The weight with the update of this adapter, which has no magnitudes.
    Updated(&'a LoraAdapter<B>),
    /// A constant in place of the weight: `[d_input, d_output]`.
    Matrix(Tensor<B, 2>),
}

/// What magnitudes multiply the columns of the weight with its update by.
pub(crate) struct Gain<B: Backend> {
    /// `[d_output]`.
    columns: Tensor<B, 1>,
    /// The weight with its update, as a constant, if the update cancels a column: `[d_input, d_output]`. The product
    /// of the input with each of the two would then round away what is left of their sum.
    sum: Option<Tensor<B, 2>>,
}

impl<B: Backend> LoraAdapter<B> {
    /// The adapter with the magnitudes that the weight has with its update.
    pub(crate) fn with_magnitude(self, weight: Tensor<B, 2>) -> Self {
        let magnitude = Some(trainable(self.norms(weight).0));
        Self { magnitude, ..self }
    }

    /// The adapter without its magnitudes and dropout.
    fn plain(&self) -> Self {
        let mut plain = Self { magnitude: None, ..self.clone() };
        plain.dropout.prob = 0.0;
        plain.training.observer = None;
        plain
    }

    /// The norm of each column of the weight `[d_input, d_output]` with its update, as a constant: `[d_output]`; and
    /// the weight with its update, if the update cancels a column. On CPU backends the sum is not formed otherwise:
    ///
    /// ```text
    /// ‖W + s·A·B‖² = ‖W‖² + (2s·AᵀW + s²·AᵀA·B)·B    column by column
    /// ```
    ///
    /// On other backends, to ask whether a column cancels would be to wait for the answer. There the norms are always
    /// those of the sum, and the sum is not kept: it would take as much memory as the base until the backward pass.
    fn norms(&self, weight: Tensor<B, 2>) -> (Tensor<B, 1>, Option<Tensor<B, 2>>) {
        let weight = at_least_f32(constant(weight));
        let [a, b] = self.constant_factors().map(|it| cast(it, weight.dtype()));
        let (s, a_t) = (self.scale(), a.clone().transpose());
        // A column of zeros stays one, where 0/0 would be NaN. Rounding can leave less than zero.
        let root = |squares: Tensor<B, 1>| squares.clamp_min(f32::MIN_POSITIVE).sqrt();
        let sum = |weight: Tensor<B, 2>| weight + a.clone().mul_scalar(s).matmul(b.clone());
        if !runs_on::<B>() {
            return (root(squares(sum(weight))), None);
        }
        let cross = a_t.clone().matmul(weight.clone()).mul_scalar(2.0 * s);
        let own = a_t.matmul(a.clone()).matmul(b.clone()).mul_scalar(s * s);
        let along_b = |it: Tensor<B, 2>| (it * b.clone()).sum_dim(0).squeeze_dim::<1>(0);
        let apart = squares(weight.clone()) + along_b(own);
        let together = apart.clone() + along_b(cross);
        let canceled = together.clone().lower(apart.mul_scalar(CANCELED)).any();
        if !canceled.into_scalar().elem::<bool>() {
            return (root(together), None);
        }
        let sum = sum(weight);
        (root(squares(sum.clone())), Some(sum))
    }

    /// What magnitudes multiply the columns of the weight with its update by.
    fn gain(&self, weight: impl FnOnce() -> Tensor<B, 2>) -> Option<Gain<B>> {
        let magnitude = self.magnitude.as_ref()?;
        let (norms, sum) = self.norms(weight());
        Some(Gain { columns: cast(magnitude.val(), norms.dtype()) / norms, sum })
    }

    /// The output for x, without bias and magnitudes: `forward` applies the layer with the factor that it is given.
    fn summed<const D: usize>(
        &self,
        x: Tensor<B, D>,
        sum: Option<Tensor<B, 2>>,
        forward: impl Fn(Tensor<B, D>, Factor<B>) -> Tensor<B, D>,
    ) -> Tensor<B, D> {
        let plain = self.plain();
        match sum {
            None => forward(x, Factor::Updated(&plain)),
            Some(sum) => {
                let y = forward(x.clone(), Factor::Matrix(sum));
                with_gradients_of(y, || forward(constant(x), Factor::Updated(&plain)))
            }
        }
    }

    /// The output of a linear layer whose adapter has magnitudes: `[batch, d_input]` to `[batch, d_output]`.
    pub(crate) fn forward_rows_normalized(
        &self,
        x: Tensor<B, 2>,
        weight: Weight<B>,
        bias: Option<Tensor<B, 1>>,
    ) -> Tensor<B, 2> {
        let forward = |x: Tensor<B, 2>, factor: Factor<B>| match factor {
            Factor::Base => weight.forward(x, None),
            Factor::Updated(adapter) => adapter.forward_on(x, weight.clone(), None),
            Factor::Matrix(matrix) => {
                let dtype = x.dtype();
                cast(cast(x, matrix.dtype()).matmul(matrix), dtype)
            }
        };
        if self.dropout.prob == 0.0 || !B::ad_enabled(&x.device()) {
            let gain = self.gain(|| weight.matrix()).expect("there are magnitudes");
            let y = self.summed(x, gain.sum, forward);
            let columns = ScaledColumns { y, gain: gain.columns, bias };
            return run::<ScaleColumns, B>(&columns).unwrap_or_else(|| {
                let ScaledColumns { y, gain, bias } = columns;
                plus(times(y, gain, 1), bias)
            });
        }
        self.forward_normalized(x, weight.matrix(), bias, forward)
    }

    /// The outputs `y` of the weight with its update, without the bias, with the columns' lengths, if the
    /// adapter has magnitudes. `dim` is the dimension of the columns; each may be there for several groups. Each
    /// element of y is one of the sum's, so that nothing more is lost where the update cancels a column.
    pub(crate) fn normalized<const D: usize>(
        &self,
        y: Tensor<B, D>,
        dim: usize,
        weight: impl FnOnce() -> Tensor<B, 2>,
    ) -> Tensor<B, D> {
        match self.gain(weight) {
            Some(gain) => times(y, gain.columns, dim),
            None => y,
        }
    }

    /// The products of the rows of `hidden`, `[batch, d_output]`, with the rows of the weight with its update and the
    /// columns' lengths: `[batch, d_input]`. `base` multiplies with the rows of the base.
    pub(crate) fn projected(
        &self,
        hidden: Tensor<B, 2>,
        weight: impl FnOnce() -> Tensor<B, 2>,
        base: impl Fn(Tensor<B, 2>) -> Tensor<B, 2>,
    ) -> Tensor<B, 2> {
        let updated = |x: Tensor<B, 2>| add(base(x.clone()), self.forward_transposed(x));
        let Some(gain) = self.gain(weight) else { return updated(hidden) };
        // The table's columns are what is summed over here.
        let hidden = times(hidden, gain.columns, 1);
        match gain.sum {
            None => updated(hidden),
            Some(sum) => {
                let y = hidden.clone().matmul(cast(sum.transpose(), hidden.dtype()));
                with_gradients_of(y, || updated(constant(hidden)))
            }
        }
    }

    /// The output of a layer whose adapter has magnitudes, for the input x and the weight
    /// `[d_input, d_output]`. `forward` applies the layer without its bias to an input, with the factor that it is
    /// given. Channels are the last dimension of a matrix, and the second one of an image.
    ///
    /// Dropout concerns the adapter and what the magnitudes change, as in PEFT. Where x is dropped, the base
    /// sees it nevertheless.
    pub(crate) fn forward_normalized<const D: usize>(
        &self,
        x: Tensor<B, D>,
        weight: Tensor<B, 2>,
        bias: Option<Tensor<B, 1>>,
        forward: impl Fn(Tensor<B, D>, Factor<B>) -> Tensor<B, D>,
    ) -> Tensor<B, D> {
        let gain = self.gain(|| weight).expect("there are magnitudes");
        let drops = self.dropout.prob > 0.0 && B::ad_enabled(&x.device());
        let read = if drops { self.dropout.forward(x.clone()) } else { x.clone() };
        let y = times(self.summed(read.clone(), gain.sum, &forward), gain.columns, 1);
        let y = if drops { y + forward(x - read, Factor::Base) } else { y };
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

/// `y`, which no gradient of the adapter reaches, with the gradients of `update`, whose input is a constant.
fn with_gradients_of<B: Backend, const D: usize>(
    y: Tensor<B, D>,
    update: impl FnOnce() -> Tensor<B, D>,
) -> Tensor<B, D> {
    if !B::ad_enabled(&y.device()) {
        return y;
    }
    let update = update();
    y + (update.clone() - constant(update))
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
