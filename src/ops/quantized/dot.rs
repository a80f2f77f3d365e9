//! Products of packed rows with vectors, without unpacking the rows to memory.

use crate::quantized::{APART, Format, Levels};

/// Multiplies the rows of one format.
pub(super) struct Dot {
    format: Format,
    /// What the two codes in a byte stand for, the lower one first. It is empty for codes of 8 bits.
    pairs: Vec<[f32; 2]>,
}

/// A vector to multiply rows with.
pub(super) struct Vector {
    /// Filled up with zeros to whole blocks and, for codes of 4 bits, with the numbers next to each other that
    /// meet the two codes of a byte.
    numbers: Vec<f32>,
    /// The sum over each block, by which the smallest number of a block is multiplied.
    sums: Vec<f32>,
}

impl Dot {
    pub fn new(format: Format) -> Self {
        let level = |code: u8| match format.levels() {
            Levels::Of(levels) => levels[usize::from(code)],
            Levels::Minus(zero) => f32::from(code) - f32::from(zero),
        };
        let pair = |byte: u8| [level(byte & 15), level(byte >> 4)];
        let bytes = if format.bits() == 4 { Some(0..=u8::MAX) } else { None };
        Self { format, pairs: bytes.into_iter().flatten().map(pair).collect() }
    }

    /// The vector, prepared for many rows.
    pub fn vector(&self, x: &[f32]) -> Vector {
        let block = self.format.block();
        let mut numbers = x.to_vec();
        numbers.resize(x.len().next_multiple_of(block), 0.0);
        let sums = numbers.chunks_exact(block).map(|block| block.iter().sum()).collect();
        if self.format.bits() == 4 {
            for group in numbers.as_chunks_mut::<{ 2 * APART }>().0 {
                let apart = *group;
                for (place, pair) in group.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                    *pair = [apart[place], apart[place + APART]];
                }
            }
        }
        Vector { numbers, sums }
    }

    /// The product of a row with the vector. The arguments are those of [`unpack_row`](super::unpack_row).
    pub fn row(&self, bytes: &[u8], scales: &[f32], minima: Option<&[f32]>, x: &Vector) -> f32 {
        let zero = match self.format.levels() {
            Levels::Minus(zero) => f32::from(zero),
            Levels::Of(_) => 0.0,
        };
        let product = match <&[_; 256]>::try_from(&self.pairs[..]) {
            Ok(pairs) => self.by_blocks(bytes, scales, x, |bytes, x| of_halves(bytes, x, pairs)),
            Err(_) => self.by_blocks(bytes, scales, x, |bytes, x| of_bytes(bytes, x, zero)),
        };
        let minima = minima.into_iter().flatten().zip(&x.sums);
        product + minima.map(|(least, sum)| least * sum).sum::<f32>()
    }

    /// The sum over all blocks of a block's product times its scale. Products are in parts, which are added up
    /// in the end: so the processor adds several at once.
    #[inline(always)]
    fn by_blocks<const LANES: usize>(
        &self,
        bytes: &[u8],
        scales: &[f32],
        x: &Vector,
        product: impl Fn(&[u8], &[f32]) -> [f32; LANES],
    ) -> f32 {
        let bytes = bytes.chunks_exact(self.format.block_bytes());
        let x = x.numbers.chunks_exact(self.format.block());
        let mut sums = [0.0; LANES];
        for ((bytes, x), scale) in bytes.zip(x).zip(scales) {
            for (sum, part) in sums.iter_mut().zip(product(bytes, x)) {
                *sum += part * scale;
            }
        }
        sums.iter().sum()
    }
}

#[inline(always)]
fn of_bytes(bytes: &[u8], x: &[f32], zero: f32) -> [f32; 16] {
    let mut sums = [0.0; 16];
    for (bytes, x) in bytes.chunks_exact(16).zip(x.chunks_exact(16)) {
        for ((sum, &byte), x) in sums.iter_mut().zip(bytes).zip(x) {
            *sum += (f32::from(byte) - zero) * x;
        }
    }
    sums
}

#[inline(always)]
fn of_halves(bytes: &[u8], x: &[f32], pairs: &[[f32; 2]; 256]) -> [f32; 8] {
    let mut sums = [0.0; 8];
    for (bytes, x) in bytes.as_chunks::<4>().0.iter().zip(x.as_chunks::<8>().0) {
        let mut numbers = [0.0; 8];
        for (numbers, &byte) in numbers.as_chunks_mut::<2>().0.iter_mut().zip(bytes) {
            *numbers = pairs[usize::from(byte)];
        }
        for ((sum, number), x) in sums.iter_mut().zip(&numbers).zip(x) {
            *sum += number * x;
        }
    }
    sums
}
