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

    /// Unpacks a row into `numbers`. There is a scale for each block and, in some formats, a smallest number.
    pub fn unpack(self, bytes: &[u8], scales: &[f32], minima: Option<&[f32]>, numbers: &mut [f32]) {
        // Each arm is compiled by itself, so that the loop over the bytes has no decision left in it.
        match (self.levels(), minima) {
            (Levels::Of(levels), _) => {
                self.unpack_by(bytes, scales, numbers, |code, block| {
                    levels[usize::from(code & 15)] * scales[block]
                });
            }
            (Levels::Minus(zero), None) => {
                let zero = f32::from(zero);
                self.unpack_by(bytes, scales, numbers, |code, block| {
                    (f32::from(code) - zero) * scales[block]
                });
            }
            (Levels::Minus(zero), Some(minima)) => {
                let zero = f32::from(zero);
                self.unpack_by(bytes, scales, numbers, |code, block| {
                    (f32::from(code) - zero) * scales[block] + minima[block]
                });
            }
        }
    }

    #[inline(always)]
    fn unpack_by(
        self,
        bytes: &[u8],
        scales: &[f32],
        numbers: &mut [f32],
        number: impl Fn(u8, usize) -> f32,
    ) {
        let (size, block_bytes, packs_two) = (self.block(), self.block_bytes(), self.bits() == 4);
        let unpack = |block: usize, bytes: &[u8], numbers: &mut [f32]| match packs_two {
            false => {
                for (to, &code) in numbers.iter_mut().zip(bytes) {
                    *to = number(code, block);
                }
            }
            true => {
                let groups = numbers.chunks_exact_mut(2 * APART).zip(bytes.chunks_exact(APART));
                for (numbers, bytes) in groups {
                    let (lower, upper) = numbers.split_at_mut(APART);
                    for ((lower, upper), &byte) in lower.iter_mut().zip(upper).zip(bytes) {
                        *lower = number(byte & 15, block);
                        *upper = number(byte >> 4, block);
                    }
                }
            }
        };
        let blocks = numbers.chunks_mut(size).zip(bytes.chunks_exact(block_bytes));
        for (block, (numbers, bytes)) in blocks.enumerate().take(scales.len()) {
            if numbers.len() == size {
                unpack(block, bytes, numbers);
            } else {
                let mut whole = [0.0; 64];
                unpack(block, bytes, &mut whole[..size]);
                numbers.copy_from_slice(&whole[..numbers.len()]);
            }
        }
    }
}
