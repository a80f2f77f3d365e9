//! What DoRA does to the columns of a matrix, in one pass over memory each way.

use std::any::Any;

use burn::{
    backend::{
        Autodiff,
        autodiff::{
            NodeId,
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops, OpsKind},
        },
    },
    tensor::{DType, Tensor, TensorPrimitive, backend::Backend},
};
use rayon::prelude::*;

use super::{
    cpu::{Cpu, WAYS},
    node::{constant, primitive, tensor},
    rows::{WORTH_THREADS_MOVED, in_blocks, of_rows, row_by_row, rows},
};

/// How many rows a thread takes at once. It must not depend on the number of threads, so that sums are the
/// same on every machine.
const ROWS: usize = 64;

/// A matrix, and what its columns are multiplied with and moved by.
pub(crate) struct Columns<B: Backend> {
    /// `[batch, columns]`.
    pub y: Tensor<B, 2>,
    /// `[columns]`.
    pub gain: Tensor<B, 1>,
    /// A constant, `[columns]`.
    pub bias: Option<Tensor<B, 1>>,
}

/// `y ⊙ gain + bias`, where gradients reach y and the gain; `None` on other backends, or for other types of
/// elements.
pub(crate) fn times_columns<B: Backend>(columns: &Columns<B>) -> Option<Tensor<B, 2>> {
    let Columns { y, gain, bias } = columns;
    let vectors = [Some(gain), bias.as_ref()];
    let in_f32 =
        y.dtype() == DType::F32 && vectors.into_iter().flatten().all(|it| it.dtype() == DType::F32);
    if !in_f32 || y.shape().num_elements() == 0 {
        return None;
    }
    WAYS.iter().find_map(|way| (way.times_columns)(columns)?.downcast().ok().map(|it| *it))
}

/// The sum of the squares of each column of a constant, `[rows, columns]` to `[columns]`; `None` as above.
pub(crate) fn column_squares<B: Backend>(matrix: &Tensor<B, 2>) -> Option<Tensor<B, 1>> {
    if matrix.dtype() != DType::F32 || matrix.shape().num_elements() == 0 {
        return None;
    }
    WAYS.iter().find_map(|way| (way.column_squares)(matrix)?.downcast().ok().map(|it| *it))
}

/// A backend that does both in one pass.
pub(super) trait Scales: Backend {
    fn scaled(columns: &Columns<Self>) -> Tensor<Self, 2>;

    fn squares(matrix: Tensor<Self, 2>) -> Tensor<Self, 1>;
}

pub(super) fn times_on<K: Scales>(columns: &dyn Any) -> Option<Box<dyn Any>> {
    Some(Box::new(K::scaled(columns.downcast_ref()?)))
}

pub(super) fn squares_on<K: Scales>(matrix: &dyn Any) -> Option<Box<dyn Any>> {
    let matrix: &Tensor<K, 2> = matrix.downcast_ref()?;
    Some(Box::new(K::squares(matrix.clone())))
}

impl<K: Cpu> Scales for K {
    fn scaled(Columns { y, gain, bias }: &Columns<K>) -> Tensor<K, 2> {
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
        of_rows(output, shape, &device)
    }

    fn squares(matrix: Tensor<K, 2>) -> Tensor<K, 1> {
        let ([_, width], device) = (matrix.dims(), matrix.device());
        let matrix = row_by_row(matrix);
        let sums = summed(rows::<K>(&matrix), width, |sums, row| {
            sums.iter_mut().zip(row).for_each(|(sum, it)| *sum += it * it);
        });
        of_rows(sums, [width], &device)
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
        let [y, gain] = ops.state;
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
        let [of_y, of_gain] = ops.parents;
        if let Some(parent) = of_y {
            grads.register::<K>(parent.id, primitive(of_rows::<K, 2>(dx, shape, &device)));
        }
        if let Some(parent) = of_gain {
            let dgain = of_rows::<K, 1>(total(sums, width), [width], &device);
            grads.register::<K>(parent.id, primitive(dgain));
        }
    }
}

impl<K: Cpu, C: CheckpointStrategy> Scales for Autodiff<K, C> {
    fn scaled(Columns { y, gain, bias }: &Columns<Self>) -> Tensor<Self, 2> {
        let y = y.clone().into_primitive().tensor();
        let gain = gain.clone().into_primitive().tensor();
        let output = K::scaled(&Columns {
            y: tensor(y.primitive.clone()),
            gain: tensor(gain.primitive.clone()),
            bias: bias.clone().map(|it| tensor(it.into_primitive().tensor().primitive)),
        });
        let output = primitive(output);
        let nodes = [y.node.clone(), gain.node.clone()];
        let output = match ColumnsNode.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let kept = [prep.checkpoint(&y), prep.checkpoint(&gain)];
                prep.finish(kept, output)
            }
            OpsKind::UnTracked(prep) => prep.finish(output),
        };
        Tensor::from_primitive(TensorPrimitive::Float(output))
    }

    fn squares(matrix: Tensor<Self, 2>) -> Tensor<Self, 1> {
        let matrix = matrix.into_primitive().tensor().primitive;
        constant(K::squares(tensor(matrix)))
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::autodiff::checkpoint::strategy::BalancedCheckpointing;

    use super::*;

    fn is_one_operation<B: Backend>() -> bool {
        let device = Default::default();
        let (y, gain) = (Tensor::ones([2, 3], &device), Tensor::ones([3], &device));
        let columns = Columns::<B> { y: y.clone(), gain, bias: None };
        times_columns(&columns).is_some() && column_squares(&y).is_some()
    }

    #[cfg(feature = "flex")]
    #[test]
    fn columns_are_scaled_in_one_operation_on_flex() {
        use burn::backend::Flex;

        assert!(is_one_operation::<Flex>());
        assert!(is_one_operation::<Autodiff<Flex>>());
        assert!(is_one_operation::<Autodiff<Flex, BalancedCheckpointing>>());
    }

    #[cfg(feature = "ndarray")]
    #[test]
    fn columns_are_scaled_in_one_operation_on_ndarray_in_single_precision() {
        use burn::backend::NdArray;

        assert!(is_one_operation::<NdArray>());
        assert!(is_one_operation::<Autodiff<NdArray>>());
        assert!(is_one_operation::<Autodiff<NdArray, BalancedCheckpointing>>());
        assert!(!is_one_operation::<Autodiff<NdArray<f64>>>());
    }
}
