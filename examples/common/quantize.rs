//! What a base can be quantized to, as an argument.

use burn_lora::quantize::Quantization;
use clap::ValueEnum;

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Kind {
    Int8,
    Nf4,
}

impl From<Kind> for Quantization {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Int8 => Self::Int8,
            Kind::Nf4 => Self::Nf4,
        }
    }
}
