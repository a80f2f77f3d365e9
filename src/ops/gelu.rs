//! GELU in one pass over memory.
//!
//! Burn's CPU backends compute `erf` and `exp` of one number at a time, which took a seventh of the time of a
//! whole encoder. Here the loops have no calls and no branches, so that the compiler computes several numbers
//! at once.

use burn::{
    backend::{
        Autodiff,
        autodiff::{
            NodeId,
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
    rows::{in_blocks, of_rows, row_by_row, rows},
    simd::{exp_of_negative, widest},
};
use crate::tensors::{primitive, tensor};

/// How many numbers a thread takes at once.
const BLOCK: usize = 1 << 14;

/// GELU of each element, where there are some in `f32`.
pub(crate) struct Gelu<const D: usize>;

impl<const D: usize> Operation for Gelu<D> {
    type Input<B: Backend> = Tensor<B, D>;
    type Output<B: Backend> = Tensor<B, D>;

    fn forward<K: Cpu>(x: &Tensor<K, D>) -> Option<Tensor<K, D>> {
        if x.dtype() != DType::F32 || x.shape().num_elements() == 0 {
            return None;
        }
        let (shape, device) = (x.dims(), x.device());
        let x = row_by_row(x.clone());
        let x = rows::<K>(&x);
        let mut y = vec![0.0; x.len()];
        in_blocks(&mut y, x, BLOCK, |y, x| {
            widest(
                #[inline(always)]
                || y.iter_mut().zip(x).for_each(|(y, &x)| *y = x * normal(x).cumulative),
            );
        });
        Some(of_rows(y, shape, &device))
    }

    fn tracked<K: Cpu, C: CheckpointStrategy>(
        x: &Tensor<Autodiff<K, C>, D>,
    ) -> Option<Tensor<Autodiff<K, C>, D>> {
        let y = Self::forward::<K>(&inner(x))?;
        let x = primitive(x.clone());
        Some(output(GeluNode::<D>, [&x], y, |prep| prep.checkpoint(&x)))
    }
}

#[derive(Debug)]
struct GeluNode<const D: usize>;

impl<K: Cpu, const D: usize> Backward<K, 1> for GeluNode<D> {
    /// The node of x. The checkpointer keeps the tensor.
    type State = NodeId;

    fn backward(self, ops: Ops<NodeId, 1>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let x: Tensor<K, D> = tensor(checkpointer.retrieve_node_output(ops.state));
        unary::<K, _>(ops.parents, ops.node, grads, |dy| primitive(gradient(x, tensor(dy))));
    }
}

/// `dy · (Φ(x) + x·φ(x))`.
fn gradient<K: Cpu, const D: usize>(x: Tensor<K, D>, dy: Tensor<K, D>) -> Tensor<K, D> {
    let (shape, device) = (x.dims(), x.device());
    let [x, dy] = [x, dy].map(row_by_row);
    let mut dx = rows::<K>(&dy).to_vec();
    in_blocks(&mut dx, rows::<K>(&x), BLOCK, |dx, x| {
        widest(
            #[inline(always)]
            || {
                for (dx, &x) in dx.iter_mut().zip(x) {
                    let Normal { cumulative, density } = normal(x);
                    *dx *= cumulative + x * density;
                }
            },
        );
    });
    of_rows(dx, shape, &device)
}

/// The standard normal distribution at one number.
struct Normal {
    /// `Φ(x) = (1 + erf(x/√2)) / 2`.
    cumulative: f32,
    /// `φ(x) = exp(-x²/2) / √(2π)`.
    density: f32,
}

/// By equation 7.1.26 of Abramowitz and Stegun's "Handbook of Mathematical Functions" (1964), which is exact
/// to 1.5e-7, about the precision of `f32`. Both values need the same exponential.
#[inline(always)]
fn normal(x: f32) -> Normal {
    use std::f32::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

    const P: f32 = 0.327_591_1 * FRAC_1_SQRT_2;
    #[expect(clippy::excessive_precision, reason = "the digits are the book's")]
    const HALF_A: [f32; 5] = [
        0.254_829_592 / 2.0,
        -0.284_496_736 / 2.0,
        1.421_413_741 / 2.0,
        -1.453_152_027 / 2.0,
        1.061_405_429 / 2.0,
    ];
    const BY_SQRT_2_PI: f32 = FRAC_2_SQRT_PI / 2.0 * FRAC_1_SQRT_2;

    let exponential = exp_of_negative(-0.5 * x * x);
    let t = 1.0 / (1.0 + P * x.abs());
    let polynomial = HALF_A.iter().rev().fold(0.0, |sum, a| (sum + a) * t);
    let tail = polynomial * exponential;
    Normal {
        cumulative: if x < 0.0 { tail } else { 1.0 - tail },
        density: BY_SQRT_2_PI * exponential,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{run, testing::test_on_each_backend};

    fn is_one_operation<B: Backend>() -> bool {
        run::<Gelu<3>, B>(&Tensor::ones([2, 3, 4], &Default::default())).is_some()
    }

    test_on_each_backend!(is_one_operation);
}
