//! A linear layer for rows with different adapters, for the CPU backends.
//!
//! With Burn's operations, each group of rows is cut out of the input and of the base's output, and all results
//! are put together again. For a row per adapter, starting these operations takes longer than their arithmetic.
//! Here the updates are added in place, several groups at a time.

use burn::{
    backend::{Autodiff, autodiff::checkpoint::strategy::CheckpointStrategy},
    tensor::{DType, Tensor, backend::Backend, ops::FloatTensor},
};
use nalgebra::{DMatrix, DMatrixView};
use rayon::prelude::*;

use super::{
    backend::Cpu,
    operation::Operation,
    pool::in_pool,
    rows::{add_rows, row_by_row, rows},
};
use crate::{quantized::Weight, tensors::tensor};

/// Up to this number of rows, a product reads the factors as they are: packing them would take longer.
const FEW: usize = 4;

/// From this number of multiplications on, several threads are faster than one.
const WORTH_THREADS: usize = 1 << 17;

/// The largest number of rows that a thread takes at once.
const BLOCK: usize = 64;

/// The values that the layer computes with.
pub(crate) struct MixedLinear<B: Backend> {
    /// The base's weight: `[d_input, d_output]`.
    pub weight: Weight<B>,
    /// The base's bias: `[d_output]`.
    pub bias: Option<Tensor<B, 1>>,
    /// For each group of rows their number, and their update.
    pub groups: Vec<(usize, Option<Update<B>>)>,
}

/// What is added to the output for some rows.
pub(crate) struct Update<B: Backend> {
    /// The factor A: `[d_input, rank]`.
    pub a: Tensor<B, 2>,
    /// The factor B: `[rank, d_output]`.
    pub b: Tensor<B, 2>,
    /// The adapter's bias, scaled: `[d_output]`.
    pub bias: Option<Tensor<B, 1>>,
    /// The scale s.
    pub scale: f64,
}

/// The output of the layer, `[batch, d_input]` to `[batch, d_output]`, where all is in `f32`.
pub(crate) struct ForwardMixed;

impl Operation for ForwardMixed {
    type Input<B: Backend> = (Tensor<B, 2>, MixedLinear<B>);
    type Output<B: Backend> = Tensor<B, 2>;

    fn forward<K: Cpu>((x, layer): &(Tensor<K, 2>, MixedLinear<K>)) -> Option<Tensor<K, 2>> {
        if x.dtype() != DType::F32 || !layer.is_in_f32() || x.dims()[1] != layer.weight.dims()[0] {
            return None;
        }
        Some(in_pool(x.dims()[0], layer.weight.dims(), || {
            add_updates(layer.weight.times(x.clone()), x.clone(), layer)
        }))
    }

    /// Mixed batches are for inference.
    fn tracked<K: Cpu, C: CheckpointStrategy>(
        _: &(Tensor<Autodiff<K, C>, 2>, MixedLinear<Autodiff<K, C>>),
    ) -> Option<Tensor<Autodiff<K, C>, 2>> {
        None
    }
}

/// `y` with the biases and the update of each row added in place.
fn add_updates<K: Cpu>(y: Tensor<K, 2>, x: Tensor<K, 2>, layer: &MixedLinear<K>) -> Tensor<K, 2> {
    let ([_, d_input], [_, d_output]) = (x.dims(), y.dims());
    let (x, mut y) = (row_by_row(x), row_by_row(y));
    let vector = |it: &Tensor<K, 1>| row_by_row(it.clone());
    let bias = layer.bias.as_ref().map(vector);
    let bias = bias.as_ref().map(rows::<K>);
    let updates = layer.groups.iter().map(|(count, update)| {
        let update = update.as_ref().map(|it| RowByRow::<K> {
            rank: it.a.dims()[1],
            scale: it.scale as f32,
            factors: [&it.a, &it.b].map(|factor| row_by_row(factor.clone())),
            bias: it.bias.as_ref().map(vector),
        });
        (*count, update)
    });
    let updates: Vec<_> = updates.collect();

    let mut left_x = rows::<K>(&x);
    let mut left_y = K::rows_mut(&mut y).expect("y was just computed and is not shared");
    let mut blocks = Vec::new();
    let mut work = 0;
    for (count, update) in &updates {
        let (group_x, group_y);
        (group_x, left_x) = left_x.split_at(count * d_input);
        (group_y, left_y) = left_y.split_at_mut(count * d_output);
        work += update.as_ref().map_or(0, |it| count * it.rank * (d_input + d_output));
        let pairs = group_x.chunks(BLOCK * d_input).zip(group_y.chunks_mut(BLOCK * d_output));
        blocks.extend(pairs.map(|(x, y)| (x, y, update)));
    }
    let add = |(x, y, update): (&[f32], &mut [f32], &Option<RowByRow<K>>)| {
        if let Some(bias) = bias {
            add_bias(y, bias);
        }
        if let Some(update) = update {
            update.add(y, x);
        }
    };
    if work < WORTH_THREADS {
        blocks.into_iter().for_each(add);
    } else {
        blocks.into_par_iter().for_each(add);
    }
    tensor(y)
}

fn add_bias(y: &mut [f32], bias: &[f32]) {
    for row in y.chunks_exact_mut(bias.len()) {
        row.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
    }
}

/// An update whose tensors are stored row by row.
struct RowByRow<K: Cpu> {
    rank: usize,
    scale: f32,
    factors: [FloatTensor<K>; 2],
    bias: Option<FloatTensor<K>>,
}

impl<K: Cpu> RowByRow<K> {
    /// `y + s·(x·A)·B + bias`.
    fn add(&self, y: &mut [f32], x: &[f32]) {
        let ([a, b], rank) = (self.factors.each_ref().map(rows::<K>), self.rank);
        if let Some(bias) = &self.bias {
            add_bias(y, rows::<K>(bias));
        }
        let (d_input, d_output) = (a.len() / rank, b.len() / rank);
        let count = x.len() / d_input;
        if count > FEW {
            // nalgebra stores matrices by column, so each one is passed as its transpose.
            let x = DMatrixView::from_slice(x, d_input, count);
            let a = DMatrixView::from_slice(a, rank, d_input);
            let mut hidden = DMatrix::zeros(rank, count);
            hidden.gemm(self.scale, &a, &x, 0.0);
            let b = DMatrixView::from_slice(b, d_output, rank);
            return add_rows(y, None, hidden.as_slice(), b);
        }
        for (x, y) in x.chunks_exact(d_input).zip(y.chunks_exact_mut(d_output)) {
            for (hidden, b) in times_thin(x, a, rank).iter().zip(b.chunks_exact(d_output)) {
                let hidden = self.scale * hidden;
                y.iter_mut().zip(b).for_each(|(y, b)| *y += hidden * b);
            }
        }
    }
}

/// The product of a row and a thin matrix, in columns as wide as the processor's registers.
fn times_thin(x: &[f32], a: &[f32], rank: usize) -> Vec<f32> {
    const WIDTH: usize = 8;
    let mut hidden = vec![0.0; rank];
    let whole = rank - rank % WIDTH;
    for start in (0..whole).step_by(WIDTH) {
        let mut sums = [0.0; WIDTH];
        for (x, a) in x.iter().zip(a.chunks_exact(rank)) {
            let a: &[f32; WIDTH] = a[start..][..WIDTH].try_into().expect("it has this length");
            for (sum, a) in sums.iter_mut().zip(a) {
                *sum += x * a;
            }
        }
        hidden[start..][..WIDTH].copy_from_slice(&sums);
    }
    for column in whole..rank {
        hidden[column] = x.iter().zip(a.chunks_exact(rank)).map(|(x, a)| x * a[column]).sum();
    }
    hidden
}

impl<B: Backend> MixedLinear<B> {
    /// Whether all tensors are in `f32`.
    fn is_in_f32(&self) -> bool {
        let updates = self.groups.iter().filter_map(|(_, update)| update.as_ref());
        let types = updates.flat_map(|it| {
            let bias = it.bias.as_ref().map_or(DType::F32, Tensor::dtype);
            [it.a.dtype(), it.b.dtype(), bias]
        });
        let bias = self.bias.as_ref().map_or(DType::F32, Tensor::dtype);
        self.weight.is_in_f32() && types.chain([bias]).all(|it| it == DType::F32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ops::{run, runs_on, testing::test_on_each_backend},
        precision::Precision,
    };

    fn is_one_operation_but_in_training<B: Backend>() -> bool {
        let device = B::Device::default();
        let ones = |shape: [usize; 2]| Tensor::<B, 2>::ones(shape, &device);
        let (a, b) = (ones([3, 2]), ones([2, 5]));
        let update = Some(Update { a, b, bias: None, scale: 0.5 });
        let weight = Weight::full(ones([3, 5]), Precision::F32);
        let groups = vec![(1, None), (3, update)];
        let layer = MixedLinear { weight, bias: None, groups };
        let y = run::<ForwardMixed, B>(&(ones([4, 3]), layer));
        if B::ad_enabled(&device) { runs_on::<B>() && y.is_none() } else { y.is_some() }
    }

    test_on_each_backend!(is_one_operation_but_in_training);
}
