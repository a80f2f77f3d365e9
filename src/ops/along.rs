//! A number that has the gradient of a tensor for its own.

use burn::{
    backend::{
        Autodiff,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops, unary},
        },
    },
    tensor::{Tensor, backend::Backend},
};

use super::{
    autodiff::{inner, output},
    backend::Cpu,
    operation::Operation,
};
use crate::tensors::{primitive, tensor};

/// For `y` and a constant `dy` of its shape: a number, `[1]`, whose backward pass gives y the gradient dy. The number
/// itself, the sum of `y·dy`, is not computed, and is 0.
pub(crate) struct Along<const D: usize>;

impl<const D: usize> Operation for Along<D> {
    type Input<B: Backend> = [Tensor<B, D>; 2];
    type Output<B: Backend> = Tensor<B, 1>;

    fn forward<K: Cpu>([y, dy]: &[Tensor<K, D>; 2]) -> Option<Tensor<K, 1>> {
        let fits = y.dtype() == dy.dtype() && y.shape() == dy.shape();
        fits.then(|| Tensor::zeros([1], (&y.device(), y.dtype())))
    }

    fn tracked<K: Cpu, C: CheckpointStrategy>(
        pair: &[Tensor<Autodiff<K, C>, D>; 2],
    ) -> Option<Tensor<Autodiff<K, C>, 1>> {
        let number = Self::forward::<K>(&pair.each_ref().map(inner))?;
        let [y, dy] = pair;
        Some(output(AlongNode::<D>, [&primitive(y.clone())], number, |_| inner(dy)))
    }
}

#[derive(Debug)]
struct AlongNode<const D: usize>;

impl<K: Cpu, const D: usize> Backward<K, 1> for AlongNode<D> {
    /// The gradient of y.
    type State = Tensor<K, D>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = ops.state;
        unary::<K, _>(ops.parents, ops.node, grads, |factor| {
            primitive(match K::rows(&factor) {
                // What a backward pass begins with.
                Some([1.0]) => dy,
                _ => dy * tensor::<K, 1>(factor).reshape([1; D]),
            })
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{run, testing::test_on_each_backend};

    fn is_one_operation<B: Backend>() -> bool {
        let ones = || Tensor::ones([2, 3], &Default::default());
        run::<Along<2>, B>(&[ones(), ones()]).is_some()
    }

    test_on_each_backend!(is_one_operation);
}
