//! Heads of attention next to each other or one after the other, in one copy.
//!
//! `swap_dims` copies nothing, but the products that come later, and `reshape`, need the elements row by
//! row. The CPU backends then copy one element at a time. Here whole rows are copied, forwards and
//! backwards.

use burn::{
    backend::{
        Autodiff,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops, unary},
        },
    },
    tensor::{DType, Tensor, backend::Backend},
};

use super::{
    autodiff::{inner, output},
    backend::Cpu,
    operation::Operation,
    rows::{of_rows, row_by_row, rows},
};
use crate::tensors::{primitive, tensor};

/// The dimensions 1 and 2 swapped, and the result stored row by row: `[batch, length, heads, size]` to
/// `[batch, heads, length, size]`, where there are elements in `f32`.
pub(crate) struct SwapHeads;

impl Operation for SwapHeads {
    type Input<B: Backend> = Tensor<B, 4>;
    type Output<B: Backend> = Tensor<B, 4>;

    fn forward<K: Cpu>(x: &Tensor<K, 4>) -> Option<Tensor<K, 4>> {
        if x.dtype() != DType::F32 || x.shape().num_elements() == 0 {
            return None;
        }
        Some(swapped(x.clone()))
    }

    fn tracked<K: Cpu, C: CheckpointStrategy>(
        x: &Tensor<Autodiff<K, C>, 4>,
    ) -> Option<Tensor<Autodiff<K, C>, 4>> {
        let y = Self::forward::<K>(&inner(x))?;
        Some(output(SwapNode, [&primitive(x.clone())], y, |_| ()))
    }
}

fn swapped<K: Cpu>(x: Tensor<K, 4>) -> Tensor<K, 4> {
    let ([batch, outer, inner, size], device) = (x.dims(), x.device());
    let x = row_by_row(x);
    let x = rows::<K>(&x);
    let mut output = Vec::with_capacity(x.len());
    for block in x.chunks_exact(outer * inner * size) {
        for start in (0..inner * size).step_by(size) {
            for row in block.chunks_exact(inner * size) {
                output.extend_from_slice(&row[start..start + size]);
            }
        }
    }
    of_rows(output, [batch, inner, outer, size], &device)
}

#[derive(Debug)]
struct SwapNode;

impl<K: Cpu> Backward<K, 1> for SwapNode {
    type State = ();

    fn backward(self, ops: Ops<(), 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        unary::<K, _>(ops.parents, ops.node, grads, |dy| primitive(swapped::<K>(tensor(dy))));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{run, testing::test_on_each_backend};

    fn is_one_operation<B: Backend>() -> bool {
        run::<SwapHeads, B>(&Tensor::ones([2, 3, 4, 5], &Default::default())).is_some()
    }

    test_on_each_backend!(is_one_operation);
}
