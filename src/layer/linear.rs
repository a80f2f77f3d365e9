use burn::{
    module::Param,
    nn::Linear,
    tensor::{Tensor, backend::Backend},
};

use super::module::lora_layer;
use crate::{
    adapter::{LoraAdapter, Mixed, WeightLayout},
    precision::Precision,
    quantized::{QuantizedWeight, Weight},
    tensors::{frozen, with_rank},
};

/// A drop-in for Burn's [`Linear`] that can carry an adapter: `y = x·W + b + s·(x·A)·B`, with W and
/// b frozen.
///
/// Without an adapter it behaves like a `Linear`: it has the same output, the same trainable parameters
/// and the same parameter paths (`weight`, `bias`). So one model struct serves for pretraining, for
/// fine-tuning and, after merging, for inference. It loads records, safetensors and PyTorch files that
/// were written for `Linear` fields.
///
/// ```
/// use burn::{backend::Flex, nn::LinearConfig};
/// use burn_lora::{LoraConfig, LoraLinear};
///
/// let device = Default::default();
/// let base = LinearConfig::new(784, 256).init::<Flex>(&device);
/// let layer: LoraLinear<Flex> = LoraConfig::peft(4, 8.0).init(base);
/// ```
///
/// # Freezing
///
/// With an adapter, no gradient reaches the base. The forward pass uses the weight and the bias as
/// constants, whatever their `require_grad` flags say, and autodiff does no work for them.
///
/// # Records
///
/// The record holds the base and the adapter. Loading a record with an adapter replaces both. Loading
/// a record without an adapter, such as that of a plain `Linear`, replaces the base and keeps the
/// current adapter. Formats without field names, such as that of Burn's `BinFileRecorder`, cannot
/// distinguish a `Linear` from a `LoraLinear`: load such a file into a `Linear`, and convert it.
#[derive(Debug)]
pub struct LoraLinear<B: Backend> {
    /// The pretrained layer.
    pub base: Linear<B>,
    adapter: Option<LoraAdapter<B>>,
    /// The adapters of the samples of a mixed batch.
    mixed: Option<Mixed<B>>,
    precision: Precision,
    quantized: Option<QuantizedWeight<B>>,
}

impl<B: Backend> LoraLinear<B> {
    /// Applies the layer: `[..., d_input]` to `[..., d_output]`, for inputs of any rank.
    ///
    /// # Panics
    ///
    /// If the input's last dimension is not `d_input`.
    pub fn forward<const D: usize>(&self, input: Tensor<B, D>) -> Tensor<B, D> {
        let [d_input, d_output] = self.weight_shape();
        let mut shape = input.dims();
        assert!(
            shape[D - 1] == d_input,
            "LoraLinear expects an input of [..., {d_input}], got {shape:?}"
        );
        if let Some(mixed) = &self.mixed {
            mixed.check(shape[0]);
        }
        shape[D - 1] = d_output;
        let rows = shape[..D - 1].iter().product();
        if rows == 0 {
            // `reshape` reads a size of 0 as "keep this size", so it cannot be used here.
            return Tensor::zeros(shape, &input.device());
        }
        if D == 2 {
            return with_rank(self.forward_rows(with_rank(input)));
        }
        // One matrix product for all rows. A product per batch element is slower, and the weight's
        // gradient then takes memory for each element.
        self.forward_rows(input.reshape([rows, d_input])).reshape(shape)
    }

    fn forward_rows(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        // Constants, whatever the flags of the base say.
        let constant = || self.weight(frozen);
        let bias = || self.base.bias.as_ref().map(frozen);
        match (&self.mixed, &self.adapter) {
            (Some(mixed), _) => mixed.forward_on(x, constant(), bias()),
            (None, Some(adapter)) => adapter.forward_on(x, constant(), bias()),
            (None, None) => {
                self.weight(Param::val).forward(x, self.base.bias.as_ref().map(Param::val))
            }
        }
    }

    /// What the layer multiplies with; `value` gives the numbers of a weight that is not quantized.
    fn weight(&self, value: impl Fn(&Param<Tensor<B, 2>>) -> Tensor<B, 2>) -> Weight<B> {
        match &self.quantized {
            Some(weight) => Weight::quantized(weight.clone(), self.precision),
            None => Weight::full(value(&self.base.weight), self.precision),
        }
    }

    /// The base's weight, as a constant.
    pub(crate) fn base_weight(&self) -> Weight<B> {
        self.weight(frozen)
    }

    /// Whether the samples of a batch have adapters of their own.
    pub(crate) fn is_mixed(&self) -> bool {
        self.mixed.is_some()
    }

    /// The weight, if it is all that the layer computes with.
    pub(super) fn plain_weight(&self) -> Option<Weight<B>> {
        let plain = self.mixed.is_none() && self.adapter.is_none() && self.base.bias.is_none();
        plain.then(|| self.weight(Param::val))
    }

    fn layout(&self) -> WeightLayout {
        WeightLayout::Matrix
    }

    fn can_take_bias(&self) -> bool {
        true
    }

    /// Whether the layer is one operation on CPU backends.
    fn has_form(&self) -> bool {
        true
    }
}

lora_layer!(LoraLinear, LoraLinearRecord, Linear, 2, weight, bias; quantized as quantised);
