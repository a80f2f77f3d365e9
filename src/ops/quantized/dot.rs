//! Products of packed rows with vectors, without unpacking the rows to memory.

use burn_lora_kernels::BlockFormat;

use super::unpack::{of_half, widened};
use crate::{
    ops::simd::{sum_of_pairs, widest},
    quantized::{APART, Format, Levels},
};

/// The numbers of 16 bits that are multiplied at once.
const LANES: usize = 32;

/// The numbers of blocks that are unpacked before they are multiplied.
const PIECE: usize = 1024;

/// Multiplies the rows of one format.
pub(super) struct Dot {
    format: Format,
    /// What the two codes in a byte stand for, the lower one first. It is empty if bytes hold something else.
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
            Levels::Upper | Levels::Half | Levels::Blocks(_) => {
                unreachable!("its codes are not in pairs")
            }
        };
        let pair = |byte: u8| [level(byte & 15), level(byte >> 4)];
        let bytes = if format.packs_two() { Some(0..=u8::MAX) } else { None };
        Self { format, pairs: bytes.into_iter().flatten().map(pair).collect() }
    }

    /// The vector, prepared for many rows.
    pub fn vector(&self, x: &[f32]) -> Vector {
        let block = self.format.block();
        let mut numbers = x.to_vec();
        numbers.resize(x.len().next_multiple_of(block), 0.0);
        let sums = numbers.chunks_exact(block).map(|block| block.iter().sum()).collect();
        if self.format.packs_two() {
            for group in numbers.as_chunks_mut::<{ 2 * APART }>().0 {
                let apart = *group;
                for (place, pair) in group.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                    *pair = [apart[place], apart[place + APART]];
                }
            }
        }
        Vector { numbers, sums }
    }

    /// The products of a row with some vectors. The other arguments are those of [`unpack_row`](super::unpack_row).
    pub fn row(
        &self,
        bytes: &[u8],
        scales: &[f32],
        minima: Option<&[f32]>,
        x: &[Vector],
        to: &mut [f32],
    ) {
        let mut one_by_one = |product: &dyn Fn(&Vector) -> f32| {
            to.iter_mut().zip(x).for_each(|(to, x)| *to = product(x));
        };
        match self.format.levels() {
            Levels::Minus(zero) => {
                one_by_one(&|x| self.product(bytes, scales, minima, x, f32::from(zero)));
            }
            Levels::Of(_) => one_by_one(&|x| self.product(bytes, scales, minima, x, 0.0)),
            Levels::Upper => one_by_one(&|x| of_16_bits(bytes, &x.numbers, widened)),
            Levels::Half => one_by_one(&|x| of_16_bits(bytes, &x.numbers, of_half)),
            Levels::Blocks(format) => of_blocks(format, bytes, x, to),
        }
    }

    /// The product of codes whose scales lie apart, and of which one stands for zero.
    fn product(
        &self,
        bytes: &[u8],
        scales: &[f32],
        minima: Option<&[f32]>,
        x: &Vector,
        zero: f32,
    ) -> f32 {
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

/// The numbers of blocks are unpacked once for all vectors, and need not leave the innermost cache.
fn of_blocks(format: BlockFormat, bytes: &[u8], x: &[Vector], to: &mut [f32]) {
    let (columns, mut numbers) = (x.first().map_or(0, |it| it.numbers.len()), [0.0; PIECE]);
    to.fill(0.0);
    for start in (0..columns).step_by(PIECE) {
        let numbers = &mut numbers[..PIECE.min(columns - start)];
        let first = format.row_bytes(start);
        format.unpack(&bytes[first..first + format.row_bytes(numbers.len())], numbers);
        widest(
            #[inline(always)]
            || {
                for (to, x) in to.iter_mut().zip(x) {
                    let x = &x.numbers[start..][..numbers.len()];
                    *to += sum_of_pairs(numbers, x, |number, x| number * x);
                }
            },
        );
    }
}

/// The numbers of a row need no scales; `number` reads one of them.
fn of_16_bits(bytes: &[u8], x: &[f32], number: impl Fn([u8; 2]) -> f32) -> f32 {
    widest(
        #[inline(always)]
        || {
            let halves = bytes.as_chunks::<2>().0;
            let (halves, x) = (halves.as_chunks::<LANES>().0.iter(), x.as_chunks::<LANES>());
            let mut sums = [0.0; LANES];
            for (halves, x) in halves.zip(x.0) {
                for lane in 0..LANES {
                    sums[lane] += number(halves[lane]) * x[lane];
                }
            }
            let end = bytes.as_chunks::<2>().0[x.0.len() * LANES..].iter().zip(x.1);
            sums.iter().sum::<f32>() + end.map(|(&half, x)| number(half) * x).sum::<f32>()
        },
    )
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
