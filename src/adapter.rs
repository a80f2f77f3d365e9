//! The LoRA formula: the low-rank pair A and B, and what it adds to a layer's output. `crate::ops` computes
//! the same formula for linear layers and convolutions on CPU backends, in fewer passes over memory.

mod conv;
mod dora;
mod eva;
mod init;
mod layout;
mod mixed;
mod module;
mod training;

use burn::{
    module::Param,
    nn::{Dropout, DropoutConfig},
    tensor::{
        DType, Int, Tensor,
        backend::Backend,
        module::{embedding, linear},
    },
};

use crate::{
    config::Scaling,
    ops::{AdaptedLinear, ForwardLinear, run, runs_on},
    quantized::Weight,
    tensors::{add, at_least_f32, cast, trainable},
};

use training::Training;

pub(crate) use dora::Factor;
pub(crate) use eva::{Observer, Principal};
pub(crate) use layout::WeightLayout;
pub(crate) use mixed::Mixed;
pub use module::LoraAdapterRecord;
pub(crate) use module::{FROZEN, is_part};

/// A low-rank update of one weight matrix `W: [d_input, d_output]`.
///
/// Fine-tuning adds a matrix ΔW to a trained weight W. LoRA
/// ([Hu et al. 2021](https://arxiv.org/abs/2106.09685)) keeps W as it is and learns ΔW as the
/// product of two thin matrices, `ΔW = s·A·B`:
///
/// ```text
///          x: [batch, d_input]
///          │
///    ┌─────┴──────┐
///    │            A: [d_input, rank]     starts small and random
///    W            │
///    (frozen)     · s                    on the small [batch, rank] tensor
///    │            │
///    │            B: [rank, d_output]    starts at zero: at first ΔW = 0
///    └─────┬──────┘
///          +
///          y = x·W + s·(x·A)·B
/// ```
///
/// If the rank is far below `d_input` and `d_output`, A and B have far fewer parameters than W:
/// `rank·(d_input + d_output)` instead of `d_input·d_output`. Only A and B get gradients and optimizer
/// state. ΔW has the shape of W, so it can be added to W after training ([`delta`](Self::delta)).
/// Inference then costs as much as without an adapter.
///
/// [`forward`](Self::forward) computes `(x·A)·B` from left to right. It forms neither ΔW nor the
/// gradient of ΔW, which are both as large as W.
///
/// The factors are trainable by default. On an autodiff backend they are leaves that require gradients,
/// also after the module was cloned, moved to another device, loaded from a record, or turned into its
/// [`valid`](burn::module::AutodiffModule::valid) form and back.
/// [`no_grad`](burn::module::Module::no_grad) freezes them until the module is loaded from a record or
/// comes back from its `valid` form.
#[derive(Debug)]
pub struct LoraAdapter<B: Backend> {
    /// The factor A that reads the input: `[d_input, rank]`.
    pub a: Param<Tensor<B, 2>>,
    /// The factor B that writes the output: `[rank, d_output]`.
    pub b: Param<Tensor<B, 2>>,
    /// The bias that trains with A and B, if there is one: `[d_output]`.
    pub bias: Option<Param<Tensor<B, 1>>>,
    /// The value that [`scaling`](Self::scaling) turns into the scale `s`.
    pub alpha: f64,
    /// The rule for the scale `s`.
    pub scaling: Scaling,
    /// The dropout on the adapter's input. It is active on autodiff backends only.
    pub dropout: Dropout,
    /// The magnitudes of [DoRA](crate::LoraConfig::dora), one for each column of the adapted weight:
    /// `[d_output]`.
    pub magnitude: Option<Param<Tensor<B, 1>>>,
    /// What of A and B trains, and from where.
    pub(crate) training: Training<B>,
    /// How the layer that the adapter was made for stores its weight.
    pub(crate) layout: WeightLayout,
    /// What the adapter does to a head that is the same table as the embedding.
    pub(crate) tie: Tie,
}

/// What an adapter does to a *tied* head: an output projection whose weight is the table of embeddings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Tie {
    /// The adapter updates the weight, wherever that is used.
    #[default]
    Moves,
    /// The adapter of an embedding updates lookups, and not the head.
    Leaves,
    /// The adapter of a head repeats that of the table. A model in which the head is the table does not
    /// need it.
    Repeats,
}

impl<B: Backend> LoraAdapter<B> {
    /// An adapter with the factors `a: [d_input, rank]` and `b: [rank, d_output]`, without bias or
    /// dropout.
    ///
    /// The shapes do not tell whether it is for a linear layer, a convolution or an embedding. The layer that it is put
    /// on decides. To be saved before that, it must be said: [`of_linear`](Self::of_linear),
    /// [`of_convolution`](Self::of_convolution), [`of_embedding`](Self::of_embedding).
    ///
    /// # Panics
    ///
    /// If A and B have different ranks, or the rank is 0.
    pub fn new(a: Tensor<B, 2>, b: Tensor<B, 2>, alpha: f64, scaling: Scaling) -> Self {
        let ([_, rank], [b_rank, _]) = (a.dims(), b.dims());
        assert!(
            rank == b_rank,
            "A and B must agree on the rank: A is {:?} = [d_input, rank], B is {:?} = [rank, d_output]",
            a.dims(),
            b.dims(),
        );
        assert!(rank > 0, "the rank must be at least 1, got 0");
        let dropout = DropoutConfig::new(0.0).init();
        let (a, b) = (trainable(a), trainable(b));
        let (layout, tie) = (WeightLayout::Unknown, Tie::default());
        let (bias, magnitude, training) = (None, None, Training::default());
        Self { a, b, bias, alpha, scaling, dropout, magnitude, training, layout, tie }
    }

    /// The adapter as one of a linear layer, as files hold it: A reads the layer's input, and B writes its output.
    pub fn of_linear(self) -> Self {
        Self { layout: WeightLayout::Matrix, ..self }
    }

    /// The adapter as one of a convolution without groups, whose kernel has this size in each spatial dimension:
    /// `[length]` or `[height, width]`. The weight `[channels_out, channels_in, ..kernel]` is seen as the matrix
    /// `[channels_in · kernel, channels_out]`.
    ///
    /// # Panics
    ///
    /// If the kernel has no dimensions, or if `d_input` is not a multiple of its size.
    pub fn of_convolution(self, kernel: impl Into<Vec<usize>>) -> Self {
        let (kernel, [d_input, _]) = (kernel.into(), self.shape());
        let size: usize = kernel.iter().product();
        assert!(
            !kernel.is_empty() && size > 0 && d_input.is_multiple_of(size),
            "A must have as many rows for each input channel as a kernel of {kernel:?} has elements, got {d_input} rows"
        );
        Self { layout: WeightLayout::Conv { kernel, groups: 1 }, ..self }
    }

    /// The adapter as one of an embedding, whose weight is the table `[n_embedding, d_model]`.
    pub fn of_embedding(self) -> Self {
        Self { layout: WeightLayout::Embedding, ..self }
    }

    /// The update of the output, `s·((x·A)·B + bias)`: `[batch, d_input]` to `[batch, d_output]`. What
    /// magnitudes change is not in it.
    pub fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let x = cast(x, self.a.dtype());
        let [a, b] = self.factors();
        let hidden = self.dropout.forward(x).matmul(a).mul_scalar(self.scale());
        linear(hidden, b, self.bias_delta())
    }

    /// The output of a linear layer with the update, `x·W + b + s·((x·A)·B + bias)`, where the base's
    /// W and b are constants: `[batch, d_input]` to `[batch, d_output]`.
    pub(crate) fn forward_on(
        &self,
        x: Tensor<B, 2>,
        weight: Weight<B>,
        bias: Option<Tensor<B, 1>>,
    ) -> Tensor<B, 2> {
        if let Some(observer) = &self.training.observer {
            observer.observe(&x);
        }
        if self.magnitude.is_some() {
            return self.forward_rows_normalized(x, weight, bias);
        }
        if let Some(y) = self.in_one_operation(&x, &weight, &bias) {
            return y;
        }
        add(weight.forward(x.clone(), bias), self.forward(x))
    }

    /// The same as one operation; `None` where Burn's operations are used.
    fn in_one_operation(
        &self,
        x: &Tensor<B, 2>,
        weight: &Weight<B>,
        bias: &Option<Tensor<B, 1>>,
    ) -> Option<Tensor<B, 2>> {
        let ([a, b], scale) = (self.factors(), self.scale());
        let in_f32 = [x, &a, &b].iter().all(|it| it.dtype() == DType::F32);
        if !runs_on::<B>() || !in_f32 {
            return None;
        }
        let bias = self.with_bias_delta(bias.clone())?;
        let drops = self.dropout.prob > 0.0 && B::ad_enabled(&x.device());
        let read = drops.then(|| self.dropout.forward(x.clone()));
        let layer = AdaptedLinear { weight: weight.clone(), bias, read, a, b, scale };
        run::<ForwardLinear, B>(&(x.clone(), layer))
    }

    /// The update of the output of an embedding, where each index selects one row of the weight:
    /// `[batch, length]` to `[batch · length, d_output]`.
    pub(crate) fn forward_lookup(&self, indices: Tensor<B, 2, Int>) -> Tensor<B, 2> {
        let [a, b] = self.factors();
        embedding(a, indices).flatten::<2>(0, 1).mul_scalar(self.scale()).matmul(b)
    }

    /// The update of the output where the weight is used transposed, `s·(x·Bᵀ)·Aᵀ`:
    /// `[batch, d_output]` to `[batch, d_input]`.
    pub(crate) fn forward_transposed(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let [a, b] = self.factors();
        let x = cast(x, b.dtype());
        x.matmul(b.transpose()).mul_scalar(self.scale()).matmul(a.transpose())
    }

    /// The update of the weight, `ΔW = s·A·B`: `[d_input, d_output]`, as part of the autodiff graph.
    pub(crate) fn product(&self) -> Tensor<B, 2> {
        let [a, b] = self.factors();
        a.mul_scalar(self.scale()).matmul(b)
    }

    /// The update of the weight, `ΔW = s·A·B`: `[d_input, d_output]`, detached from the autodiff
    /// graph. Factors in half precision are multiplied, and returned, in `f32`. What magnitudes change is
    /// not in it.
    pub fn delta(&self) -> Tensor<B, 2> {
        let [a, b] = self.constant_factors().map(at_least_f32);
        a.mul_scalar(self.scale()).matmul(b)
    }

    /// The update of the layer's bias, `s·bias`, if the adapter has one: `[d_output]`.
    pub fn bias_delta(&self) -> Option<Tensor<B, 1>> {
        self.bias.as_ref().map(|bias| bias.val().mul_scalar(self.scale()))
    }

    /// The base's bias plus the adapter's, as far as there are any; `None` if their types differ.
    pub(crate) fn with_bias_delta(
        &self,
        bias: Option<Tensor<B, 1>>,
    ) -> Option<Option<Tensor<B, 1>>> {
        match (bias, self.bias_delta()) {
            (Some(base), Some(delta)) if base.dtype() != delta.dtype() => None,
            (Some(base), Some(delta)) => Some(Some(base + delta)),
            (base, delta) => Some(base.or(delta)),
        }
    }

    /// The scale `s` of the update `s·A·B`.
    pub fn scale(&self) -> f64 {
        self.scaling.scale(self.alpha, self.rank())
    }

    /// The alpha that gives this scale as `alpha/rank`.
    pub(crate) fn alpha_over_rank(&self) -> f64 {
        match self.scaling {
            Scaling::AlphaOverRank => self.alpha,
            _ => self.scale() * self.rank() as f64,
        }
    }

    /// The rank.
    pub fn rank(&self) -> usize {
        self.a.dims()[1]
    }

    /// The shape of the weight that the adapter fits: `[d_input, d_output]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.a.dims()[0], self.b.dims()[1]]
    }

    /// The number of bytes that the parameters take in memory.
    pub(crate) fn num_bytes(&self) -> usize {
        let vectors = [&self.bias, &self.magnitude].into_iter().flatten();
        let vectors = vectors.map(|it| it.shape().num_elements() * it.dtype().size());
        let factors = self.factors().map(|it| it.shape().num_elements() * it.dtype().size());
        factors.into_iter().chain(vectors).sum()
    }

    /// The number of parameters that train: `rank·(d_input + d_output)`, plus `d_output` with a bias or
    /// magnitudes, without A if that is frozen.
    pub fn num_trainable(&self) -> usize {
        let a = if self.training.freezes_a { 0 } else { self.a.shape().num_elements() };
        let vectors = [&self.bias, &self.magnitude].into_iter().flatten();
        let vectors = vectors.map(|it| it.shape().num_elements()).sum::<usize>();
        a + self.b.shape().num_elements() + vectors
    }
}
