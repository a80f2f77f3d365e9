//! Weights as they lie in the memory of the host, for products of few rows, where tensors would cost more than the
//! arithmetic.

mod full;
mod packed;

use std::{fmt, ops::Range, sync::Arc};

use burn::{
    backend::{Autodiff, autodiff::checkpoint::strategy::CheckpointStrategy},
    tensor::backend::Backend,
};
use burn_lora_kernels::{Stripes, Vector8};

use super::{
    backend::Cpu,
    operation::Operation,
    quantized::FEW,
    rows::{of_rows, row_by_row, rows},
    weight::plain,
};
use crate::{
    precision::Precision,
    quantized::{Matrix, Weight},
};
use full::Full;
use packed::Packed;

/// A weight `[d_input, d_output]`. No product of a row depends on what other rows there are, to the bit.
pub(crate) trait HostWeight: fmt::Debug + Send + Sync {
    /// `[d_input, d_output]`
    fn dims(&self) -> [usize; 2];

    /// Whether it is held in at most 8 bits, so that vectors in 8 bits are fast.
    fn is_packed(&self) -> bool;

    /// Some outputs of all rows x: `[rows, d_input]` to a slice for each row.
    fn times_few(&self, x: &[f32], outputs: Range<usize>, to: &mut [&mut [f32]]);

    /// The same for rows that were rounded. Panics unless the weight is [packed](Self::is_packed).
    fn times_rounded(&self, x: &[Vector8], outputs: Range<usize>, to: &mut [&mut [f32]]);

    /// The same for many rows.
    fn times_many(&self, x: &Stripes, outputs: Range<usize>, to: &mut [&mut [f32]]);

    /// Whether many rows are multiplied in [bf16](crate::nn::Precision).
    fn is_in_bf16(&self) -> bool;

    /// All outputs of many rows in bf16: `[rows, d_input]` to `[rows, d_output]`, on all cores.
    fn times_in_bf16(&self, x: &[f32], to: &mut [f32]);

    /// The numbers by which an output is computed, which is a row of a table: `[d_input]`.
    fn row(&self, output: usize, to: &mut [f32]);
}

/// The weight in the memory of the host. `None` also if its numbers are not in `f32` or packed.
pub(crate) struct OnHost;

impl Operation for OnHost {
    type Input<B: Backend> = Weight<B>;
    type Output<B: Backend> = Arc<dyn HostWeight>;

    fn forward<K: Cpu>(weight: &Weight<K>) -> Option<Arc<dyn HostWeight>> {
        if !weight.is_in_f32() {
            return None;
        }
        let held = match &weight.matrix {
            Matrix::Full(matrix) => Held::Full(Full::of(matrix)),
            Matrix::Quantized(matrix) => Held::Packed(Packed::of(matrix)),
        };
        Some(Arc::new(Host { weight: weight.clone(), held }))
    }

    fn tracked<K: Cpu, C: CheckpointStrategy>(
        weight: &Weight<Autodiff<K, C>>,
    ) -> Option<Arc<dyn HostWeight>> {
        Self::forward::<K>(&plain(weight))
    }
}

/// Both share their memory.
#[derive(Debug)]
struct Host<K: Cpu> {
    weight: Weight<K>,
    held: Held<K>,
}

#[derive(Debug)]
enum Held<K: Cpu> {
    Full(Full<K>),
    Packed(Packed<K>),
}

impl<K: Cpu> HostWeight for Host<K> {
    fn dims(&self) -> [usize; 2] {
        self.weight.dims()
    }

    fn is_packed(&self) -> bool {
        matches!(&self.held, Held::Packed(it) if it.is_in_8_bits())
    }

    fn times_few(&self, x: &[f32], outputs: Range<usize>, to: &mut [&mut [f32]]) {
        match &self.held {
            Held::Full(full) => full.times(x, outputs, to),
            Held::Packed(packed) => packed.times(x, outputs, to),
        }
    }

    fn times_rounded(&self, x: &[Vector8], outputs: Range<usize>, to: &mut [&mut [f32]]) {
        let Held::Packed(packed) = &self.held else { panic!("the weight is not packed") };
        packed.times_rounded(x, outputs, to);
    }

    fn times_many(&self, x: &Stripes, outputs: Range<usize>, to: &mut [&mut [f32]]) {
        match &self.held {
            Held::Full(full) => full.times_many(x, outputs, to),
            Held::Packed(packed) => packed.times_many(x, outputs, to),
        }
    }

    fn is_in_bf16(&self) -> bool {
        self.weight.precision == Precision::Bf16
    }

    fn times_in_bf16(&self, x: &[f32], to: &mut [f32]) {
        let [d_input, d_output] = self.dims();
        let count = x.len() / d_input;
        // Few rows would be multiplied in `f32`.
        let rows_of = count.max(FEW + 1);
        let mut numbers = x.to_vec();
        numbers.resize(rows_of * d_input, 0.0);
        let x = of_rows::<K, 2>(numbers, [rows_of, d_input], &Default::default());
        let y = row_by_row(self.weight.times(x));
        to.copy_from_slice(&rows::<K>(&y)[..count * d_output]);
    }

    fn row(&self, output: usize, to: &mut [f32]) {
        match &self.held {
            Held::Full(full) => full.row(output, to),
            Held::Packed(packed) => packed.row(output, to),
        }
    }
}
