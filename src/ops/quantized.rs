//! Products with quantized weights, which are unpacked on the way, forwards and backwards. So nothing else
//! than the packed weight is kept for the backward pass.

mod dot;
mod unpack;

use std::ops::Range;

use burn::{
    backend::{
        Autodiff,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops, unary},
        },
    },
    tensor::{DType, Tensor, backend::Backend, ops::IntTensor},
};
use rayon::prelude::*;

use super::{
    autodiff::{constant, inner, output},
    backend::Cpu,
    operation::Operation,
    pool::in_pool,
    rows::{WORTH_THREADS_MOVED, of_rows, row_by_row, rows, transposed},
};
use crate::{
    quantized::{Doubled, Format, QuantizedWeight, Scales, unpack_scales},
    tensors::{primitive, tensor},
};
use dot::Dot;
use unpack::unpack_row;

/// At most so many rows of x are multiplied without unpacking the weight to memory. The products are added in
/// another order then.
const FEW: usize = 4;

/// The numbers of the matrix.
pub(crate) struct Dense;

impl Operation for Dense {
    type Input<B: Backend> = QuantizedWeight<B>;
    type Output<B: Backend> = Tensor<B, 2>;

    fn forward<K: Cpu>(weight: &QuantizedWeight<K>) -> Option<Tensor<K, 2>> {
        Some(dense(weight))
    }

    fn tracked<K: Cpu, C: CheckpointStrategy>(
        weight: &QuantizedWeight<Autodiff<K, C>>,
    ) -> Option<Tensor<Autodiff<K, C>, 2>> {
        Some(constant(dense::<K>(&without_autodiff(weight))))
    }
}

/// `x·Wᵀ`, for the matrix W and x in `f32`: `[batch, columns]` to `[batch, rows]`.
pub(crate) struct TimesQuantized;

impl Operation for TimesQuantized {
    type Input<B: Backend> = (Tensor<B, 2>, QuantizedWeight<B>);
    type Output<B: Backend> = Tensor<B, 2>;

    fn forward<K: Cpu>((x, weight): &(Tensor<K, 2>, QuantizedWeight<K>)) -> Option<Tensor<K, 2>> {
        if x.dtype() != DType::F32 || x.dims()[1] != weight.shape()[1] {
            return None;
        }
        Some(product(x.clone(), weight))
    }

    fn tracked<K: Cpu, C: CheckpointStrategy>(
        (x, weight): &(Tensor<Autodiff<K, C>, 2>, QuantizedWeight<Autodiff<K, C>>),
    ) -> Option<Tensor<Autodiff<K, C>, 2>> {
        let plain = (inner(x), without_autodiff(weight));
        let y = Self::forward::<K>(&plain)?;
        Some(output(ProductNode, [&primitive(x.clone())], y, |_| plain.1))
    }
}

fn dense<K: Cpu>(weight: &QuantizedWeight<K>) -> Tensor<K, 2> {
    Rows::of(weight, |rows| rows.dense::<K>(0..weight.shape()[0], &weight.device()))
}

/// `x·Wᵀ`: `[batch, columns]` to `[batch, rows]`.
pub(super) fn product<K: Cpu>(x: Tensor<K, 2>, weight: &QuantizedWeight<K>) -> Tensor<K, 2> {
    let ([batch, columns], [count, _]) = (x.dims(), weight.shape());
    if batch <= FEW {
        return times_few(x, weight);
    }
    let panels = panels(count, columns);
    if panels.len() == 1 {
        return in_pool(batch, [columns, count], || K::product(x, dense(weight).transpose()));
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
        let QuantizedWeight { format, columns, codes, scales, minima } = weight.clone();
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
                unpack_row(self.format, bytes, scales, minima, numbers);
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

/// The weight on the backend without autodiff.
pub(super) fn without_autodiff<K: Cpu, C: CheckpointStrategy>(
    weight: &QuantizedWeight<Autodiff<K, C>>,
) -> QuantizedWeight<K> {
    weight
        .clone()
        .carried(|float| inner(&float), |int| Tensor::from_primitive(int.into_primitive()))
}

#[cfg(test)]
mod tests {
    use burn::tensor::Distribution;

    use super::*;
    use crate::{
        ops::{run, testing::test_on_each_backend},
        quantized::{GgufType, Quantization},
    };

    /// The CPU backends unpack by themselves, and all other ones by Burn's operations.
    fn unpacks_as_burn_does<B: Backend>() -> bool {
        let device = B::Device::default();
        let mut weights = Vec::new();
        // More than one group of doubly quantized scales, also with threads, and rows with broken blocks.
        for shape in [[300, 64], [1, 1], [5, 130], [520, 512]] {
            let numbers = Tensor::<B, 2>::random(shape, Distribution::Default, &device);
            let to = [Quantization::Int8, Quantization::Nf4];
            weights.extend(to.map(|to| QuantizedWeight::new(numbers.clone(), to)));
        }
        let data: Vec<u8> = (0..7 * 3 * 34).map(|it| (it * 37 % 64) as u8).collect();
        for (kind, size) in [(GgufType::Q8_0, 34), (GgufType::Q4_0, 18), (GgufType::Q4_1, 20)] {
            let data = &data[..7 * 3 * size];
            weights.push(QuantizedWeight::from_gguf(kind, [7, 96], data, &device).unwrap());
        }
        weights.iter().all(|weight| {
            let Some(by_slices) = run::<Dense, B>(weight) else { return false };
            assert_eq!(by_slices.into_data(), weight.unpacked().into_data());
            let x = Tensor::ones([2, weight.shape()[1]], &device);
            run::<TimesQuantized, B>(&(x, weight.clone())).is_some()
        })
    }

    test_on_each_backend!(unpacks_as_burn_does);
}
