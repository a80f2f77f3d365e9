use burn::{
    module::Param,
    nn::{
        PaddingConfig1d, PaddingConfig2d,
        conv::{Conv1d, Conv2d, ConvTranspose2d},
    },
    tensor::{DType, Tensor, backend::Backend},
};

use super::{LoraLayer, constant, fixed, module::lora_layer};
use crate::{
    adapter::{Factor, LoraAdapter, Mixed, WeightLayout},
    burn_faults::repeated,
    ops::{Conv, Convolve, run, runs_on},
    precision::Precision,
    tensors::{add, cast, frozen},
};

/// A drop-in for Burn's [`Conv1d`] that can carry an adapter. It works like [`LoraConv2d`], with one
/// spatial dimension.
#[derive(Debug)]
pub struct LoraConv1d<B: Backend> {
    /// The pretrained layer.
    pub base: Conv1d<B>,
    adapter: Option<LoraAdapter<B>>,
    /// The adapters of the samples of a mixed batch.
    mixed: Option<Mixed<B>>,
    precision: Precision,
}

/// A drop-in for Burn's [`Conv2d`] that can carry an adapter.
///
/// The kernel `[channels_out, channels_in / groups, height, width]` is seen as the matrix
/// `[channels_in / groups · height · width, channels_out]` that multiplies each patch of the input.
/// With Burn's operations, a forward pass does not form an update of that size. The input is convolved
/// with the columns of A, which are `rank` filters, with the base's stride, padding, dilation and groups.
/// B then mixes the `rank` results at each position, like a convolution with a 1×1 kernel. With groups,
/// every group of channels is convolved with the same `rank` filters.
///
/// On the CPU backends of the features `flex` and `ndarray`, a layer without groups and without active
/// dropout is one operation, with an adapter and without. Training is faster than with Burn's convolution: on
/// `ndarray` the gradient of the input took 30 times as long. The update is added to the kernel there, which
/// is small beside the images, and the gradients of A and B are still computed by rank.
///
/// ```
/// use burn::{backend::Flex, nn::{PaddingConfig2d, conv::Conv2dConfig}, tensor::Tensor};
/// use burn_lora::{LoraConfig, nn::LoraConv2d};
///
/// let device = Default::default();
/// let base = Conv2dConfig::new([16, 32], [3, 3]).with_padding(PaddingConfig2d::Same);
/// let layer: LoraConv2d<Flex> = LoraConfig::peft(4, 8.0).init(base.init(&device));
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
    /// The adapters of the samples of a mixed batch.
    mixed: Option<Mixed<B>>,
    precision: Precision,
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
    /// The adapters of the samples of a mixed batch.
    mixed: Option<Mixed<B>>,
    precision: Precision,
}

impl<B: Backend> LoraConv1d<B> {
    /// Applies the layer: `[batch, channels_in, length]` to `[batch, channels_out, length_out]`.
    pub fn forward(&self, input: Tensor<B, 3>) -> Tensor<B, 3> {
        if let Some(mixed) = &self.mixed {
            let with = |adapter| Self {
                base: self.base.clone(),
                adapter,
                mixed: None,
                precision: self.precision,
            };
            return mixed.each(&input, |adapter, x| with(adapter.cloned()).forward(x));
        }
        let normalized = normalized(self, &self.base.bias, &input, |x, factor| {
            let (weight, adapter) = factor_of(self, &self.base.weight, factor);
            let base = Conv1d { weight, bias: None, ..self.base.clone() };
            Self { base, adapter, mixed: None, precision: self.precision }.forward(x)
        });
        if let Some(y) = normalized {
            return y;
        }
        let Conv1d { weight, bias, groups, .. } = &self.base;
        let flat = || {
            let base = self.in_two_dimensions(known(weight), bias.as_ref().map(known));
            (input.clone().unsqueeze_dim(2), base)
        };
        if let Some(y) =
            in_one_operation(weight, *groups, self.adapter.as_ref(), self.precision, flat)
        {
            return y.squeeze_dim(2);
        }
        let Some(adapter) = &self.adapter else { return self.base.forward(input) };
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

    /// Whether the layer is one operation on CPU backends.
    fn has_form(&self) -> bool {
        self.base.groups == 1
    }
}

impl<B: Backend> LoraConv2d<B> {
    /// Applies the layer: `[batch, channels_in, height, width]` to
    /// `[batch, channels_out, height_out, width_out]`.
    pub fn forward(&self, input: Tensor<B, 4>) -> Tensor<B, 4> {
        if let Some(mixed) = &self.mixed {
            let with = |adapter| Self {
                base: self.base.clone(),
                adapter,
                mixed: None,
                precision: self.precision,
            };
            return mixed.each(&input, |adapter, x| with(adapter.cloned()).forward(x));
        }
        let normalized = normalized(self, &self.base.bias, &input, |x, factor| {
            let (weight, adapter) = factor_of(self, &self.base.weight, factor);
            let base = Conv2d { weight, bias: None, ..self.base.clone() };
            Self { base, adapter, mixed: None, precision: self.precision }.forward(x)
        });
        if let Some(y) = normalized {
            return y;
        }
        let Conv2d { weight, bias, groups, .. } = &self.base;
        let base = || {
            let (weight, bias) = (known(weight), bias.as_ref().map(known));
            (input.clone(), Conv2d { weight, bias, ..self.base.clone() })
        };
        if let Some(y) =
            in_one_operation(weight, *groups, self.adapter.as_ref(), self.precision, base)
        {
            return y;
        }
        let Some(adapter) = &self.adapter else { return self.base.forward(input) };
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

    /// Whether the layer is one operation on CPU backends.
    fn has_form(&self) -> bool {
        self.base.groups == 1
    }
}

impl<B: Backend> LoraConvTranspose2d<B> {
    /// Applies the layer: `[batch, channels_in, height, width]` to
    /// `[batch, channels_out, height_out, width_out]`.
    pub fn forward(&self, input: Tensor<B, 4>) -> Tensor<B, 4> {
        if let Some(mixed) = &self.mixed {
            let with = |adapter| Self {
                base: self.base.clone(),
                adapter,
                mixed: None,
                precision: self.precision,
            };
            return mixed.each(&input, |adapter, x| with(adapter.cloned()).forward(x));
        }
        let normalized = normalized(self, &self.base.bias, &input, |x, factor| {
            let (weight, adapter) = factor_of(self, &self.base.weight, factor);
            let base = ConvTranspose2d { weight, bias: None, ..self.base.clone() };
            Self { base, adapter, mixed: None, precision: self.precision }.forward(x)
        });
        if let Some(y) = normalized {
            return y;
        }
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

    fn has_form(&self) -> bool {
        false
    }
}

/// The output of a layer whose adapter has magnitudes; `None` if it has none. `forward` applies the layer
/// without its bias, with the factor that it is given.
fn normalized<B: Backend, const D: usize>(
    layer: &dyn LoraLayer<B>,
    bias: &Option<Param<Tensor<B, 1>>>,
    input: &Tensor<B, D>,
    forward: impl Fn(Tensor<B, D>, Factor<B>) -> Tensor<B, D>,
) -> Option<Tensor<B, D>> {
    let adapter = layer.adapter().filter(|it| it.magnitude.is_some())?;
    let (weight, bias) = (layer.weight_matrix(), bias.as_ref().map(frozen));
    Some(adapter.forward_normalized(input.clone(), weight, bias, forward))
}

/// The kernel and the adapter of a layer that multiplies by `factor`.
fn factor_of<B: Backend, const D: usize>(
    layer: &dyn LoraLayer<B>,
    kernel: &Param<Tensor<B, D>>,
    factor: Factor<B>,
) -> (Param<Tensor<B, D>>, Option<LoraAdapter<B>>) {
    match factor {
        Factor::Base => (fixed(kernel), None),
        Factor::Updated(adapter) => (kernel.clone(), Some(adapter.clone())),
        Factor::Matrix(matrix) => {
            let sum = layer.weight_layout().to_weight(matrix, kernel.dims());
            (constant(cast(sum, kernel.dtype())), None)
        }
    }
}

/// The parameter with its values. A clone of one that was never used would draw its own.
fn known<B: Backend, const D: usize>(param: &Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
    constant(param.val())
}

/// The output of a convolution as one operation; `None` where Burn's operations are used. `given` are the
/// input and the base.
fn in_one_operation<B: Backend, const D: usize>(
    weight: &Param<Tensor<B, D>>,
    groups: usize,
    adapter: Option<&LoraAdapter<B>>,
    precision: Precision,
    given: impl FnOnce() -> (Tensor<B, 4>, Conv2d<B>),
) -> Option<Tensor<B, 4>> {
    if groups > 1 || !runs_on::<B>() || weight.val().dtype() != DType::F32 {
        return None;
    }
    if adapter.is_some_and(|it| it.dropout.prob > 0.0 && B::ad_enabled(&weight.val().device())) {
        return None;
    }
    let (input, base) = given();
    let Conv2d { weight, bias, kernel_size, stride, dilation, padding, .. } = base;
    let around = |d: usize| {
        let (size, stride) = (input.dims()[d + 2], stride[d].max(1));
        let needed =
            (size.div_ceil(stride) * stride + kernel_size[d]).saturating_sub(size + stride);
        (needed / 2, needed.div_ceil(2))
    };
    let padding = match padding {
        PaddingConfig2d::Valid => [0; 4],
        PaddingConfig2d::Explicit(top, left, bottom, right) => [top, left, bottom, right],
        PaddingConfig2d::Same => {
            let ((top, bottom), (left, right)) = (around(0), around(1));
            [top, left, bottom, right]
        }
    };
    let (kernel, bias) = match adapter {
        Some(it) => (frozen(&weight), it.with_bias_delta(bias.as_ref().map(frozen))?),
        None => (weight.val(), bias.map(|it| it.val())),
    };
    let adapter = adapter.map(|it| {
        let [a, b] = it.factors();
        (a, b, it.scale())
    });
    let conv = Conv { kernel, bias, adapter, stride, dilation, padding, precision };
    run::<Convolve, B>(&(input, conv))
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
        dims[usize::from(transposed)] = a.dims()[1];
        let filters = adapter.layout.to_weight(a, dims);
        // The same filters for every group of channels.
        let filters = if transposed { filters } else { repeated(filters, groups) };
        convolve(x, constant(filters), None)
    });
    add(base, update)
}

lora_layer!(LoraConv1d, LoraConv1dRecord, Conv1d, 3, weight, bias);
lora_layer!(LoraConv2d, LoraConv2dRecord, Conv2d, 4, weight, bias);
lora_layer!(LoraConvTranspose2d, LoraConvTranspose2dRecord, ConvTranspose2d, 4, weight, bias);
