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
                let number = |code: u8, scale: f32, _| levels[usize::from(code & 15)] * scale;
                self.unpack_by(bytes, scales, None, numbers, number);
            }
            (Levels::Minus(zero), None) => {
                let zero = f32::from(zero);
                let number = |code: u8, scale: f32, _| (f32::from(code) - zero) * scale;
                self.unpack_by(bytes, scales, None, numbers, number);
            }
            (Levels::Minus(zero), minima) => {
                let zero = f32::from(zero);
                let number = |code: u8, scale: f32, least| (f32::from(code) - zero) * scale + least;
                self.unpack_by(bytes, scales, minima, numbers, number);
            }
        }
    }

    #[inline(always)]
    fn unpack_by(
        self,
        bytes: &[u8],
        scales: &[f32],
        minima: Option<&[f32]>,
        numbers: &mut [f32],
        number: impl Fn(u8, f32, f32) -> f32,
    ) {
        let (size, packs_two) = (self.block(), self.bits() == 4);
        let blocks = numbers.chunks_mut(size).zip(bytes.chunks_exact(self.block_bytes()));
        for (block, (numbers, bytes)) in blocks.enumerate() {
            let (scale, least) = (scales[block], minima.map_or(0.0, |it| it[block]));
            let number = |code| number(code, scale, least);
            match (packs_two, numbers.len() == size) {
                (false, _) => bytes_to_numbers(bytes, numbers, number),
                (true, true) => halves_to_numbers(bytes, numbers, number),
                (true, false) => {
                    let mut whole = [0.0; 64];
                    halves_to_numbers(bytes, &mut whole[..size], number);
                    numbers.copy_from_slice(&whole[..numbers.len()]);
                }
            }
        }
    }
}

/// The numbers of codes of 8 bits. Whole groups are computed before they are written, which the compiler does
/// with vectors.
#[inline(always)]
fn bytes_to_numbers(bytes: &[u8], numbers: &mut [f32], number: impl Fn(u8) -> f32) {
    let (groups, rest) = numbers.as_chunks_mut::<APART>();
    let codes = bytes.as_chunks::<APART>().0;
    for (numbers, codes) in groups.iter_mut().zip(codes) {
        *numbers = group(codes, &number);
    }
    // In a row that ends within a group, the codes go on.
    for (to, &code) in rest.iter_mut().zip(codes.get(groups.len()).into_iter().flatten()) {
        *to = number(code);
    }
}

/// The same of codes of 4 bits, in whole groups.
#[inline(always)]
fn halves_to_numbers(bytes: &[u8], numbers: &mut [f32], number: impl Fn(u8) -> f32) {
    let groups = numbers.as_chunks_mut::<{ 2 * APART }>().0.iter_mut();
    for (numbers, bytes) in groups.zip(bytes.as_chunks::<APART>().0) {
        let (lower, upper) = numbers.split_at_mut(APART);
        lower.copy_from_slice(&group(bytes, |byte| number(byte & 15)));
        upper.copy_from_slice(&group(bytes, |byte| number(byte >> 4)));
    }
}

/// A number for each byte.
#[inline(always)]
fn group(bytes: &[u8; APART], number: impl Fn(u8) -> f32) -> [f32; APART] {
    // `map` of arrays is not always inlined, and then much slower.
    let mut numbers = [0.0; APART];
    for (to, &byte) in numbers.iter_mut().zip(bytes) {
        *to = number(byte);
    }
    numbers
}
