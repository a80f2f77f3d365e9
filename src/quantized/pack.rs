//! Numbers rounded to codes.

use half::bf16;

use super::format::{APART, Format, NF4};

/// A matrix in memory of the host.
pub(crate) struct Packed {
    pub format: Format,
    pub shape: [usize; 2],
    /// The codes, row by row.
    pub bytes: Vec<u8>,
    /// For each row, one for each block, unless the format has none apart. So are `minima`.
    pub scales: Vec<f32>,
    pub minima: Option<Vec<f32>>,
}

/// What weights are rounded to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Quantization {
    /// 8 bits: whole multiples of a 127th of the largest number, in blocks of 64 inputs. 8.5 bits per
    /// weight with the scales. The error is about 0.6 % of the weights.
    Int8,
    /// 4 bits: NormalFloat, the 16 levels that suit normally distributed weights best, in blocks of 64
    /// inputs, with scales that are quantized in turn
    /// ([Dettmers et al. 2023](https://arxiv.org/abs/2305.14314)). 4.13 bits per weight. The error is about
    /// 9.4 % of the weights.
    Nf4,
    /// 16 bits: bfloat16, the upper half of an `f32`. The error is about 0.2 % of the weights, and none where these come
    /// from a file in bf16.
    Bf16,
}

/// Rounds the rows of a matrix.
pub(crate) fn pack(numbers: &[f32], shape: [usize; 2], to: Quantization) -> Packed {
    match to {
        Quantization::Int8 => pack_blocks(numbers, shape, Format::Int8, int8),
        Quantization::Nf4 => pack_blocks(numbers, shape, Format::Nf4, nf4),
        Quantization::Bf16 => pack_bf16(numbers, shape),
    }
}

/// Rounds blocks of 64 numbers, the last one of a row filled up with zeros. `round` takes a block and its largest
/// magnitude, writes the codes and returns the scale.
fn pack_blocks(
    numbers: &[f32],
    shape: [usize; 2],
    format: Format,
    round: impl Fn([f32; 64], f32, &mut Vec<u8>) -> f32,
) -> Packed {
    let [rows, columns] = shape;
    let mut bytes = Vec::with_capacity(rows * format.row_bytes(columns));
    let mut scales = Vec::new();
    for row in numbers.chunks_exact(columns.max(1)) {
        for block in row.chunks(format.block()) {
            let largest = block.iter().fold(0.0_f32, |largest, it| largest.max(it.abs()));
            let mut numbers = [0.0; 64];
            numbers[..block.len()].copy_from_slice(block);
            scales.push(round(numbers, largest, &mut bytes));
        }
    }
    Packed { format, shape, bytes, scales, minima: None }
}

fn int8(numbers: [f32; 64], largest: f32, bytes: &mut Vec<u8>) -> f32 {
    let scale = largest / 127.0;
    bytes.extend(numbers.map(|it| (ratio(it, scale).round() + 128.0) as u8));
    scale
}

fn nf4(numbers: [f32; 64], largest: f32, bytes: &mut Vec<u8>) -> f32 {
    let codes = numbers.map(|it| nearest(&NF4, ratio(it, largest)));
    for codes in codes.chunks_exact(2 * APART) {
        let (lower, upper) = codes.split_at(APART);
        bytes.extend(lower.iter().zip(upper).map(|(lower, upper)| lower | upper << 4));
    }
    largest
}

/// Rounds to bf16, which has no scales. The largest numbers in `f32` become the largest ones in bf16: the nearest ones
/// are infinite, which no weight may be.
fn pack_bf16(numbers: &[f32], shape: [usize; 2]) -> Packed {
    let columns = shape[1].max(1);
    let [least, largest] = [bf16::MIN, bf16::MAX].map(bf16::to_f32);
    let round = |&it: &f32| bf16::from_f32(it.clamp(least, largest)).to_le_bytes();
    let mut bytes = Vec::with_capacity(shape[0] * Format::Bf16.row_bytes(columns));
    for row in numbers.chunks_exact(columns) {
        bytes.extend(row.iter().flat_map(round));
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    Packed { format: Format::Bf16, shape, bytes, scales: Vec::new(), minima: None }
}

/// `number / scale`, which is 0 if all numbers of the block are.
pub(super) fn ratio(number: f32, scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { number / scale }
}

/// The number of the level that is nearest, of levels in ascending order.
pub(super) fn nearest(levels: &[f32], number: f32) -> u8 {
    let above = levels.partition_point(|&level| level < number);
    let Some(below) = above.checked_sub(1) else { return 0 };
    let is_nearer = |level: &f32| level - number < number - levels[below];
    (if levels.get(above).is_some_and(is_nearer) { above } else { below }) as u8
}
