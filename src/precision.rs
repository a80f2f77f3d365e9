//! The precision of products.

use std::fmt;

/// The type of the numbers that layers multiply. It is a setting of a model, which
/// [`LoraModule::with_precision`](crate::LoraModule::with_precision) changes.
///
/// Whatever it is, weights, adapters, inputs, outputs, gradients and the optimizer's state are in the types that they
/// were in, and sums are in `f32`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Precision {
    /// As the tensors are, which is 24 bits of precision with `f32`.
    #[default]
    F32,
    /// On the CPU backends of the features `flex` and `ndarray`, both factors of a product are rounded to bfloat16 (8
    /// bits of precision, and the range of `f32`) as they are read, and products are added up in `f32`. Processors with
    /// instructions for this multiply several times as fast ([`bf16_is_fast`](Self::bf16_is_fast)).
    ///
    /// These stay in `f32`: the last product of a gradient of A or B, products of linear layers with at most four rows,
    /// attention of at most four queries, transposed convolutions and those with groups, and dense updates of an overlay.
    /// Other backends ignore the setting.
    Bf16,
}

impl Precision {
    /// Whether this processor multiplies bf16 faster than `f32`.
    ///
    /// # Panics
    ///
    /// If the environment variable `BURN_LORA_KERNELS` names instructions that are not there. So do products in bf16.
    pub fn bf16_is_fast() -> bool {
        burn_lora_kernels::instructions().multiply_bf16()
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        })
    }
}
