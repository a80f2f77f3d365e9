//! How numbers are packed.

use serde::{Deserialize, Serialize};

/// A way to pack the rows of a matrix into bytes. Each row is divided into blocks of numbers that share a
/// scale, and its end is filled up to a whole block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Format {
    /// 8 bits, in blocks of 64.
    Int8,
    /// One of the 16 levels of [`NF4`], in blocks of 64.
    Nf4,
    /// 8 bits, in blocks of 32, as in GGUF files. The names are GGUF's.
    Q8_0,
    /// 4 bits, of which 8 stands for zero, in blocks of 32.
    Q4_0,
    /// 4 bits, and a smallest number for each block, in blocks of 32.
    Q4_1,
}

/// Two codes of 4 bits in a byte are this many numbers apart, which is how GGUF has them: the lower halves
/// of 16 bytes are 16 numbers, and the upper halves the next 16.
pub(crate) const APART: usize = 16;

/// The levels of NF4 (Dettmers et al. 2023, "QLoRA"): each is as likely as the others if the numbers are
/// normally distributed, one of them is 0, and the ends are -1 and 1.
pub(crate) const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// What a code stands for, before it is multiplied by the scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Levels {
    /// The code minus this.
    Minus(u8),
    /// The level with this number.
    Of(&'static [f32; 16]),
}

impl Format {
    /// The bits of a code: 4 or 8.
    pub fn bits(self) -> usize {
        match self {
            Self::Int8 | Self::Q8_0 => 8,
            Self::Nf4 | Self::Q4_0 | Self::Q4_1 => 4,
        }
    }

    /// The numbers that share a scale.
    pub fn block(self) -> usize {
        match self {
            Self::Int8 | Self::Nf4 => 64,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 => 32,
        }
    }

    /// The bytes of a block.
    pub fn block_bytes(self) -> usize {
        self.block() * self.bits() / 8
    }

    /// The bytes of a row of so many numbers.
    pub fn row_bytes(self, columns: usize) -> usize {
        columns.div_ceil(self.block()) * self.block_bytes()
    }

    pub fn levels(self) -> Levels {
        match self {
            Self::Int8 | Self::Q8_0 => Levels::Minus(128),
            Self::Nf4 => Levels::Of(&NF4),
            Self::Q4_0 => Levels::Minus(8),
            Self::Q4_1 => Levels::Minus(0),
        }
    }
}
