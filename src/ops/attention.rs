//! Attention in blocks, which never has the scores of a text as a whole, for the CPU backends.
//!
//! With Burn's operations, the scores `[heads, length, length]` are formed, masked, exponentiated, divided and kept
//! for the backward pass. Here a block of queries reads one block of keys after the other, forwards and backwards.
//! So memory grows with the length and not with its square, and what no query of a block sees costs nothing.

mod backward;
mod bf16;
mod block;
mod forward;
mod node;
mod panels;
mod single;

use std::{ops::Range, sync::Arc};

use burn::{
    backend::{Autodiff, autodiff::checkpoint::strategy::CheckpointStrategy},
    tensor::{DType, Tensor, backend::Backend},
};

use super::{
    backend::Cpu,
    operation::Operation,
    quantized::FEW,
    rows::{of_rows, row_by_row, rows},
};
use crate::precision::Precision;
use block::{Call, Shape};

pub(crate) use single::Single;

/// The values that attention is computed from.
#[derive(Clone, Debug)]
pub(crate) struct Attention<B: Backend> {
    /// `[batch, length, heads, size]`
    pub q: Tensor<B, 4>,
    /// `[batch, total, shared, size]`. The number of heads of queries is a multiple of `shared`.
    pub k: Tensor<B, 4>,
    pub v: Tensor<B, 4>,
    /// The first key that each query sees, and the one after the last: `[batch or 1, length]`.
    pub ranges: Arc<[[u32; 2]]>,
    /// What the products of queries and keys are multiplied by.
    pub scale: f64,
    /// If there is one, a score s becomes `cap·tanh(s/cap)`.
    pub soft_cap: Option<f64>,
    /// Whether a head may attend to nothing: 1 is added to the sum of exponentials.
    pub quiet: bool,
    pub precision: Precision,
}

/// `softmax(scale·q·kᵀ)·v` for each head: `[batch, length, heads, size]`. With autodiff, gradients reach q, k
/// and v. A query that sees nothing has the output 0.
pub(crate) struct Attend;

impl Operation for Attend {
    type Input<B: Backend> = Attention<B>;
    type Output<B: Backend> = Tensor<B, 4>;

    fn forward<K: Cpu>(input: &Attention<K>) -> Option<Tensor<K, 4>> {
        Some(input.output(input.shape()?).0)
    }

    fn tracked<K: Cpu, C: CheckpointStrategy>(
        input: &Attention<Autodiff<K, C>>,
    ) -> Option<Tensor<Autodiff<K, C>, 4>> {
        Some(node::output_of(input, input.shape()?))
    }
}

impl<B: Backend> Attention<B> {
    /// The sizes; `None` if they do not fit each other, something is empty, or not in `f32`.
    fn shape(&self) -> Option<Shape> {
        let ([batch, length, heads, size], [_, total, shared, _]) = (self.q.dims(), self.k.dims());
        let in_f32 = [&self.q, &self.k, &self.v].iter().all(|it| it.dtype() == DType::F32);
        let fits = ![batch, length, heads, size, total, shared].contains(&0)
            && heads.is_multiple_of(shared)
            && self.k.dims() == [batch, total, shared, size]
            && self.v.dims() == self.k.dims()
            && [length, batch * length].contains(&self.ranges.len());
        (in_f32 && fits).then_some(Shape { batch, length, total, heads, shared, size })
    }
}

impl<K: Cpu> Attention<K> {
    /// Calls `work` with the values.
    fn call<R>(&self, shape: Shape, work: impl FnOnce(Call) -> R) -> R {
        let [q, k, v] = [&self.q, &self.k, &self.v].map(|it| row_by_row(it.clone()));
        work(Call {
            shape,
            q: rows::<K>(&q),
            k: rows::<K>(&k),
            v: rows::<K>(&v),
            ranges: &self.ranges,
            scale: self.scale as f32,
            soft_cap: self.soft_cap.map(|it| it as f32),
            quiet: self.quiet,
            // Few queries are no work for tiles, and to pack all keys for them is.
            precision: if shape.length > FEW { self.precision } else { Precision::F32 },
        })
    }

    /// The output, and the logarithm of the sum of the exponentials of each query's scores, `[batch, length,
    /// heads]`.
    fn output(&self, shape: Shape) -> (Tensor<K, 4>, Vec<f32>) {
        let (y, sums) = self.call(shape, forward::forward);
        (of_rows(y, self.q.dims(), &self.q.device()), sums)
    }

    /// The gradients of q, k and v.
    fn gradients(
        &self,
        shape: Shape,
        y: Tensor<K, 4>,
        sums: &[f32],
        dy: Tensor<K, 4>,
    ) -> [Tensor<K, 4>; 3] {
        let [y, dy] = [y, dy].map(row_by_row);
        let [dq, dk, dv] =
            self.call(shape, |call| backward::backward(call, rows::<K>(&y), sums, rows::<K>(&dy)));
        let device = self.q.device();
        [(dq, &self.q), (dk, &self.k), (dv, &self.v)]
            .map(|(gradient, of)| of_rows(gradient, of.dims(), &device))
    }
}

/// What attention of slices is computed from: many queries of one text.
#[derive(Clone, Copy)]
pub(crate) struct Queries<'a> {
    /// `[length, heads, size]`
    pub q: &'a [f32],
    /// `[total, shared, size]`
    pub k: &'a [f32],
    pub v: &'a [f32],
    /// The first key that each query sees, and the one after the last.
    pub ranges: &'a [[u32; 2]],
    /// The numbers of heads of queries and of keys, and their size.
    pub heads: [usize; 3],
    pub scale: f32,
    pub soft_cap: Option<f32>,
    pub precision: Precision,
}

impl Queries<'_> {
    /// The outputs, `[length, heads, size]`, on all cores.
    pub fn outputs(&self) -> Vec<f32> {
        forward::forward(self.call()).0
    }

    /// The same in `f32`, on this core, of these queries. They do not depend on how many there are, to the bit.
    pub fn outputs_here(&self, queries: Range<usize>, y: &mut [f32]) {
        forward::block_by_block(self.call(), queries, y);
    }

    fn call(&self) -> Call<'_> {
        let &Self { q, k, v, ranges, heads: [heads, shared, size], scale, soft_cap, precision } =
            self;
        let (length, total) = (ranges.len(), k.len() / (shared * size));
        let shape = Shape { batch: 1, length, total, heads, shared, size };
        let quiet = false;
        Call { shape, q, k, v, ranges, scale, soft_cap, quiet, precision }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{run, testing::test_on_each_backend};

    fn is_one_operation<B: Backend>() -> bool {
        let ones = |shape: [usize; 4]| Tensor::<B, 4>::ones(shape, &Default::default());
        let (q, k) = (ones([2, 3, 4, 5]), ones([2, 6, 2, 5]));
        let ranges = vec![[0, 6]; 3].into();
        let (v, precision) = (k.clone(), Precision::F32);
        let input =
            Attention { q, k, v, ranges, scale: 0.5, soft_cap: None, quiet: false, precision };
        run::<Attend, B>(&input).is_some()
    }

    test_on_each_backend!(is_one_operation);
}
