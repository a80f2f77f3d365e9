//! Heads of attention next to each other or one after the other, in one copy.
//!
//! `swap_dims` copies nothing, but the products that come later, and `reshape`, need the elements row by
//! row. The CPU backends then copy one element at a time. Here whole rows are copied, forwards and
//! backwards.

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
    tensor::{DType, Tensor, TensorPrimitive, backend::Backend, ops::FloatTensor},
};

use super::{
    cpu::{Cpu, WAYS},
    rows::{of_rows, row_by_row, rows},
};

/// `x` with the dimensions 1 and 2 swapped, stored row by row: `[batch, length, heads, size]` to
/// `[batch, heads, length, size]`.
pub(crate) fn swapped<B: Backend>(x: &Tensor<B, 4>) -> Option<Tensor<B, 4>> {
    if x.dtype() != DType::F32 || x.shape().num_elements() == 0 {
        return None;
    }
    WAYS.iter().find_map(|way| (way.heads)(x)?.downcast().ok().map(|output| *output))
}

/// A backend that swaps in one operation.
pub(super) trait Heads: Backend {
    fn swapped(x: Tensor<Self, 4>) -> Tensor<Self, 4>;
}

/// The swapped tensor on the backend K; `None` if `x` is on another backend.
pub(super) fn run_on<K: Heads>(x: &dyn Any) -> Option<Box<dyn Any>> {
    let x: &Tensor<K, 4> = x.downcast_ref()?;
    Some(Box::new(K::swapped(x.clone())))
}

impl<K: Cpu> Heads for K {
    fn swapped(x: Tensor<K, 4>) -> Tensor<K, 4> {
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
}

#[derive(Debug)]
struct SwapNode;

impl<K: Cpu> Backward<K, 1> for SwapNode {
    type State = ();

    fn backward(self, ops: Ops<(), 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        unary::<K, _>(ops.parents, ops.node, grads, swap::<K>);
    }
}

impl<K: Cpu, C: CheckpointStrategy> Heads for Autodiff<K, C> {
    fn swapped(x: Tensor<Self, 4>) -> Tensor<Self, 4> {
        let x = x.into_primitive().tensor();
        let y = swap::<K>(x.primitive.clone());
        let node = SwapNode.prepare::<C>([x.node.clone()]).compute_bound().stateful();
        let y = match node {
            OpsKind::Tracked(prep) => prep.finish((), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        };
        Tensor::from_primitive(TensorPrimitive::Float(y))
    }
}

fn swap<K: Cpu>(x: FloatTensor<K>) -> FloatTensor<K> {
    let x = Tensor::<K, 4>::from_primitive(TensorPrimitive::Float(x));
    K::swapped(x).into_primitive().tensor()
}

#[cfg(test)]
mod tests {
    use burn::backend::autodiff::checkpoint::strategy::BalancedCheckpointing;

    use super::*;

    fn is_one_operation<B: Backend>() -> bool {
        swapped(&Tensor::<B, 4>::ones([2, 3, 4, 5], &Default::default())).is_some()
    }

    #[cfg(feature = "flex")]
    #[test]
    fn heads_are_swapped_in_one_operation_on_flex() {
        use burn::backend::Flex;

        assert!(is_one_operation::<Flex>());
        assert!(is_one_operation::<Autodiff<Flex>>());
        assert!(is_one_operation::<Autodiff<Flex, BalancedCheckpointing>>());
    }

    #[cfg(feature = "ndarray")]
    #[test]
    fn heads_are_swapped_in_one_operation_on_ndarray_in_single_precision() {
        use burn::backend::NdArray;

        assert!(is_one_operation::<NdArray>());
        assert!(is_one_operation::<Autodiff<NdArray>>());
        assert!(is_one_operation::<Autodiff<NdArray, BalancedCheckpointing>>());
        assert!(!is_one_operation::<Autodiff<NdArray<f64>>>());
    }
}
