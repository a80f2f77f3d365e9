//! Products with quantized weights, which are unpacked on the way, forwards and backwards. So nothing else
//! than the packed weight is kept for the backward pass.

use std::{any::Any, ops::Range};

use burn::{
    backend::{
        Autodiff,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops, OpsKind, unary},
        },
    },
    tensor::{DType, Tensor, TensorPrimitive, backend::Backend, ops::IntTensor},
};
use rayon::prelude::*;

use super::{
    cpu::{Cpu, WAYS},
    linear::in_pool,
    node::{constant, inner, primitive, tensor},
    rows::{WORTH_THREADS_MOVED, of_rows, row_by_row, rows, transposed},
};
use crate::quantized::{Dot, Doubled, Format, Parts, QuantizedWeight, Scales, unpack_scales};

/// At most so many rows of x are multiplied without unpacking the weight to memory. The products are added in
/// another order then.
const FEW: usize = 4;

/// The numbers of the matrix; `None` on other backends.
pub(crate) fn dense<B: Backend>(weight: &QuantizedWeight<B>) -> Option<Tensor<B, 2>> {
    WAYS.iter().find_map(|way| (way.dense)(weight)?.downcast().ok().map(|dense| *dense))
}

/// `x·Wᵀ`; `None` on other backends, or for other types of elements.
pub(crate) fn times_quantized<B: Backend>(
    x: &Tensor<B, 2>,
    weight: &QuantizedWeight<B>,
) -> Option<Tensor<B, 2>> {
    if x.dtype() != DType::F32 || x.dims()[1] != weight.shape()[1] {
        return None;
    }
    WAYS.iter().find_map(|way| (way.times_quantized)(x, weight)?.downcast().ok().map(|y| *y))
}

/// A backend that unpacks by itself.
pub(super) trait Unpacks: Backend {
    fn dense(weight: &QuantizedWeight<Self>) -> Tensor<Self, 2>;

    fn times(x: Tensor<Self, 2>, weight: &QuantizedWeight<Self>) -> Tensor<Self, 2>;
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
    fn dense(weight: &QuantizedWeight<K>) -> Tensor<K, 2> {
        Rows::of(weight, |rows| rows.dense::<K>(0..weight.shape()[0], &weight.device()))
    }

    fn times(x: Tensor<K, 2>, weight: &QuantizedWeight<K>) -> Tensor<K, 2> {
        let ([batch, columns], [count, _]) = (x.dims(), weight.shape());
        if batch <= FEW {
            return times_few(x, weight);
        }
        let panels = panels(count, columns);
        if panels.len() == 1 {
            return in_pool(batch, [columns, count], || K::product(x, weight.dense().transpose()));
        }
        let (device, mut y) = (x.device(), vec![0.0; batch * count]);
        Rows::of(weight, |unpacked| {
            for panel in panels {
                let part = unpacked.dense::<K>(panel.clone(), &device).transpose();
                let size = [columns, panel.len()];
                let part = in_pool(batch, size, || K::product(x.clone(), part));
                let part = row_by_row(part);
                let parts = rows::<K>(&part).chunks_exact(panel.len());
                for (y, part) in y.chunks_exact_mut(count).zip(parts) {
                    y[panel.clone()].copy_from_slice(part);
                }
            }
        });
        of_rows(y, [batch, count], &device)
    }
}

/// The rows of a large matrix, in parts that are unpacked one after the other. So a table of embeddings is
/// never there as a whole.
fn panels(rows: usize, columns: usize) -> Vec<Range<usize>> {
    /// The most numbers that are unpacked at once.
    const NUMBERS: usize = 1 << 21;

    let size = (NUMBERS / columns).max(1);
    (0..rows).step_by(size).map(|start| start..rows.min(start + size)).collect()
}

/// The rows that a thread unpacks at once.
const TAKEN: usize = 16;

/// `x·Wᵀ` for few rows of x. The weight is not unpacked, and its bytes are read once.
fn times_few<K: Cpu>(x: Tensor<K, 2>, weight: &QuantizedWeight<K>) -> Tensor<K, 2> {
    let ([batch, columns], [count, _], device) = (x.dims(), weight.shape(), x.device());
    let x = row_by_row(x);
    let x = rows::<K>(&x);
    let mut outputs = vec![0.0; count * batch];
    Rows::of(weight, |unpacked| {
        let dot = Dot::new(unpacked.format);
        let x: Vec<_> = x.chunks_exact(columns).map(|row| dot.vector(row)).collect();
        outputs.par_chunks_mut(TAKEN * batch).enumerate().for_each(|(chunk, outputs)| {
            for (row, outputs) in (TAKEN * chunk..).zip(outputs.chunks_exact_mut(batch)) {
                let (bytes, scales, minima) = unpacked.row(row);
                for (output, x) in outputs.iter_mut().zip(&x) {
                    *output = dot.row(bytes, scales, minima, x);
                }
            }
        });
    });
    let y = of_rows::<K, 2>(outputs, [count, batch], &device);
    if batch == 1 { y.reshape([1, count]) } else { transposed(y) }
}

/// `dy·W`: `[batch, rows]` to `[batch, columns]`.
pub(super) fn gradient<K: Cpu>(dy: Tensor<K, 2>, weight: &QuantizedWeight<K>) -> Tensor<K, 2> {
    let ([batch, _], [count, columns], device) = (dy.dims(), weight.shape(), dy.device());
    Rows::of(weight, |rows| {
        let products = panels(count, columns).into_iter().map(|panel| {
            let dense = rows.dense::<K>(panel.clone(), &device);
            let dy = dy.clone().narrow(1, panel.start, panel.len());
            in_pool(batch, [panel.len(), columns], || K::product(dy, dense))
        });
        products.reduce(|sum, product| sum + product).expect("there is a row")
    })
}

/// The rows of a matrix, to be unpacked one by one.
struct Rows<'a> {
    format: Format,
    bytes: &'a [u8],
    scales: &'a [f32],
    minima: Option<&'a [f32]>,
    columns: usize,
    /// The blocks of a row.
    blocks: usize,
}

impl Rows<'_> {
    /// What `work` returns for the rows of the matrix.
    fn of<K: Cpu, R>(weight: &QuantizedWeight<K>, work: impl FnOnce(&Rows) -> R) -> R {
        let Parts { format, codes, scales, minima } = weight.parts();
        let [_, columns] = weight.shape();
        let (codes, minima) = (codes.into_primitive(), minima.map(row_by_row));
        let (bytes, minima) = (bytes_of::<K>(&codes), minima.as_ref().map(rows::<K>));
        let work = |scales: &[f32]| {
            let blocks = columns.div_ceil(format.block());
            work(&Rows { format, bytes, scales, minima, columns, blocks })
        };
        match scales {
            Scales::Full(scales) => work(rows::<K>(&row_by_row(scales))),
            Scales::Doubled(Doubled { codes, scales, offset }) => {
                let codes = codes.into_primitive();
                work(&unpack_scales(bytes_of::<K>(&codes), rows::<K>(&row_by_row(scales)), offset))
            }
        }
    }

    /// The bytes, the scales and the smallest numbers of a row.
    fn row(&self, row: usize) -> (&[u8], &[f32], Option<&[f32]>) {
        let size = self.format.row_bytes(self.columns);
        let bytes = &self.bytes[row * size..][..size];
        let blocks = row * self.blocks..(row + 1) * self.blocks;
        (bytes, &self.scales[blocks.clone()], self.minima.map(|it| &it[blocks]))
    }

    /// Some of the rows, unpacked.
    fn dense<K: Cpu>(&self, rows: Range<usize>, device: &K::Device) -> Tensor<K, 2> {
        let columns = self.columns;
        let mut dense = vec![0.0; rows.len() * columns];
        let unpack = |(chunk, numbers): (usize, &mut [f32])| {
            let start = rows.start + TAKEN * chunk;
            for (row, numbers) in (start..).zip(numbers.chunks_exact_mut(columns)) {
                let (bytes, scales, minima) = self.row(row);
                self.format.unpack(bytes, scales, minima, numbers);
            }
        };
        match dense.len() < WORTH_THREADS_MOVED {
            true => dense.chunks_mut(TAKEN * columns).enumerate().for_each(unpack),
            false => dense.par_chunks_mut(TAKEN * columns).enumerate().for_each(unpack),
        }
        of_rows(dense, [rows.len(), columns], device)
    }
}

/// The bytes of words, in their order.
fn bytes_of<K: Cpu>(words: &IntTensor<K>) -> &[u8] {
    let words = K::words(words).expect("they are row by row, as they were made or selected");
    bytemuck::cast_slice(words)
}

#[derive(Debug)]
struct ProductNode;

impl<K: Cpu> Backward<K, 1> for ProductNode {
    type State = QuantizedWeight<K>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let weight = ops.state;
        unary::<K, _>(ops.parents, ops.node, grads, |dy| primitive(gradient(tensor(dy), &weight)));
    }
}

impl<K: Cpu, C: CheckpointStrategy> Unpacks for Autodiff<K, C> {
    fn dense(weight: &QuantizedWeight<Self>) -> Tensor<Self, 2> {
        constant(without_autodiff(weight).dense())
    }

    fn times(x: Tensor<Self, 2>, weight: &QuantizedWeight<Self>) -> Tensor<Self, 2> {
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
    weight: &QuantizedWeight<Autodiff<K, C>>,
) -> QuantizedWeight<K> {
    weight
        .clone()
        .carried(|float| inner(&float), |int| Tensor::from_primitive(int.into_primitive()))
}
