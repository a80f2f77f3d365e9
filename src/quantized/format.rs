//! How numbers are packed.

use burn_lora_kernels::BlockFormat;
use serde::{Deserialize, Serialize};

/// A way to pack the rows of a matrix into bytes. Each row is divided into blocks of numbers that share a
/// scale, and its end is filled up to a whole block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(non_camel_case_types, reason = "these are the names that GGUF's users know")]
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
    /// The upper half of an `f32`, without scales: two numbers in each word.
    Bf16,
    /// As in GGUF files, with the scales among the codes. So are all others below.
    Q5_0,
    Q5_1,
    Q4_K,
    Q5_K,
    Q6_K,
    Q2_K,
    Q3_K,
    IQ4_NL,
    IQ4_XS,
    /// Half precision, without scales: two numbers in each word.
    F16,
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
    /// The upper half of the number's bits. There is no scale.
    Upper,
    /// The number's bits in half precision. There is no scale.
    Half,
    /// What it is in these blocks, which have their scales.
    Blocks(BlockFormat),
}

impl Format {
    /// Whether two codes of 4 bits are in a byte, without anything else.
    pub fn packs_two(self) -> bool {
        matches!(self, Self::Nf4 | Self::Q4_0 | Self::Q4_1)
    }

    /// Whether scales lie apart from the codes.
    pub fn is_scaled(self) -> bool {
        !matches!(self.levels(), Levels::Upper | Levels::Half | Levels::Blocks(_))
    }

    /// Whether scales, and smallest numbers, that lie apart are numbers of half precision.
    pub fn has_halves(self) -> bool {
        matches!(self, Self::Q8_0 | Self::Q4_0 | Self::Q4_1)
    }

    /// Whether blocks have a smallest number that lies apart from the codes.
    pub fn has_minima(self) -> bool {
        self == Self::Q4_1
    }

    /// The numbers that share a scale, or a word, or are packed together.
    pub fn block(self) -> usize {
        match self.levels() {
            Levels::Blocks(format) => format.block(),
            Levels::Upper | Levels::Half => 2,
            _ if matches!(self, Self::Int8 | Self::Nf4) => 64,
            _ => 32,
        }
    }

    /// The bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self.levels() {
            Levels::Blocks(format) => format.bytes(),
            Levels::Upper | Levels::Half => 2 * self.block(),
            _ if self.packs_two() => self.block() / 2,
            _ => self.block(),
        }
    }

    /// The bytes of a row of so many numbers, which are whole words.
    pub fn row_bytes(self, columns: usize) -> usize {
        (columns.div_ceil(self.block()) * self.block_bytes()).next_multiple_of(4)
    }

    pub fn levels(self) -> Levels {
        match self {
            Self::Bf16 => Levels::Upper,
            Self::F16 => Levels::Half,
            Self::Int8 | Self::Q8_0 => Levels::Minus(128),
            Self::Nf4 => Levels::Of(&NF4),
            Self::Q4_0 => Levels::Minus(8),
            Self::Q4_1 => Levels::Minus(0),
            Self::Q5_0 => Levels::Blocks(BlockFormat::Q5_0),
            Self::Q5_1 => Levels::Blocks(BlockFormat::Q5_1),
            Self::Q4_K => Levels::Blocks(BlockFormat::Q4_K),
            Self::Q5_K => Levels::Blocks(BlockFormat::Q5_K),
            Self::Q6_K => Levels::Blocks(BlockFormat::Q6_K),
            Self::Q2_K => Levels::Blocks(BlockFormat::Q2_K),
            Self::Q3_K => Levels::Blocks(BlockFormat::Q3_K),
            Self::IQ4_NL => Levels::Blocks(BlockFormat::IQ4_NL),
            Self::IQ4_XS => Levels::Blocks(BlockFormat::IQ4_XS),
        }
    }
}
