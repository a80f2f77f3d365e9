//! What a base can be quantized to, as an argument.

use burn_lora::quantize::Quantization;
use clap::ValueEnum;

/// The type to which weights are quantized.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Kind {
    /// 8 bits.
    Int8,
    /// 4 bits: NormalFloat.
    Nf4,
    /// 16 bits: bfloat16.
    Bf16,
}

impl From<Kind> for Quantization {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Int8 => Self::Int8,
            Kind::Nf4 => Self::Nf4,
            Kind::Bf16 => Self::Bf16,
        }
    }
}
