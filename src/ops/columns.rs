//! What DoRA does to the columns of a matrix, in one pass over memory each way.

use burn::{
    backend::{
        Autodiff,
        autodiff::{
            NodeId,
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops},
        },
    },
    tensor::{DType, Tensor, backend::Backend},
};
use rayon::prelude::*;

use super::{
    autodiff::{constant, inner, output, parents, register},
    backend::Cpu,
    operation::Operation,
    rows::{WORTH_THREADS_MOVED, in_blocks, of_rows, row_by_row, rows},
};
use crate::tensors::{primitive, tensor};

/// How many rows a thread takes at once. It must not depend on the number of threads, so that sums are the
/// same on every machine.
const ROWS: usize = 64;

/// A matrix, and what its columns are multiplied with and moved by.
pub(crate) struct ScaledColumns<B: Backend> {
    /// `[batch, columns]`.
    pub y: Tensor<B, 2>,
    /// `[columns]`.
    pub gain: Tensor<B, 1>,
    /// A constant, `[columns]`.
    pub bias: Option<Tensor<B, 1>>,
}

/// `y ⊙ gain + bias`, where there are elements and all are in `f32`. Gradients reach y and the gain.
pub(crate) struct ScaleColumns;

impl Operation for ScaleColumns {
    type Input<B: Backend> = ScaledColumns<B>;
    type Output<B: Backend> = Tensor<B, 2>;

    fn forward<K: Cpu>(ScaledColumns { y, gain, bias }: &ScaledColumns<K>) -> Option<Tensor<K, 2>> {
        let mut vectors = [Some(gain), bias.as_ref()].into_iter().flatten();
        let in_f32 = y.dtype() == DType::F32 && vectors.all(|it| it.dtype() == DType::F32);
        if !in_f32 || y.shape().num_elements() == 0 {
            return None;
        }
        let (shape, device) = (y.dims(), y.device());
        let [y, gain] = [row_by_row(y.clone()), row_by_row(gain.clone())];
        let bias = bias.clone().map(row_by_row);
        let (input, gain) = (rows::<K>(&y), rows::<K>(&gain));
        let zeros = if bias.is_none() { vec![0.0; gain.len()] } else { vec![] };
        let bias = bias.as_ref().map_or(&zeros[..], rows::<K>);
        let mut output = vec![0.0; input.len()];
        let work = |output: &mut [f32], input: &[f32]| {
            let width = gain.len();
            for (output, input) in output.chunks_exact_mut(width).zip(input.chunks_exact(width)) {
                for (((output, input), gain), bias) in
                    output.iter_mut().zip(input).zip(gain).zip(bias)
                {
                    *output = input * gain + bias;
                }
            }
        };
        in_blocks(&mut output, input, ROWS * gain.len(), work);
        Some(of_rows(output, shape, &device))
    }

    fn tracked<K: Cpu, C: CheckpointStrategy>(
        ScaledColumns { y, gain, bias }: &ScaledColumns<Autodiff<K, C>>,
    ) -> Option<Tensor<Autodiff<K, C>, 2>> {
        let bias = bias.as_ref().map(inner);
        let scaled = Self::forward(&ScaledColumns { y: inner(y), gain: inner(gain), bias })?;
        let (y, gain) = (primitive(y.clone()), primitive(gain.clone()));
        Some(output(ColumnsNode, [&y, &gain], scaled, |prep| {
            [prep.checkpoint(&y), prep.checkpoint(&gain)]
        }))
    }
}

/// The sum of the squares of each column of a constant, `[rows, columns]` to `[columns]`, where there are
/// elements in `f32`.
pub(crate) struct ColumnSquares;

impl Operation for ColumnSquares {
    type Input<B: Backend> = Tensor<B, 2>;
    type Output<B: Backend> = Tensor<B, 1>;

    fn forward<K: Cpu>(matrix: &Tensor<K, 2>) -> Option<Tensor<K, 1>> {
        if matrix.dtype() != DType::F32 || matrix.shape().num_elements() == 0 {
            return None;
        }
        let ([_, width], device) = (matrix.dims(), matrix.device());
        let matrix = row_by_row(matrix.clone());
        let sums = summed(rows::<K>(&matrix), width, |sums, row| {
            sums.iter_mut().zip(row).for_each(|(sum, it)| *sum += it * it);
        });
        Some(of_rows(sums, [width], &device))
    }

    fn tracked<K: Cpu, C: CheckpointStrategy>(
        matrix: &Tensor<Autodiff<K, C>, 2>,
    ) -> Option<Tensor<Autodiff<K, C>, 1>> {
        Self::forward::<K>(&inner(matrix)).map(constant)
    }
}

/// The sums of what `add` makes of each row, block by block.
fn summed(values: &[f32], width: usize, add: impl Fn(&mut [f32], &[f32]) + Sync) -> Vec<f32> {
    let block = ROWS * width;
    let of_block = |values: &[f32]| {
        let mut sums = vec![0.0; width];
        values.chunks_exact(width).for_each(|row| add(&mut sums, row));
        sums
    };
    let sums: Vec<_> = match values.len() < WORTH_THREADS_MOVED {
        true => values.chunks(block).map(of_block).collect(),
        false => values.par_chunks(block).map(of_block).collect(),
    };
    total(sums, width)
}

fn total(sums: Vec<Vec<f32>>, width: usize) -> Vec<f32> {
    let mut total = vec![0.0; width];
    for sums in sums {
        total.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
    }
    total
}

#[derive(Debug)]
struct ColumnsNode;

impl<K: Cpu> Backward<K, 2> for ColumnsNode {
    /// The nodes of y and of the gain. The checkpointer keeps the tensors.
    type State = [NodeId; 2];

    /// `dgain = Σ dy ⊙ y` over the rows, and `dy ⊙ gain`, in one pass.
    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let (parents, [y, gain]) = (parents(&ops), ops.state);
        let y: Tensor<K, 2> = tensor(checkpointer.retrieve_node_output(y));
        let gain: Tensor<K, 1> = tensor(checkpointer.retrieve_node_output(gain));
        let dy: Tensor<K, 2> = tensor(grads.consume::<K>(&ops.node));
        let (shape, device) = (dy.dims(), dy.device());
        let [y, dy] = [y, dy].map(row_by_row);
        let gain = row_by_row(gain);
        let (y, gain) = (rows::<K>(&y), rows::<K>(&gain));
        let mut dx = rows::<K>(&dy).to_vec();
        let width = gain.len();
        let block = ROWS * width;
        let of_block = |(dx, y): (&mut [f32], &[f32])| {
            let mut sums = vec![0.0; width];
            for (dx, y) in dx.chunks_exact_mut(width).zip(y.chunks_exact(width)) {
                for (((dx, y), gain), sum) in dx.iter_mut().zip(y).zip(gain).zip(&mut sums) {
                    *sum += *dx * y;
                    *dx *= gain;
                }
            }
            sums
        };
        let sums: Vec<_> = match dx.len() < WORTH_THREADS_MOVED {
            true => dx.chunks_mut(block).zip(y.chunks(block)).map(of_block).collect(),
            false => dx.par_chunks_mut(block).zip(y.par_chunks(block)).map(of_block).collect(),
        };
        let [_, gain_wanted] = parents.map(|it| it.is_some());
        let dgain = gain_wanted.then(|| of_rows::<K, 1>(total(sums, width), [width], &device));
        let dx = of_rows::<K, 2>(dx, shape, &device);
        register::<K, 2>(grads, parents, [Some(primitive(dx)), dgain.map(primitive)]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{run, testing::test_on_each_backend};

    fn is_one_operation<B: Backend>() -> bool {
        let device = Default::default();
        let (y, gain) = (Tensor::ones([2, 3], &device), Tensor::ones([3], &device));
        let columns = ScaledColumns::<B> { y: y.clone(), gain, bias: None };
        run::<ScaleColumns, B>(&columns).is_some() && run::<ColumnSquares, B>(&y).is_some()
    }

    test_on_each_backend!(is_one_operation);
}
