//! Numbers rounded to codes.

use super::format::{APART, Format, NF4};

/// A matrix in memory of the host.
pub(crate) struct Packed {
    pub format: Format,
    pub shape: [usize; 2],
    /// The codes, row by row.
    pub bytes: Vec<u8>,
    /// For each row, one for each block. So are `minima`.
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
}

/// Rounds the rows of a matrix.
pub(crate) fn pack(numbers: &[f32], shape: [usize; 2], to: Quantization) -> Packed {
    let format = match to {
        Quantization::Int8 => Format::Int8,
        Quantization::Nf4 => Format::Nf4,
    };
    let [rows, columns] = shape;
    let mut bytes = Vec::with_capacity(rows * format.row_bytes(columns));
    let mut scales = Vec::new();
    for row in numbers.chunks_exact(columns.max(1)) {
        for block in row.chunks(format.block()) {
            let largest = block.iter().fold(0.0_f32, |largest, it| largest.max(it.abs()));
            let mut numbers = [0.0; 64];
            numbers[..block.len()].copy_from_slice(block);
            match to {
                Quantization::Int8 => {
                    let scale = largest / 127.0;
                    bytes.extend(numbers.map(|it| (ratio(it, scale).round() + 128.0) as u8));
                    scales.push(scale);
                }
                Quantization::Nf4 => {
                    let codes = numbers.map(|it| nearest(&NF4, ratio(it, largest)));
                    for codes in codes.chunks_exact(2 * APART) {
                        let (lower, upper) = codes.split_at(APART);
                        bytes.extend(
                            lower.iter().zip(upper).map(|(lower, upper)| lower | upper << 4),
                        );
                    }
                    scales.push(largest);
                }
            }
        }
    }
    Packed { format, shape, bytes, scales, minima: None }
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
