//! Products with quantised weights, which are unpacked on the way, forwards and backwards. So nothing else
//! than the packed weight is kept for the backward pass.

use std::any::Any;

use burn::{
    backend::{
        Autodiff,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops, OpsKind, unary},
        },
    },
    tensor::{DType, Tensor, TensorPrimitive, backend::Backend},
};
use rayon::prelude::*;

use super::{
    cpu::{Cpu, WAYS},
    linear::in_pool,
    node::{constant, inner, primitive, tensor},
    rows::{WORTH_THREADS_MOVED, of_rows, row_by_row, rows},
};
use crate::quantised::{Parts, QuantisedWeight};

/// With at most so many rows of x, each row of the weight is used as soon as it is unpacked, and never
/// written to memory.
const FEW: usize = 4;

/// The numbers of the matrix; `None` on other backends.
pub(crate) fn dense<B: Backend>(weight: &QuantisedWeight<B>) -> Option<Tensor<B, 2>> {
    WAYS.iter().find_map(|way| (way.dense)(weight)?.downcast().ok().map(|dense| *dense))
}

/// `x·Wᵀ`; `None` on other backends, or for other types of elements.
pub(crate) fn times_quantised<B: Backend>(
    x: &Tensor<B, 2>,
    weight: &QuantisedWeight<B>,
) -> Option<Tensor<B, 2>> {
    if x.dtype() != DType::F32 || x.dims()[1] != weight.shape()[1] {
        return None;
    }
    WAYS.iter().find_map(|way| (way.times_quantised)(x, weight)?.downcast().ok().map(|y| *y))
}

/// A backend that unpacks by itself.
pub(super) trait Unpacks: Backend {
    fn dense(weight: &QuantisedWeight<Self>) -> Tensor<Self, 2>;

    fn times(x: Tensor<Self, 2>, weight: &QuantisedWeight<Self>) -> Tensor<Self, 2>;
}

/// The numbers on the backend K; `None` if the weight is on another backend.
pub(super) fn dense_on<K: Unpacks>(weight: &dyn Any) -> Option<Box<dyn Any>> {
    Some(Box::new(K::dense(weight.downcast_ref()?)))
}

/// The product on the backend K; `None` if the tensors are on another backend.
pub(super) fn times_on<K: Unpacks>(x: &dyn Any, weight: &dyn Any) -> Option<Box<dyn Any>> {
    let x: &Tensor<K, 2> = x.downcast_ref()?;
    Some(Box::new(K::times(x.clone(), weight.downcast_ref()?)))
}

impl<K: Cpu> Unpacks for K {
    fn dense(weight: &QuantisedWeight<K>) -> Tensor<K, 2> {
        let ([count, columns], device) = (weight.shape(), weight.device());
        let mut dense = vec![0.0; count * columns];
        unpack(weight, |unpack| {
            if dense.len() < WORTH_THREADS_MOVED {
                dense.chunks_exact_mut(columns).enumerate().for_each(|(row, to)| unpack(row, to));
            } else {
                let rows = dense.par_chunks_exact_mut(columns).with_min_len(16).enumerate();
                rows.for_each(|(row, to)| unpack(row, to));
            }
        });
        of_rows(dense, [count, columns], &device)
    }

    fn times(x: Tensor<K, 2>, weight: &QuantisedWeight<K>) -> Tensor<K, 2> {
        let ([batch, columns], [count, _]) = (x.dims(), weight.shape());
        if batch > FEW {
            return in_pool(batch, [columns, count], || K::product(x, weight.dense().transpose()));
        }
        let device = x.device();
        let x = row_by_row(x);
        let x = rows::<K>(&x);
        let mut outputs = vec![0.0; count * batch];
        unpack(weight, |unpack| {
            let chunks = outputs.par_chunks_mut(16 * batch).enumerate();
            chunks.for_each(|(chunk, outputs)| {
                let mut numbers = vec![0.0; columns];
                for (place, outputs) in outputs.chunks_exact_mut(batch).enumerate() {
                    unpack(16 * chunk + place, &mut numbers);
                    for (output, x) in outputs.iter_mut().zip(x.chunks_exact(columns)) {
                        *output = dot(x, &numbers);
                    }
                }
            });
        });
        let y = of_rows::<K, 2>(outputs, [count, batch], &device);
        if batch == 1 { y.reshape([1, count]) } else { super::rows::transposed(y) }
    }
}

/// Calls `work` with a function that unpacks a row of the matrix.
fn unpack<K: Cpu>(
    weight: &QuantisedWeight<K>,
    work: impl FnOnce(&(dyn Fn(usize, &mut [f32]) + Sync)),
) {
    let Parts { format, codes, scales, minima } = weight.parts();
    let ([count, blocks], codes) = (scales.dims(), codes.into_primitive());
    let words = K::words(&codes).expect("the words are row by row, as they were made or selected");
    let bytes: &[u8] = bytemuck::cast_slice(words);
    let (scales, minima) = (row_by_row(scales), minima.map(row_by_row));
    let (scales, minima) = (rows::<K>(&scales), minima.as_ref().map(rows::<K>));
    let row_bytes = bytes.len() / count;
    work(&|row, numbers| {
        let bytes = &bytes[row * row_bytes..][..row_bytes];
        let of_row = row * blocks..(row + 1) * blocks;
        format.unpack(bytes, &scales[of_row.clone()], minima.map(|it| &it[of_row]), numbers);
    });
}

#[derive(Debug)]
struct ProductNode;

impl<K: Cpu> Backward<K, 1> for ProductNode {
    type State = QuantisedWeight<K>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let weight = ops.state;
        unary::<K, _>(ops.parents, ops.node, grads, |dy| {
            let dy: Tensor<K, 2> = tensor(dy);
            primitive(in_pool(dy.dims()[0], weight.shape(), || K::product(dy, weight.dense())))
        });
    }
}

impl<K: Cpu, C: CheckpointStrategy> Unpacks for Autodiff<K, C> {
    fn dense(weight: &QuantisedWeight<Self>) -> Tensor<Self, 2> {
        constant(without_autodiff(weight).dense())
    }

    fn times(x: Tensor<Self, 2>, weight: &QuantisedWeight<Self>) -> Tensor<Self, 2> {
        let (x, weight) = (x.into_primitive().tensor(), without_autodiff(weight));
        let y = primitive(weight.product(tensor(x.primitive.clone())));
        let y = match ProductNode.prepare::<C>([x.node.clone()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(weight, y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        };
        Tensor::from_primitive(TensorPrimitive::Float(y))
    }
}

pub(super) fn without_autodiff<K: Cpu, C: CheckpointStrategy>(
    weight: &QuantisedWeight<Autodiff<K, C>>,
) -> QuantisedWeight<K> {
    weight
        .clone()
        .carried(|float| inner(&float), |int| Tensor::from_primitive(int.into_primitive()))
}

/// The sum of the products, in as many sums as the processor adds at once.
fn dot(left: &[f32], right: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0.0; LANES];
    let (left, left_rest) = left.as_chunks::<LANES>();
    let (right, right_rest) = right.as_chunks::<LANES>();
    for (left, right) in left.iter().zip(right) {
        for ((sum, left), right) in sums.iter_mut().zip(left).zip(right) {
            *sum += left * right;
        }
    }
    let rest: f32 = left_rest.iter().zip(right_rest).map(|(left, right)| left * right).sum();
    sums.iter().sum::<f32>() + rest
}
