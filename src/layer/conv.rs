use burn::{
    module::Param,
    nn::{
        PaddingConfig1d, PaddingConfig2d,
        conv::{Conv1d, Conv2d, ConvTranspose2d},
    },
    tensor::{Tensor, backend::Backend},
};

use super::{cat, constant, fixed, module::lora_layer};
use crate::adapter::{LoraAdapter, WeightLayout, add};

/// A drop-in for Burn's [`Conv1d`] that can carry an adapter. It works like [`LoraConv2d`], with one
/// spatial dimension.
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
/// A forward pass does not form an update of that size. The input is convolved with the columns of A,
/// which are `rank` filters, with the base's stride, padding, dilation and groups. B then mixes the
/// `rank` results at each position, like a convolution with a 1×1 kernel. With groups, every group of
/// channels is convolved with the same `rank` filters.
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
/// Freezing, parameter paths, files and records work as in [`LoraLinear`](crate::LoraLinear). PEFT
/// computes a different update for convolutions with groups, so saving such adapters is an error.
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
/// by B at each position of the output. With groups, all groups share B, and the adapter cannot have a
/// bias.
///
/// Freezing, parameter paths and records work as in [`LoraLinear`](crate::LoraLinear). PEFT has no
/// adapters for transposed convolutions, so saving them is an error.
#[derive(Debug)]
pub struct LoraConvTranspose2d<B: Backend> {
    /// The pretrained layer.
    pub base: ConvTranspose2d<B>,
    adapter: Option<LoraAdapter<B>>,
}

impl<B: Backend> LoraConv1d<B> {
    /// Applies the layer: `[batch, channels_in, length]` to `[batch, channels_out, length_out]`.
    pub fn forward(&self, input: Tensor<B, 3>) -> Tensor<B, 3> {
        let Some(adapter) = &self.adapter else { return self.base.forward(input) };
        let Conv1d { weight, bias, groups, .. } = &self.base;
        forward(adapter, weight, bias.as_ref(), *groups, input, |x, weight, bias| {
            if *groups == 1 {
                return Conv1d { weight, bias, ..self.base.clone() }.forward(x);
            }
            self.in_two_dimensions(weight, bias).forward(x.unsqueeze_dim(2)).squeeze_dim(2)
        })
    }

    /// The same convolution of images of height 1. Burn's gradient of a kernel of one dimension is
    /// wrong for groups and a stride that leaves a remainder.
    fn in_two_dimensions(
        &self,
        weight: Param<Tensor<B, 3>>,
        bias: Option<Param<Tensor<B, 1>>>,
    ) -> Conv2d<B> {
        let Conv1d { stride, kernel_size, dilation, groups, padding, .. } = self.base.clone();
        let padding = match padding {
            PaddingConfig1d::Same => PaddingConfig2d::Same,
            PaddingConfig1d::Valid => PaddingConfig2d::Valid,
            PaddingConfig1d::Explicit(left, right) => PaddingConfig2d::Explicit(0, left, 0, right),
        };
        Conv2d {
            weight: constant(weight.val().unsqueeze_dim(2)),
            bias,
            stride: [1, stride],
            kernel_size: [1, kernel_size],
            dilation: [1, dilation],
            groups,
            padding,
        }
    }

    fn layout(&self) -> WeightLayout {
        let kernel = self.base.weight.shape()[2..].to_vec();
        WeightLayout::Conv { kernel, groups: self.base.groups }
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
        let Conv2d { weight, bias, groups, .. } = &self.base;
        forward(adapter, weight, bias.as_ref(), *groups, input, |x, weight, bias| {
            Conv2d { weight, bias, ..self.base.clone() }.forward(x)
        })
    }

    fn layout(&self) -> WeightLayout {
        let kernel = self.base.weight.shape()[2..].to_vec();
        WeightLayout::Conv { kernel, groups: self.base.groups }
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
        let ConvTranspose2d { weight, bias, groups, .. } = &self.base;
        forward(adapter, weight, bias.as_ref(), *groups, input, |x, weight, bias| {
            ConvTranspose2d { weight, bias, ..self.base.clone() }.forward(x)
        })
    }

    fn layout(&self) -> WeightLayout {
        WeightLayout::ConvTranspose { kernel: self.base.weight.shape()[2..].to_vec() }
    }

    /// With groups, all groups share the columns of the matrix, but the base's bias has an element for
    /// each channel of each group.
    fn can_take_bias(&self) -> bool {
        self.base.groups == 1
    }
}

/// The output of a convolution with an adapter. `convolve` applies the base with another kernel and
/// bias: once with W and b as constants, and once with the filters in A.
fn forward<B: Backend, const D: usize>(
    adapter: &LoraAdapter<B>,
    weight: &Param<Tensor<B, D>>,
    bias: Option<&Param<Tensor<B, 1>>>,
    groups: usize,
    input: Tensor<B, D>,
    convolve: impl Fn(Tensor<B, D>, Param<Tensor<B, D>>, Option<Param<Tensor<B, 1>>>) -> Tensor<B, D>,
) -> Tensor<B, D> {
    let base = convolve(input.clone(), fixed(weight), bias.map(fixed));
    if base.shape().num_elements() == 0 {
        // Burn's backends crash at some operations on empty tensors.
        return base;
    }
    let update = adapter.forward_conv(input, groups, |x, a| {
        let transposed = matches!(adapter.layout, WeightLayout::ConvTranspose { .. });
        let mut dims = weight.dims();
        dims[usize::from(transposed)] = adapter.rank();
        let filters = adapter.layout.to_weight(a, dims);
        let filters = if transposed { filters } else { for_each_group(filters, groups) };
        convolve(x, constant(filters), None)
    });
    add(base, update)
}

/// The same filters for every group of channels.
fn for_each_group<B: Backend, const D: usize>(
    filters: Tensor<B, D>,
    groups: usize,
) -> Tensor<B, D> {
    if groups == 1 {
        return filters;
    }
    // `repeat_dim` cannot be used, because its gradient is wrong in Burn 0.21.
    cat(&vec![filters; groups], 0)
}

lora_layer!(LoraConv1d, Conv1d, 3, weight, bias);
lora_layer!(LoraConv2d, Conv2d, 4, weight, bias);
lora_layer!(LoraConvTranspose2d, ConvTranspose2d, 4, weight, bias);
