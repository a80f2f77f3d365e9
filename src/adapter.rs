//! The LoRA formula: the low-rank pair A and B, and what it adds to a layer's output. `crate::fused` computes
//! the same formula for linear layers and convolutions on CPU backends, in fewer passes over memory.

mod layout;
mod mixed;
mod module;

use burn::{
    module::{Module, Param},
    nn::{Dropout, DropoutConfig},
    tensor::{
        DType, FloatDType, Int, Tensor, TensorData,
        backend::Backend,
        module::{embedding, linear},
    },
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use rand_distr::{Normal, StandardNormal, Uniform};

#[cfg(any(feature = "flex", feature = "ndarray"))]
use crate::fused;
use crate::{
    config::{Init, LoraConfig, Scaling},
    quantised::Weight,
};

pub(crate) use layout::WeightLayout;
pub(crate) use mixed::Mixed;
pub use module::LoraAdapterRecord;

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
        let (layout, tie) = (WeightLayout::Matrix, Tie::default());
        Self { a, b, bias: None, alpha, scaling, dropout, layout, tie }
    }

    /// A fresh adapter for a weight `[d_input, d_output]`, with initial values as `config` says. Fields
    /// of `config` that concern a whole model, such as the targets, are ignored.
    ///
    /// The factors are drawn on the host from the seed alone, so they are the same on every backend.
    ///
    /// # Panics
    ///
    /// If the rank is 0 or the dropout is not a probability.
    pub fn init(config: &LoraConfig, shape: [usize; 2], device: &B::Device) -> LoraAdapter<B> {
        Self::init_for(config, WeightLayout::Matrix, shape, device)
    }

    /// A fresh adapter for a weight of the given layout.
    pub(crate) fn init_for(
        config: &LoraConfig,
        layout: WeightLayout,
        [d_input, d_output]: [usize; 2],
        device: &B::Device,
    ) -> LoraAdapter<B> {
        let rank = config.rank;
        let mut rng = StdRng::seed_from_u64(config.seed);
        let mut uniform = |shape: [usize; 2], fan_in: usize| {
            let bound = 1.0 / (fan_in as f32).sqrt();
            let range = Uniform::new_inclusive(-bound, bound).expect("the bound is finite");
            random(shape, || rng.sample(range), device)
        };
        let (a, b) = match (&layout, config.init) {
            (WeightLayout::Embedding, init) => {
                let mut normal = |shape| random(shape, || rng.sample(StandardNormal), device);
                let b = normal([rank, d_output]);
                let a = match init {
                    Init::RandomBoth => normal([d_input, rank]),
                    _ => Tensor::zeros([d_input, rank], device),
                };
                (a, b)
            }
            (_, Init::KaimingUniform) => {
                (uniform([d_input, rank], d_input), Tensor::zeros([rank, d_output], device))
            }
            (_, Init::Gaussian) => {
                let normal = Normal::new(0.0, 1.0 / rank as f32).expect("the deviation is finite");
                let a = random([d_input, rank], || rng.sample(normal), device);
                (a, Tensor::zeros([rank, d_output], device))
            }
            (_, Init::RandomBoth) => {
                (uniform([d_input, rank], d_input), uniform([rank, d_output], rank))
            }
        };
        Self {
            layout,
            bias: config.bias.then(|| trainable(Tensor::zeros([d_output], device))),
            dropout: DropoutConfig::new(config.dropout).init(),
            ..Self::new(a, b, config.alpha, config.scaling)
        }
    }

    /// The update of the output, `s·((x·A)·B + bias)`: `[batch, d_input]` to `[batch, d_output]`.
    pub fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let x = cast(x, self.a.dtype());
        let hidden = self.dropout.forward(x).matmul(self.a.val()).mul_scalar(self.scale());
        linear(hidden, self.b.val(), self.bias_delta())
    }

    /// The output of a linear layer with the update, `x·W + b + s·((x·A)·B + bias)`, where the base's
    /// W and b are constants: `[batch, d_input]` to `[batch, d_output]`.
    pub(crate) fn forward_on(
        &self,
        x: Tensor<B, 2>,
        weight: Weight<B>,
        bias: Option<Tensor<B, 1>>,
    ) -> Tensor<B, 2> {
        #[cfg(any(feature = "flex", feature = "ndarray"))]
        if let Some(y) = self.in_one_operation(&x, &weight, &bias) {
            return y;
        }
        add(weight.forward(x.clone(), bias), self.forward(x))
    }

    /// The same as one operation; `None` where Burn's operations are used.
    #[cfg(any(feature = "flex", feature = "ndarray"))]
    fn in_one_operation(
        &self,
        x: &Tensor<B, 2>,
        weight: &Weight<B>,
        bias: &Option<Tensor<B, 1>>,
    ) -> Option<Tensor<B, 2>> {
        let (a, b, scale) = (self.a.val(), self.b.val(), self.scale());
        let in_f32 = [x, &a, &b].iter().all(|it| it.dtype() == DType::F32);
        if !fused::computes_on::<B>() || !in_f32 {
            return None;
        }
        let bias = self.with_bias_delta(bias.clone())?;
        let drops = self.dropout.prob > 0.0 && B::ad_enabled(&x.device());
        let read = drops.then(|| self.dropout.forward(x.clone()));
        fused::forward(x, &fused::Layer { weight: weight.clone(), bias, read, a, b, scale })
    }

    /// The update of the output of an embedding, where each index selects one row of the weight:
    /// `[batch, length]` to `[batch · length, d_output]`.
    pub(crate) fn forward_lookup(&self, indices: Tensor<B, 2, Int>) -> Tensor<B, 2> {
        let hidden = embedding(self.a.val(), indices).flatten::<2>(0, 1).mul_scalar(self.scale());
        hidden.matmul(self.b.val())
    }

    /// The update of the output where the weight is used transposed, `s·(x·Bᵀ)·Aᵀ`:
    /// `[batch, d_output]` to `[batch, d_input]`.
    pub(crate) fn forward_transposed(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let x = cast(x, self.b.dtype());
        let hidden = x.matmul(self.b.val().transpose()).mul_scalar(self.scale());
        hidden.matmul(self.a.val().transpose())
    }

    /// The update of the output of a convolution: `[batch, channels_in, ..]` to
    /// `[batch, channels_out, ..]`. `times_a` multiplies each patch of x with A, which gives
    /// `[batch, groups · rank, ..]`. B is then applied at each position.
    pub(crate) fn forward_conv<const D: usize>(
        &self,
        x: Tensor<B, D>,
        groups: usize,
        times_a: impl FnOnce(Tensor<B, D>, Tensor<B, 2>) -> Tensor<B, D>,
    ) -> Tensor<B, D> {
        let x = cast(x, self.a.dtype());
        let hidden = times_a(self.dropout.forward(x), self.a.val()).mul_scalar(self.scale());
        let mut shape = hidden.dims();
        let (rank, columns) = (self.rank(), self.b.dims()[1]);
        let (batch, places) = (shape[0], shape[2..].iter().product::<usize>());
        // B has a column for each output channel of all groups. In a transposed convolution it has
        // only the columns of one group, and all groups share them.
        let transposed = matches!(self.layout, WeightLayout::ConvTranspose { .. });
        let b_groups = if transposed { 1 } else { groups };
        shape[1] = groups * columns / b_groups;
        // Reshaped before it is permuted: Burn's wgpu backend reshapes a transposed vector wrongly.
        let b = self.b.val().reshape([1, rank, b_groups, columns / b_groups]);
        let b = b.permute([0, 2, 3, 1]);
        let mut y = b.matmul(hidden.reshape([batch, groups, rank, places]));
        if let Some(bias) = self.bias_delta() {
            y = y + bias.reshape([1, b_groups, columns / b_groups, 1]);
        }
        y.reshape(shape)
    }

    /// The update of the weight, `ΔW = s·A·B`: `[d_input, d_output]`, as part of the autodiff graph.
    pub(crate) fn product(&self) -> Tensor<B, 2> {
        self.a.val().mul_scalar(self.scale()).matmul(self.b.val())
    }

    /// The update of the weight, `ΔW = s·A·B`: `[d_input, d_output]`, detached from the autodiff
    /// graph. Factors in half precision are multiplied, and returned, in `f32`.
    pub fn delta(&self) -> Tensor<B, 2> {
        let [a, b] = [&self.a, &self.b].map(|factor| at_least_f32(frozen(factor)));
        a.mul_scalar(self.scale()).matmul(b)
    }

    /// The update of the layer's bias, `s·bias`, if the adapter has one: `[d_output]`.
    pub fn bias_delta(&self) -> Option<Tensor<B, 1>> {
        self.bias.as_ref().map(|bias| bias.val().mul_scalar(self.scale()))
    }

    /// The base's bias plus the adapter's, as far as there are any; `None` if their types differ.
    #[cfg(any(feature = "flex", feature = "ndarray"))]
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

    /// The rank.
    pub fn rank(&self) -> usize {
        self.a.dims()[1]
    }

    /// The shape of the weight that the adapter fits: `[d_input, d_output]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.a.dims()[0], self.b.dims()[1]]
    }

    /// The number of parameters: `rank·(d_input + d_output)`, plus `d_output` with a bias.
    pub fn num_trainable(&self) -> usize {
        Module::num_params(self)
    }
}

/// The tensor in another precision. Gradients are cast back.
fn cast<B: Backend, const D: usize>(tensor: Tensor<B, D>, dtype: DType) -> Tensor<B, D> {
    if tensor.dtype() == dtype { tensor } else { tensor.cast(FloatDType::from(dtype)) }
}

/// The output of the base plus the adapter's update. If the base is in another precision than the
/// adapter, the sum is formed in the adapter's, and returned in the base's, as in PEFT.
pub(crate) fn add<B: Backend, const D: usize>(
    base: Tensor<B, D>,
    update: Tensor<B, D>,
) -> Tensor<B, D> {
    let dtype = base.dtype();
    cast(cast(base, update.dtype()) + update, dtype)
}

/// The tensor as a trainable parameter. `detach` makes it a leaf of the autodiff graph.
fn trainable<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Param<Tensor<B, D>> {
    Param::from_tensor(tensor.detach())
}

/// The parameter's value as a constant. `detach` alone is not enough, because Burn keeps the
/// `require_grad` flag of a detached tensor.
pub(crate) fn frozen<B: Backend, const D: usize>(param: &Param<Tensor<B, D>>) -> Tensor<B, D> {
    param.val().detach().set_require_grad(false)
}

/// The tensor, cast to `f32` if it is in half precision. Merging in half precision would round twice.
pub(crate) fn at_least_f32<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Tensor<B, D> {
    match tensor.dtype() {
        DType::F16 | DType::BF16 => tensor.cast(FloatDType::F32),
        _ => tensor,
    }
}

fn random<B: Backend>(
    shape: [usize; 2],
    mut draw: impl FnMut() -> f32,
    device: &B::Device,
) -> Tensor<B, 2> {
    let values: Vec<f32> = (0..shape[0] * shape[1]).map(|_| draw()).collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}
