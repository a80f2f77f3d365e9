//! Products with quantized weights, which are unpacked on the way, forwards and backwards. So nothing else
//! than the packed weight is kept for the backward pass.

mod dot;
mod unpack;

use std::{cell::Cell, ops::Range};

use burn::{
    backend::{Autodiff, autodiff::checkpoint::strategy::CheckpointStrategy},
    tensor::{Tensor, backend::Backend, ops::IntTensor},
};
use burn_lora_kernels::{Blocks, Number, Rows, round_all};
use half::bf16;
use rayon::prelude::*;

use super::{
    autodiff::{constant, inner},
    backend::Cpu,
    operation::Operation,
    pool::in_pool,
    rows::{WORTH_THREADS_MOVED, of_rows, row_by_row, rows, transposed},
    simd::widest,
};
use crate::{
    quantized::{Doubled, Format, Levels, QuantizedWeight, Scales, unpack_scales},
    tensors::primitive,
};
use dot::Dot;
pub(super) use unpack::{of_half, unpack_row};

/// At most so many rows of x are multiplied without unpacking the weight to memory, and in `f32`, since packing would take
/// longer than the product. The products are added in another order then.
pub(super) const FEW: usize = 4;

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

fn dense<K: Cpu>(weight: &QuantizedWeight<K>) -> Tensor<K, 2> {
    Unpacked::of(weight, |rows| rows.dense::<K>(0..weight.shape()[0], &weight.device()))
}

/// `x·Wᵀ`: `[batch, columns]` to `[batch, rows]`.
pub(super) fn product<K: Cpu>(x: Tensor<K, 2>, weight: &QuantizedWeight<K>) -> Tensor<K, 2> {
    let ([batch, columns], [count, _]) = (x.dims(), weight.shape());
    if batch <= FEW {
        return times_few(x, weight);
    }
    let (panels, device) = (panels(count, columns), x.device());
    Unpacked::of(weight, |unpacked| {
        let times = |panel: Range<usize>| {
            let size = [columns, panel.len()];
            unpacked.with_dense::<K, _>(panel, &device, |part| {
                in_pool(batch, size, || K::product(x.clone(), part.transpose()))
            })
        };
        if let [whole] = &panels[..] {
            return times(whole.clone());
        }
        let mut y = vec![0.0; batch * count];
        for panel in panels {
            let part = row_by_row(times(panel.clone()));
            let parts = rows::<K>(&part).chunks_exact(panel.len());
            for (y, part) in y.chunks_exact_mut(count).zip(parts) {
                y[panel.clone()].copy_from_slice(part);
            }
        }
        of_rows(y, [batch, count], &device)
    })
}

/// The rows of a large matrix, in parts that are unpacked one after the other. So a table of embeddings is
/// never there as a whole.
fn panels(rows: usize, columns: usize) -> Vec<Range<usize>> {
    /// The most numbers that are unpacked at once.
    const NUMBERS: usize = 1 << 21;

    let size = (NUMBERS / columns).max(1);
    (0..rows).step_by(size).map(|start| start..rows.min(start + size)).collect()
}

thread_local! {
    /// Memory to unpack rows to, of a panel at most. If each panel had its own, the allocator would hold that of many of
    /// them, since it gives memory back to the system only after a while.
    static SPARE: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// The rows that a thread unpacks at once.
const TAKEN: usize = 16;

/// `x·Wᵀ` for few rows of x. The weight is not unpacked, and its bytes are read once.
fn times_few<K: Cpu>(x: Tensor<K, 2>, weight: &QuantizedWeight<K>) -> Tensor<K, 2> {
    let ([batch, columns], [count, _], device) = (x.dims(), weight.shape(), x.device());
    let x = row_by_row(x);
    let x = rows::<K>(&x);
    let mut outputs = vec![0.0; count * batch];
    Unpacked::of(weight, |unpacked| {
        let dot = Dot::new(unpacked.format);
        let x: Vec<_> = x.chunks_exact(columns).map(|row| dot.vector(row)).collect();
        outputs.par_chunks_mut(TAKEN * batch).enumerate().for_each(|(chunk, outputs)| {
            for (row, outputs) in (TAKEN * chunk..).zip(outputs.chunks_exact_mut(batch)) {
                let (bytes, scales, minima) = unpacked.row(row);
                dot.row(bytes, scales, minima, &x, outputs);
            }
        });
    });
    let y = of_rows::<K, 2>(outputs, [count, batch], &device);
    if batch == 1 { y.reshape([1, count]) } else { transposed(y) }
}

/// `dy·W`: `[batch, rows]` to `[batch, columns]`.
pub(super) fn gradient<K: Cpu>(dy: Tensor<K, 2>, weight: &QuantizedWeight<K>) -> Tensor<K, 2> {
    let ([batch, _], [count, columns], device) = (dy.dims(), weight.shape(), dy.device());
    Unpacked::of(weight, |rows| {
        let products = panels(count, columns).into_iter().map(|panel| {
            let dy = dy.clone().narrow(1, panel.start, panel.len());
            let size = [panel.len(), columns];
            rows.with_dense::<K, _>(panel, &device, |dense| {
                in_pool(batch, size, || K::product(dy, dense))
            })
        });
        products.reduce(|sum, product| sum + product).expect("there is a row")
    })
}

/// The rows of a matrix, to be unpacked one by one.
pub(super) struct Unpacked<'a> {
    format: Format,
    bytes: &'a [u8],
    scales: &'a [f32],
    minima: Option<&'a [f32]>,
    columns: usize,
    /// The blocks of a row.
    blocks: usize,
}

impl Unpacked<'_> {
    /// What `work` returns for the rows of the matrix.
    pub(super) fn of<K: Cpu, R>(
        weight: &QuantizedWeight<K>,
        work: impl FnOnce(&Unpacked) -> R,
    ) -> R {
        let QuantizedWeight { format, columns, codes, scales, minima } = weight.clone();
        let (codes, minima) = (codes.into_primitive(), minima.map(row_by_row));
        let (bytes, minima) = (bytes_of::<K>(&codes), minima.as_ref().map(rows::<K>));
        let blocks = columns.div_ceil(format.block());
        let work = |scales: &[f32], minima: Option<&[f32]>| {
            work(&Unpacked { format, bytes, scales, minima, columns, blocks })
        };
        match scales {
            Scales::None => work(&[], minima),
            Scales::Full(scales) => work(rows::<K>(&row_by_row(scales)), minima),
            Scales::Halves(halves) => {
                let count = halves.dims()[0] * blocks;
                let halves = halves.into_primitive();
                let parts = if format.has_minima() { 2 } else { 1 };
                let numbers = apart(bytes_of::<K>(&halves), blocks, count, parts);
                let (scales, minima) = numbers.split_at(count);
                work(scales, (!minima.is_empty()).then_some(minima))
            }
            Scales::Doubled(Doubled { codes, scales, offset }) => {
                let codes = codes.into_primitive();
                let codes = bytes_of::<K>(&codes);
                work(&unpack_scales(codes, rows::<K>(&row_by_row(scales)), offset), minima)
            }
        }
    }

    /// The bytes, the scales and the smallest numbers of a row.
    fn row(&self, row: usize) -> (&[u8], &[f32], Option<&[f32]>) {
        let size = self.format.row_bytes(self.columns);
        let bytes = &self.bytes[row * size..][..size];
        let blocks = row * self.blocks..(row + 1) * self.blocks;
        let scales = self.scales.get(blocks.clone()).unwrap_or_default();
        (bytes, scales, self.minima.map(|it| &it[blocks]))
    }

    /// Some of the rows, unpacked.
    fn dense<K: Cpu>(&self, rows: Range<usize>, device: &K::Device) -> Tensor<K, 2> {
        self.dense_in(Vec::new(), rows, device)
    }

    /// What `work` returns for some of the rows, unpacked, of which nothing may be left.
    fn with_dense<K: Cpu, R>(
        &self,
        rows: Range<usize>,
        device: &K::Device,
        work: impl FnOnce(Tensor<K, 2>) -> R,
    ) -> R {
        let dense = self.dense_in(SPARE.take(), rows, device);
        let result = work(dense.clone());
        SPARE.set(K::into_rows(primitive(dense)).unwrap_or_default());
        result
    }

    /// The same in this memory.
    fn dense_in<K: Cpu>(
        &self,
        mut dense: Vec<f32>,
        rows: Range<usize>,
        device: &K::Device,
    ) -> Tensor<K, 2> {
        let columns = self.columns;
        dense.resize(rows.len() * columns, 0.0);
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

/// To be multiplied in bf16.
impl Rows for Unpacked<'_> {
    fn dims(&self) -> [usize; 2] {
        let rows = self.bytes.len() / self.format.row_bytes(self.columns);
        [rows, self.columns]
    }

    fn write(&self, row: usize, start: usize, to: &mut [u16]) {
        let (bytes, scales, minima) = self.row(row);
        if self.format == Format::Bf16 {
            let bytes = bytes.as_chunks::<2>().0[start..start + to.len()].iter();
            return widest(
                #[inline(always)]
                || {
                    for (to, &bytes) in to.iter_mut().zip(bytes) {
                        *to = bf16::from_le_bytes(bytes).round();
                    }
                },
            );
        }
        if let Levels::Blocks(format) = self.format.levels() {
            let bytes = &bytes[..format.row_bytes(self.columns)];
            return Blocks::new(format, bytes, [1, self.columns]).write(0, start, to);
        }
        if self.format == Format::F16 {
            let mut numbers = [0.0; AT_ONCE];
            let bytes = bytes.as_chunks::<2>().0[start..start + to.len()].chunks(AT_ONCE);
            for (to, bytes) in to.chunks_mut(AT_ONCE).zip(bytes) {
                let numbers = &mut numbers[..to.len()];
                widest(
                    #[inline(always)]
                    || {
                        for (number, &bytes) in numbers.iter_mut().zip(bytes) {
                            *number = of_half(bytes);
                        }
                    },
                );
                round_all(numbers, to);
            }
            return;
        }
        // A part may begin within a block.
        let (block, end) = (self.format.block(), start + to.len());
        let mut numbers = [0.0; AT_ONCE];
        let mut from = start - start % block;
        while from < end {
            let next = self.columns.min(from + AT_ONCE);
            let (first, blocks) = (from / block, from / block..next.div_ceil(block));
            let bytes = &bytes[first * self.format.block_bytes()..];
            let (scales, minima) = (&scales[blocks.clone()], minima.map(|it| &it[blocks]));
            let there = &mut numbers[..next - from];
            widest(
                #[inline(always)]
                || unpack_row(self.format, bytes, scales, minima, there),
            );
            let (wanted, until) = (from.max(start), next.min(end));
            round_all(&there[wanted - from..until - from], &mut to[wanted - start..until - start]);
            from = next;
        }
    }
}

/// How many numbers are unpacked before they are rounded: whole blocks.
const AT_ONCE: usize = 256;

/// All scales, and then all smallest numbers, if there are some. The bytes are those of all rows: of each first the scales
/// of its blocks, and then the smallest numbers.
fn apart(bytes: &[u8], blocks: usize, count: usize, parts: usize) -> Vec<f32> {
    let halves = bytes.as_chunks::<2>().0;
    let row = halves.len() / (count / blocks);
    let mut numbers = vec![0.0; parts * count];
    for (part, numbers) in numbers.chunks_exact_mut(count).enumerate() {
        for (numbers, row) in numbers.chunks_exact_mut(blocks).zip(halves.chunks_exact(row)) {
            for (number, &half) in numbers.iter_mut().zip(&row[part * blocks..]) {
                *number = of_half(half);
            }
        }
    }
    numbers
}

/// The bytes of words, in their order.
pub(super) fn bytes_of<K: Cpu>(words: &IntTensor<K>) -> &[u8] {
    let words = K::words(words).expect("they are row by row, as they were made or selected");
    bytemuck::cast_slice(words)
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
    use burn::tensor::{Distribution, TensorData};

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
            let to = [Quantization::Int8, Quantization::Nf4, Quantization::Bf16];
            weights.extend(to.map(|to| QuantizedWeight::new(numbers.clone(), to)));
        }
        // No number of 16 bits below 0x7c00 is infinite. In rows of some types there is a broken word.
        let data: Vec<u8> = (0..7 * 3 * 210).map(|it| (it * 37 % 123) as u8).collect();
        for kind in GgufType::ALL {
            let [block, size] = kind.block();
            let data = &data[..7 * 3 * size];
            let shape = [7, 3 * block];
            let weight = QuantizedWeight::<B>::from_gguf(kind, shape, data, &device).unwrap();
            assert!(weight.num_bytes() <= 7 * (3 * size + 2) || weight.format.is_scaled());
            if !weight.format.is_scaled() {
                let numbers = TensorData::new(kind.unpack(data), shape);
                assert_eq!(weight.unpacked().into_data(), numbers, "{kind:?}");
            }
            weights.push(weight);
        }
        // All numbers that are finite, in rows of an odd number of them.
        let finite = (0..=u16::MAX).filter(|it| it & 0x7f80 != 0x7f80);
        let data: Vec<_> = finite.take(255 * 255).flat_map(u16::to_le_bytes).collect();
        let bf16 = QuantizedWeight::from_gguf(GgufType::BF16, [255, 255], &data, &device);
        weights.push(bf16.unwrap());
        weights.iter().all(|weight| {
            let Some(by_slices) = run::<Dense, B>(weight) else { return false };
            assert_eq!(by_slices.into_data(), weight.unpacked().into_data(), "{weight}");
            true
        })
    }

    test_on_each_backend!(unpacks_as_burn_does);
}
