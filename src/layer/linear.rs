mod module;

use burn::{
    module::{Module, Param, ParamId},
    nn::Linear,
    tensor::{ElementConversion, Tensor, backend::Backend, module::linear},
};

use super::LoraLayer;
use crate::{
    LoraAdapter, LoraConfig,
    adapter::{at_least_f32, frozen},
};

pub use module::LoraLinearRecord;

/// A drop-in for Burn's [`Linear`] that can carry an adapter: `y = x·W + b + s·(x·A)·B`, with W and
/// b frozen.
///
/// Without an adapter it *is* a `Linear`: the same output, the same trainable parameters, the same
/// parameter paths (`weight`, `bias`). One model struct thus serves for pretraining, for tuning and,
/// merged, for inference, and it loads records, safetensors and PyTorch files that were written for
/// `Linear` fields.
///
/// ```
/// use burn::{backend::Flex, nn::LinearConfig};
/// use burn_lora::{LoraConfig, LoraLinear};
///
/// let device = Default::default();
/// let base = LinearConfig::new(784, 256).init::<Flex>(&device);
/// let layer: LoraLinear<Flex> = LoraConfig::new(4, 8.0).init(base);
/// ```
///
/// # Freezing
///
/// With an adapter, no gradient ever reaches the base: its forward pass takes the weight and the
/// bias as constants, whatever their flags say, and autodiff skips the work for them.
///
/// # Records
///
/// The record holds the base and the adapter. Loading one that has an adapter attaches it; loading
/// one without, such as a record of a plain `Linear`, replaces the base and keeps the adapter that
/// is there. Formats without field names (Burn's `BinFileRecorder` and its kin) cannot tell a
/// `Linear` from a `LoraLinear`: load such a file into a `Linear`, and convert that.
#[derive(Debug)]
pub struct LoraLinear<B: Backend> {
    /// The pretrained layer.
    pub base: Linear<B>,
    adapter: Option<LoraAdapter<B>>,
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
        shape[D - 1] = d_output;
        let rows = shape[..D - 1].iter().product();
        if rows == 0 {
            // To `reshape`, a size of 0 means something else.
            return Tensor::zeros(shape, &input.device());
        }
        // One matrix product for all rows: a product per batch is slower, and the gradient of the
        // weight would take memory for each of them.
        self.forward_rows(input.reshape([rows, d_input])).reshape(shape)
    }

    fn forward_rows(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let Some(adapter) = &self.adapter else { return self.base.forward(x) };
        let bias = self.base.bias.as_ref().map(frozen);
        linear(x.clone(), frozen(&self.base.weight), bias) + adapter.forward(x)
    }
}

impl<B: Backend> From<Linear<B>> for LoraLinear<B> {
    /// The layer without an adapter; nothing is copied or frozen.
    fn from(base: Linear<B>) -> Self {
        Self { base, adapter: None }
    }
}

impl<B: Backend> LoraLayer<B> for LoraLinear<B> {
    fn adapter(&self) -> Option<&LoraAdapter<B>> {
        self.adapter.as_ref()
    }

    fn set_adapter(&mut self, adapter: Option<LoraAdapter<B>>) {
        if let Some(adapter) = &adapter {
            let shape = self.weight_shape();
            assert!(
                adapter.shape() == shape,
                "the adapter must fit the weight: expected {shape:?} = [d_input, d_output], got {:?}",
                adapter.shape(),
            );
            // This also draws the values of a base that was never used: it must have the same ones
            // in every clone from here on.
            self.base = self.base.clone().no_grad();
        }
        self.adapter = adapter;
    }

    fn weight_shape(&self) -> [usize; 2] {
        // Not the lazy shape: of a column layout it is the transpose until the value is drawn.
        self.base.weight.shape().dims()
    }

    fn weight_matrix(&self) -> Tensor<B, 2> {
        frozen(&self.base.weight)
    }

    fn num_base_params(&self) -> usize {
        let [d_input, d_output] = self.weight_shape();
        d_input * d_output + if self.base.bias.is_some() { d_output } else { 0 }
    }

    fn device(&self) -> B::Device {
        self.base.weight.lazy_device()
    }

    fn merge_adapter(&mut self) -> bool {
        let Some(adapter) = &self.adapter else { return true };
        let weight = plus(&self.base.weight, adapter.delta());
        let bias = match (&self.base.bias, adapter.bias_delta()) {
            (Some(bias), Some(delta)) => Some(plus(bias, delta)),
            (None, Some(delta)) => Some(constant(delta)),
            (bias, None) => bias.clone(),
        };
        let finite = is_finite(&weight) && bias.as_ref().is_none_or(is_finite);
        if finite {
            self.base = Linear { weight, bias };
            self.adapter = None;
        }
        finite
    }
}

impl LoraConfig {
    /// Puts a fresh adapter on a trained layer. Everything that concerns a whole model, such as the
    /// targets, is ignored.
    ///
    /// # Panics
    ///
    /// If a value of the configuration is invalid.
    pub fn init<B: Backend>(&self, base: Linear<B>) -> LoraLinear<B> {
        if let Err(error) = self.validate() {
            panic!("{error}");
        }
        let mut layer = LoraLinear::from(base);
        let adapter = LoraAdapter::init(self, layer.weight_shape(), &layer.device());
        layer.set_adapter(Some(adapter));
        layer
    }
}

/// The parameter plus `delta`, formed in `f32` or better, in the parameter's own precision, and
/// frozen.
fn plus<B: Backend, const D: usize>(
    param: &Param<Tensor<B, D>>,
    delta: Tensor<B, D>,
) -> Param<Tensor<B, D>> {
    let delta = delta.detach().set_require_grad(false);
    param.clone().map(|value| {
        let dtype = value.dtype();
        let value = at_least_f32(value.detach().set_require_grad(false));
        (value.clone() + delta.cast(value.dtype())).cast(dtype)
    })
}

fn constant<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Param<Tensor<B, D>> {
    Param::initialized(ParamId::new(), tensor.detach().set_require_grad(false))
}

fn is_finite<B: Backend, const D: usize>(param: &Param<Tensor<B, D>>) -> bool {
    param.val().is_finite().all().into_scalar().elem()
}
