//! Weights in `f32`.

use std::ops::Range;

use burn::tensor::{Tensor, ops::FloatTensor};
use burn_lora_kernels::{Stripes, instructions};

use crate::{
    ops::{
        backend::Cpu,
        rows::{row_by_row, rows},
        simd::{sum_of_pairs, widest},
    },
    tensors::primitive,
};

/// A weight `[d_input, d_output]`, of which the rows or the columns lie one after the other.
#[derive(Debug)]
pub(super) struct Full<K: Cpu> {
    dims: [usize; 2],
    numbers: FloatTensor<K>,
    /// Whether the columns lie one after the other.
    by_column: bool,
}

impl<K: Cpu> Full<K> {
    pub fn of(weight: &Tensor<K, 2>) -> Self {
        let (dims, transpose) = (weight.dims(), primitive(weight.clone().transpose()));
        let by_row = K::rows(&primitive(weight.clone())).is_some();
        match K::rows(&transpose) {
            Some(_) if !by_row => Self { dims, numbers: transpose, by_column: true },
            _ => Self { dims, numbers: row_by_row(weight.clone()), by_column: false },
        }
    }

    pub fn times(&self, x: &[f32], outputs: Range<usize>, to: &mut [&mut [f32]]) {
        let ([d_input, d_output], numbers) = (self.dims, rows::<K>(&self.numbers));
        if self.by_column {
            for (place, output) in outputs.enumerate() {
                let column = &numbers[output * d_input..][..d_input];
                for (to, x) in to.iter_mut().zip(x.chunks_exact(d_input)) {
                    to[place] = widest(
                        #[inline(always)]
                        || sum_of_pairs(column, x, |weight, x| weight * x),
                    );
                }
            }
            return;
        }
        for (index, start) in outputs.clone().step_by(LANES).enumerate() {
            let count = LANES.min(outputs.end - start);
            for (x, to) in x.chunks(ROWS * d_input).zip(to.chunks_mut(ROWS)) {
                let mut sums = [[0.0; LANES]; ROWS];
                let weight = &numbers[start..];
                widest(
                    #[inline(always)]
                    || match count == LANES {
                        true => add::<LANES>(&mut sums, weight, d_output, x, d_input, LANES),
                        false => add::<1>(&mut sums, weight, d_output, x, d_input, count),
                    },
                );
                for (to, sums) in to.iter_mut().zip(&sums) {
                    to[index * LANES..][..count].copy_from_slice(&sums[..count]);
                }
            }
        }
    }

    pub fn times_many(&self, x: &Stripes, outputs: Range<usize>, to: &mut [&mut [f32]]) {
        let ([d_input, d_output], numbers) = (self.dims, rows::<K>(&self.numbers));
        let unpack = |places: Range<usize>, stride: usize, to: &mut [f32]| {
            let first = outputs.start + places.start;
            if self.by_column {
                let columns = numbers[first * d_input..].chunks_exact(d_input);
                let to = to.chunks_exact_mut(stride).zip(columns);
                return to.for_each(|(to, column)| to[..d_input].copy_from_slice(column));
            }
            // Some rows at a time, so that whole lines of the cache are written.
            for (part, rows) in numbers.chunks(LINE * d_output).enumerate() {
                for (place, to) in to.chunks_exact_mut(stride).enumerate() {
                    let column = rows[first + place..].iter().step_by(d_output);
                    to[part * LINE..].iter_mut().zip(column).for_each(|(to, it)| *to = *it);
                }
            }
        };
        x.times(instructions(), outputs.len(), unpack, to);
    }

    pub fn row(&self, output: usize, to: &mut [f32]) {
        let ([d_input, d_output], numbers) = (self.dims, rows::<K>(&self.numbers));
        match self.by_column {
            true => to.copy_from_slice(&numbers[output * d_input..][..d_input]),
            false => {
                let column = numbers[output..].iter().step_by(d_output);
                to.iter_mut().zip(column).for_each(|(to, number)| *to = *number);
            }
        }
    }
}

/// The numbers in a line of the cache.
const LINE: usize = 16;

/// The outputs that are summed up at once.
const LANES: usize = 64;

/// The rows that are multiplied at once.
const ROWS: usize = 4;

/// Adds the products of up to [`ROWS`] rows with `count` columns of the weight, which is a multiple of `WIDTH`.
#[inline(always)]
fn add<const WIDTH: usize>(
    sums: &mut [[f32; LANES]; ROWS],
    weight: &[f32],
    d_output: usize,
    x: &[f32],
    d_input: usize,
    count: usize,
) {
    for (input, weight) in weight.chunks(d_output).take(d_input).enumerate() {
        for (x, sums) in x.chunks_exact(d_input).zip(&mut *sums) {
            let x = x[input];
            let (sums, weight) = (&mut sums[..count], &weight[..count]);
            let groups = sums.as_chunks_mut::<WIDTH>().0.iter_mut();
            for (sums, weight) in groups.zip(weight.as_chunks::<WIDTH>().0) {
                for lane in 0..WIDTH {
                    sums[lane] += x * weight[lane];
                }
            }
        }
    }
}
