//! Convolutions that take up what the norm after them does.

use burn::{
    module::{Param, ParamId},
    tensor::{Tensor, backend::Backend},
};

use super::{LoraConv1d, LoraConv2d, LoraLayer};
use crate::tensors::{at_least_f32, cast, frozen};

/// A convolution that a norm can be [folded](super::BatchNorm::fold_into) into.
pub trait Foldable<B: Backend>: Sealed {
    /// Multiplies each output channel by a factor, and adds a summand to it: both `[channels]`.
    ///
    /// # Panics
    ///
    /// If there are not so many output channels, or there is an adapter.
    fn scale_outputs(&mut self, channels: usize, factor: Tensor<B, 1>, summand: Tensor<B, 1>);
}

/// Only this crate's convolutions are such.
pub trait Sealed {}

macro_rules! foldable {
    ($conv:ident, $dims:literal) => {
        impl<B: Backend> Sealed for $conv<B> {}

        impl<B: Backend> Foldable<B> for $conv<B> {
            fn scale_outputs(
                &mut self,
                channels: usize,
                factor: Tensor<B, 1>,
                summand: Tensor<B, 1>,
            ) {
                let mut shape = [1; $dims];
                shape[0] = self.base.weight.shape()[0];
                assert!(
                    channels == shape[0],
                    "a norm of {} channels expected, got one of {channels}",
                    shape[0],
                );
                assert!(
                    LoraLayer::adapter(self).is_none(),
                    "a convolution without an adapter expected: merge it first"
                );
                let weight = frozen(&self.base.weight);
                let dtype = weight.dtype();
                let scaled = at_least_f32(weight) * factor.clone().reshape(shape);
                let bias = match &self.base.bias {
                    Some(bias) => at_least_f32(frozen(bias)) * factor + summand,
                    None => summand,
                };
                let of = |param: Option<ParamId>| param.unwrap_or_else(ParamId::new);
                let bias_id = of(self.base.bias.as_ref().map(|it| it.id));
                self.base.weight = Param::initialized(self.base.weight.id, cast(scaled, dtype));
                self.base.bias = Some(Param::initialized(bias_id, cast(bias, dtype)));
            }
        }
    };
}

foldable!(LoraConv1d, 3);
foldable!(LoraConv2d, 4);
