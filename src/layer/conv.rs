use burn::{
    module::Param,
    nn::conv::{Conv1d, Conv2d, ConvTranspose2d},
    record::Record,
    tensor::{Tensor, backend::Backend},
};

use super::{WeightLayout, constant, fixed, module::lora_layer};
use crate::{LoraAdapter, adapter::LoraAdapterRecord};

/// A drop-in for Burn's [`Conv1d`] that can carry an adapter; see [`LoraConv2d`], of which it is the
/// sibling with one spatial dimension.
#[derive(Debug)]
pub struct LoraConv1d<B: Backend> {
    /// The pretrained layer.
    pub base: Conv1d<B>,
    adapter: Option<LoraAdapter<B>>,
}

/// A drop-in for Burn's [`Conv2d`] that can carry an adapter.
///
/// The kernel `[channels_out, channels_in / groups, height, width]` is seen as the matrix
/// `[channels_in / groups · height · width, channels_out]` that multiplies each patch of the input.
/// Its update needs no kernel of that size: the input is convolved with `rank` filters, made of A,
/// as the base convolves it with `channels_out`, with the same stride, padding, dilation and groups;
/// B then mixes the `rank` results at each place, which is a convolution with a 1×1 kernel. With
/// groups, every group of channels is convolved with the same `rank` filters.
///
/// ```
/// use burn::{backend::Flex, nn::{PaddingConfig2d, conv::Conv2dConfig}, tensor::Tensor};
/// use burn_lora::{LoraConfig, LoraConv2d};
///
/// let device = Default::default();
/// let base = Conv2dConfig::new([16, 32], [3, 3]).with_padding(PaddingConfig2d::Same);
/// let layer: LoraConv2d<Flex> = LoraConfig::new(4, 8.0).init(base.init(&device));
/// let y = layer.forward(Tensor::ones([1, 16, 8, 8], &device));
/// assert_eq!(y.dims(), [1, 32, 8, 8]);
/// ```
///
/// Freezing, parameter paths, files and records are those of [`LoraLinear`](crate::LoraLinear).
/// PEFT's files have no place for adapters with groups: saving them is an error.
#[derive(Debug)]
pub struct LoraConv2d<B: Backend> {
    /// The pretrained layer.
    pub base: Conv2d<B>,
    adapter: Option<LoraAdapter<B>>,
}

/// A drop-in for Burn's [`ConvTranspose2d`] that can carry an adapter.
///
/// The kernel `[channels_in, channels_out / groups, height, width]` is seen as the matrix
/// `[channels_in · height · width, channels_out / groups]`. The update is a transposed convolution
/// of the input to `rank` channels per group, with the base's stride, padding and dilation, followed
/// by B at each place of the output. With groups, B is the same for all of them, and cannot have a
/// bias.
///
/// Freezing, parameter paths and records are those of [`LoraLinear`](crate::LoraLinear). PEFT's
/// files have no place for such adapters: saving them is an error.
#[derive(Debug)]
pub struct LoraConvTranspose2d<B: Backend> {
    /// The pretrained layer.
    pub base: ConvTranspose2d<B>,
    adapter: Option<LoraAdapter<B>>,
}

/// What a record keeps of a [`LoraConv1d`]: the parameters of the base, and the adapter.
#[derive(Debug, Clone, Record)]
pub struct LoraConv1dRecord<B: Backend> {
    /// The base's kernel: `[channels_out, channels_in / groups, kernel]`.
    pub weight: Param<Tensor<B, 3>>,
    /// The base's bias, if it has one: `[channels_out]`.
    pub bias: Option<Param<Tensor<B, 1>>>,
    /// The adapter, if there is one.
    pub adapter: Option<LoraAdapterRecord<B>>,
}

/// What a record keeps of a [`LoraConv2d`]: the parameters of the base, and the adapter.
#[derive(Debug, Clone, Record)]
pub struct LoraConv2dRecord<B: Backend> {
    /// The base's kernel: `[channels_out, channels_in / groups, height, width]`.
    pub weight: Param<Tensor<B, 4>>,
    /// The base's bias, if it has one: `[channels_out]`.
    pub bias: Option<Param<Tensor<B, 1>>>,
    /// The adapter, if there is one.
    pub adapter: Option<LoraAdapterRecord<B>>,
}

/// What a record keeps of a [`LoraConvTranspose2d`]: the parameters of the base, and the adapter.
#[derive(Debug, Clone, Record)]
pub struct LoraConvTranspose2dRecord<B: Backend> {
    /// The base's kernel: `[channels_in, channels_out / groups, height, width]`.
    pub weight: Param<Tensor<B, 4>>,
    /// The base's bias, if it has one: `[channels_out]`.
    pub bias: Option<Param<Tensor<B, 1>>>,
    /// The adapter, if there is one.
    pub adapter: Option<LoraAdapterRecord<B>>,
}

impl<B: Backend> LoraConv1d<B> {
    /// Applies the layer: `[batch, channels_in, length]` to `[batch, channels_out, length_out]`.
    pub fn forward(&self, input: Tensor<B, 3>) -> Tensor<B, 3> {
        let Some(adapter) = &self.adapter else { return self.base.forward(input) };
        let like_base = |weight, bias| Conv1d { weight, bias, ..self.base.clone() };
        let base = like_base(fixed(&self.base.weight), self.base.bias.as_ref().map(fixed));
        let [_, channels, kernel] = self.base.weight.dims();
        let update = adapter.forward_conv(input.clone(), self.base.groups, |x, a| {
            let filters = self.layout().to_weight(a, [adapter.rank(), channels, kernel]);
            like_base(constant(for_each_group(filters, self.base.groups)), None).forward(x)
        });
        base.forward(input) + update
    }

    fn layout(&self) -> WeightLayout {
        let [_, _, kernel] = self.base.weight.shape().dims();
        WeightLayout::Conv { kernel: vec![kernel], groups: self.base.groups }
    }

    fn can_take_bias(&self) -> bool {
        true
    }
}

impl<B: Backend> LoraConv2d<B> {
    /// Applies the layer: `[batch, channels_in, height, width]` to
    /// `[batch, channels_out, height_out, width_out]`.
    pub fn forward(&self, input: Tensor<B, 4>) -> Tensor<B, 4> {
        let Some(adapter) = &self.adapter else { return self.base.forward(input) };
        let like_base = |weight, bias| Conv2d { weight, bias, ..self.base.clone() };
        let base = like_base(fixed(&self.base.weight), self.base.bias.as_ref().map(fixed));
        let [_, channels, height, width] = self.base.weight.dims();
        let update = adapter.forward_conv(input.clone(), self.base.groups, |x, a| {
            let filters = self.layout().to_weight(a, [adapter.rank(), channels, height, width]);
            like_base(constant(for_each_group(filters, self.base.groups)), None).forward(x)
        });
        base.forward(input) + update
    }

    fn layout(&self) -> WeightLayout {
        let [_, _, height, width] = self.base.weight.shape().dims();
        WeightLayout::Conv { kernel: vec![height, width], groups: self.base.groups }
    }

    fn can_take_bias(&self) -> bool {
        true
    }
}

impl<B: Backend> LoraConvTranspose2d<B> {
    /// Applies the layer: `[batch, channels_in, height, width]` to
    /// `[batch, channels_out, height_out, width_out]`.
    pub fn forward(&self, input: Tensor<B, 4>) -> Tensor<B, 4> {
        let Some(adapter) = &self.adapter else { return self.base.forward(input) };
        let like_base = |weight, bias| ConvTranspose2d { weight, bias, ..self.base.clone() };
        let base = like_base(fixed(&self.base.weight), self.base.bias.as_ref().map(fixed));
        let [channels, _, height, width] = self.base.weight.dims();
        let update = adapter.forward_conv(input.clone(), self.base.groups, |x, a| {
            let filters = self.layout().to_weight(a, [channels, adapter.rank(), height, width]);
            like_base(constant(filters), None).forward(x)
        });
        base.forward(input) + update
    }

    fn layout(&self) -> WeightLayout {
        let [_, _, height, width] = self.base.weight.shape().dims();
        WeightLayout::ConvTranspose { kernel: vec![height, width] }
    }

    /// The matrix has one column for a channel of all groups, where the bias has one for each.
    fn can_take_bias(&self) -> bool {
        self.base.groups == 1
    }
}

/// The same filters for every group of channels.
fn for_each_group<B: Backend, const D: usize>(
    filters: Tensor<B, D>,
    groups: usize,
) -> Tensor<B, D> {
    // Not `repeat_dim`: Burn 0.21 gets its gradient wrong.
    Tensor::cat(vec![filters; groups], 0)
}

lora_layer!(LoraConv1d, Conv1d, LoraConv1dRecord, weight, bias);
lora_layer!(LoraConv2d, Conv2d, LoraConv2dRecord, weight, bias);
lora_layer!(LoraConvTranspose2d, ConvTranspose2d, LoraConvTranspose2dRecord, weight, bias);
