//! Layers that can carry an adapter. Each layer presents its weight to [`LoraAdapter`] as a matrix.

pub(crate) mod access;
mod attend;
mod attention;
mod conv;
mod cross_entropy;
mod embedding;
mod folding;
mod gated;
mod gelu;
mod heads;
mod linear;
mod mask;
mod module;
mod norm;
mod norms;
pub(crate) mod quantized;
mod rotation;
mod soft_cap;
mod statistic;

use burn::{
    module::{Param, ParamId},
    tensor::{DType, ElementConversion, Tensor, backend::Backend},
};

use crate::{
    adapter::{LoraAdapter, Mixed, WeightLayout},
    config::{LayerConfig, LoraConfig},
    precision::Precision,
    quantized::QuantizedWeight,
    tensors::{at_least_f32, frozen},
};

pub use attend::{AttentionOptions, attention};
pub use attention::{
    LoraMhaCache, LoraMhaInput, LoraMultiHeadAttention, LoraMultiHeadAttentionRecord,
};
pub use conv::{
    LoraConv1d, LoraConv1dRecord, LoraConv2d, LoraConv2dRecord, LoraConvTranspose2d,
    LoraConvTranspose2dRecord,
};
pub use embedding::{LoraEmbedding, LoraEmbeddingRecord};
pub use folding::Foldable;
pub use gated::{geglu, swiglu};
pub use gelu::gelu;
pub use heads::swap_heads;
pub use linear::{LoraLinear, LoraLinearRecord};
pub use mask::AttentionMask;
pub use norm::{BatchNorm, BatchNormRecord};
pub use norms::{group_norm, layer_norm, rms_norm};
pub use rotation::rotate;
pub use soft_cap::soft_cap;
pub(crate) use statistic::Statistic;

/// What a layer can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Capabilities {
    /// An adapter with a bias.
    pub bias: bool,
    /// An adapter with dropout, which acts on the layer's input.
    pub dropout: bool,
    /// A quantized weight.
    pub quantized: bool,
    /// Several adapters, each for some samples of a batch.
    pub mixed: bool,
}

/// A base layer with at most one adapter, as a walk that visits a model sees it.
pub(crate) trait LoraLayer<B: Backend> {
    /// The adapter, if there is one.
    fn adapter(&self) -> Option<&LoraAdapter<B>>;

    /// The precision in which the layer multiplies.
    fn precision(&self) -> Precision {
        Precision::F32
    }

    /// What the layer can take.
    fn capabilities(&self) -> Capabilities;

    /// The shape of the base's weight seen as a matrix: `[d_input, d_output]`.
    fn weight_shape(&self) -> [usize; 2];

    /// How the base stores the weight.
    fn weight_layout(&self) -> WeightLayout;

    /// The base's weight seen as a matrix, as a constant: `[d_input, d_output]`.
    fn weight_matrix(&self) -> Tensor<B, 2>;

    /// The base's weight, if it is quantized.
    fn quantized(&self) -> Option<&QuantizedWeight<B>> {
        None
    }

    /// The device of the base.
    fn device(&self) -> B::Device;
}

/// The same, as a walk that changes a model sees it.
pub(crate) trait LoraLayerMut<B: Backend>: LoraLayer<B> {
    /// Puts the adapter on the base, and freezes the base. `None` takes the adapter off, and leaves the
    /// base as it is. Panics if the adapter [does not fit](check_fit).
    fn set_adapter(&mut self, adapter: Option<LoraAdapter<B>>);

    /// Sets the precision in which the layer multiplies. A layer of another crate has none.
    fn set_precision(&mut self, _precision: Precision) {}

    /// Takes the adapter off, and has the samples of a batch use these. Panics if one [does not
    /// fit](check_fit). Returns false, and leaves the layer as it is, if it [cannot take
    /// them](Capabilities::mixed).
    #[must_use]
    fn set_mixed(&mut self, _mixed: Mixed<B>) -> bool {
        false
    }

    /// Replaces the base's weight by a quantized one. Panics if it has another shape. Returns false, and
    /// leaves the layer as it is, if it [cannot take one](Capabilities::quantized).
    #[must_use]
    fn set_quantized(&mut self, _weight: QuantizedWeight<B>) -> bool {
        false
    }

    /// Unpacks the base's weight, if it is quantized.
    fn dequantize(&mut self) {}

    /// Replaces the base by a copy with the adapter's update added, and drops the adapter. Returns
    /// false, and leaves the layer as it is, if the merged weight or bias is not finite.
    fn merge_adapter(&mut self) -> bool;
}

/// A layer of Burn for which this crate has a drop-in replacement. [`LoraConfig::init`] accepts it.
pub trait Adaptable<B: Backend>: Sized {
    /// The drop-in replacement.
    type Lora;

    /// The drop-in replacement, with a fresh adapter.
    fn with_fresh_adapter(self, config: &LoraConfig) -> Self::Lora;
}

impl LoraConfig {
    /// Puts a fresh adapter on a trained layer. A [`Linear`](burn::nn::Linear), for example, becomes a
    /// [`LoraLinear`]. Fields that concern a whole model, such as the targets, are ignored.
    ///
    /// # Panics
    ///
    /// If a value of the configuration is invalid, or if it asks for a bias on a layer that cannot have
    /// one: an embedding, or a transposed convolution with groups; if it freezes A of an embedding; or if
    /// initial values are computed from a weight that is not finite.
    pub fn init<B: Backend, L: Adaptable<B>>(&self, base: L) -> L::Lora {
        if let Err(error) = self.validate() {
            panic!("{error}");
        }
        base.with_fresh_adapter(self)
    }
}

/// A fresh adapter for the layer.
pub(crate) fn fresh<B: Backend>(config: &LayerConfig, layer: &dyn LoraLayer<B>) -> LoraAdapter<B> {
    let (layout, shape) = (layer.weight_layout(), layer.weight_shape());
    LoraAdapter::init_on(config, layout, shape, &layer.device(), || layer.weight_matrix())
}

/// Panics unless the adapter can be put on the layer.
#[track_caller]
pub(crate) fn check_fit<B: Backend>(layer: &dyn LoraLayer<B>, adapter: &LoraAdapter<B>) {
    if let Some(problem) = misfit(layer, adapter) {
        panic!("{problem}");
    }
}

/// What keeps the adapter from being put on the layer.
pub(crate) fn misfit<B: Backend>(
    layer: &dyn LoraLayer<B>,
    adapter: &LoraAdapter<B>,
) -> Option<String> {
    let (shape, layout) = (layer.weight_shape(), layer.weight_layout());
    let (a, b) = (adapter.a.dims(), adapter.b.dims());
    if a[1] != b[0] || a[1] == 0 {
        return Some(format!("the factors must have one rank of at least 1, got {a:?} and {b:?}"));
    }
    if adapter.shape() != shape {
        return Some(format!(
            "the adapter must fit the weight: expected {shape:?} = [d_input, d_output], got {:?}",
            adapter.shape(),
        ));
    }
    if !adapter.layout.fits(&layout) {
        return Some(format!(
            "the adapter must fit the weight: it was made for {:?}, and the layer has {layout:?}",
            adapter.layout,
        ));
    }
    let magnitudes = adapter.magnitude.as_ref().map(|it| it.dims()[0]);
    if magnitudes.is_some_and(|it| it != shape[1] || adapter.bias.is_some()) {
        return Some(format!(
            "the adapter must have {} magnitudes, one for each output, and no bias with them, got {magnitudes:?}",
            shape[1],
        ));
    }
    let bias = adapter.bias.as_ref().map(|it| it.dims()[0]);
    if bias.is_some() && !layer.capabilities().bias {
        return Some(format!(
            "the adapter has a bias, and the layer, whose weight is {layout:?}, cannot take one"
        ));
    }
    if bias.is_some_and(|it| it != shape[1]) {
        return Some(format!("the adapter's bias must be [{}], got {bias:?}", shape[1]));
    }
    None
}

/// The parameter plus `delta`, frozen. The sum is formed in `f32` or better, and then cast to the
/// parameter's type. A quantized parameter becomes one of `f32`.
pub(crate) fn plus<B: Backend, const D: usize>(
    param: &Param<Tensor<B, D>>,
    delta: Tensor<B, D>,
) -> Param<Tensor<B, D>> {
    let delta = delta.detach().set_require_grad(false);
    param.clone().map(|value| {
        let dtype = value.dtype();
        let value = at_least_f32(value.detach().set_require_grad(false));
        let sum = value.clone() + delta.cast(value.dtype());
        if is_quantized(dtype) { sum } else { sum.cast(dtype) }
    })
}

/// Whether the elements are quantized by one of Burn's schemes.
pub(crate) fn is_quantized(dtype: DType) -> bool {
    matches!(dtype, DType::QFloat(_))
}

/// The base's bias plus the adapter's. If only one of the two exists, it is the result, in the type of
/// the base's weight.
fn plus_bias<B: Backend>(
    bias: &Option<Param<Tensor<B, 1>>>,
    delta: Option<Tensor<B, 1>>,
    dtype: DType,
) -> Option<Param<Tensor<B, 1>>> {
    match (bias, delta) {
        (Some(bias), Some(delta)) => Some(plus(bias, delta)),
        (None, Some(delta)) => Some(constant(delta.detach().cast(dtype))),
        (bias, None) => bias.clone(),
    }
}

/// The tensor as a frozen parameter.
fn constant<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Param<Tensor<B, D>> {
    Param::initialized(ParamId::new(), tensor)
}

/// The parameter's value as a frozen parameter, whatever its `require_grad` flag says.
fn fixed<B: Backend, const D: usize>(param: &Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
    constant(frozen(param))
}

pub(crate) fn is_finite<B: Backend, const D: usize>(param: &Param<Tensor<B, D>>) -> bool {
    param.val().is_finite().all().into_scalar().elem()
}
