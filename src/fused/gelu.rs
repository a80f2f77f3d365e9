//! GELU in one pass over memory.
//!
//! Burn's CPU backends compute `erf` and `exp` of one number at a time, which took a seventh of the time of a
//! whole encoder. Here the loops have no calls and no branches, so that the compiler computes several numbers
//! at once.

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

use super::{
    cpu::{Cpu, WAYS},
    node::{primitive, tensor},
    rows::{in_blocks, of_rows, row_by_row, rows},
};

/// How many numbers a thread takes at once.
const BLOCK: usize = 1 << 14;

/// GELU of each element; `None` on other backends, or for other types of elements.
pub(crate) fn gelu<B: Backend, const D: usize>(x: &Tensor<B, D>) -> Option<Tensor<B, D>> {
    if x.dtype() != DType::F32 || x.shape().num_elements() == 0 {
        return None;
    }
    let flat: Tensor<B, 1> = x.clone().flatten(0, D - 1);
    let output = WAYS.iter().find_map(|way| (way.gelu)(&flat)?.downcast::<Tensor<B, 1>>().ok())?;
    Some(output.reshape(x.dims()))
}

/// A backend that computes GELU in one pass.
pub(super) trait Gelu: Backend {
    fn activated(x: Tensor<Self, 1>) -> Tensor<Self, 1>;
}

/// GELU on the backend K; `None` if `x` is on another backend.
pub(super) fn run_on<K: Gelu>(x: &dyn Any) -> Option<Box<dyn Any>> {
    let x: &Tensor<K, 1> = x.downcast_ref()?;
    Some(Box::new(K::activated(x.clone())))
}

impl<K: Cpu> Gelu for K {
    fn activated(x: Tensor<K, 1>) -> Tensor<K, 1> {
        let (shape, device) = (x.dims(), x.device());
        let x = row_by_row(x);
        let x = rows::<K>(&x);
        let mut y = vec![0.0; x.len()];
        in_blocks(&mut y, x, BLOCK, |y, x| {
            for (y, &x) in y.iter_mut().zip(x) {
                *y = x * normal(x).cumulative;
            }
        });
        of_rows(y, shape, &device)
    }
}

#[derive(Debug)]
struct GeluNode;

impl<K: Cpu> Backward<K, 1> for GeluNode {
    /// The node of x. The checkpointer keeps the tensor.
    type State = NodeId;

    fn backward(self, ops: Ops<NodeId, 1>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let x: Tensor<K, 1> = tensor(checkpointer.retrieve_node_output(ops.state));
        let dy: Tensor<K, 1> = tensor(grads.consume::<K>(&ops.node));
        let [Some(parent)] = ops.parents else { return };
        grads.register::<K>(parent.id, primitive(gradient(x, dy)));
    }
}

/// `dy · (Φ(x) + x·φ(x))`.
fn gradient<K: Cpu>(x: Tensor<K, 1>, dy: Tensor<K, 1>) -> Tensor<K, 1> {
    let (shape, device) = (x.dims(), x.device());
    let [x, dy] = [x, dy].map(row_by_row);
    let mut dx = rows::<K>(&dy).to_vec();
    in_blocks(&mut dx, rows::<K>(&x), BLOCK, |dx, x| {
        for (dx, &x) in dx.iter_mut().zip(x) {
            let Normal { cumulative, density } = normal(x);
            *dx *= cumulative + x * density;
        }
    });
    of_rows(dx, shape, &device)
}

impl<K: Cpu, C: CheckpointStrategy> Gelu for Autodiff<K, C> {
    fn activated(x: Tensor<Self, 1>) -> Tensor<Self, 1> {
        let x = x.into_primitive().tensor();
        let y = primitive(K::activated(tensor(x.primitive.clone())));
        let y = match GeluNode.prepare::<C>([x.node.clone()]).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let kept = prep.checkpoint(&x);
                prep.finish(kept, y)
            }
            OpsKind::UnTracked(prep) => prep.finish(y),
        };
        Tensor::from_primitive(TensorPrimitive::Float(y))
    }
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

/// `exp(x)` for `x ≤ 0`, with values below the smallest normal number rounded up to it.
///
/// `x = k·ln 2 + r` with a whole number k and `|r| ≤ ln 2 / 2`, so `exp(x) = 2ᵏ·exp(r)`, and the Taylor
/// polynomial of degree 6 is exact enough for r.
#[inline(always)]
fn exp_of_negative(x: f32) -> f32 {
    use std::f32::consts::{LN_2, LOG2_E};

    /// Adding this number to a small one rounds that one to a whole number, in the lowest bits.
    const ROUND: f32 = 1.5 * (1 << 23) as f32;
    /// The upper bits of ln 2, whose product with k is exact, and what they leave out.
    const LN_2_UPPER: f32 = 0.693_359_4;
    const LN_2_LOWER: f32 = LN_2 - LN_2_UPPER;

    let x = x.max(-87.0);
    let rounded = x * LOG2_E + ROUND;
    let k = rounded - ROUND;
    let r = x - k * LN_2_UPPER - k * LN_2_LOWER;
    let taylor = [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
    let polynomial = taylor.iter().fold(0.0, |sum, factor| sum * r + factor);
    // The exponent of a number in f32 lies above 23 bits, and is stored plus 127.
    let power = (rounded.to_bits() << 23).wrapping_add(127 << 23);
    polynomial * f32::from_bits(power)
}

#[cfg(test)]
mod tests {
    use burn::backend::autodiff::checkpoint::strategy::BalancedCheckpointing;

    use super::*;

    fn is_one_operation<B: Backend>() -> bool {
        gelu(&Tensor::<B, 3>::ones([2, 3, 4], &Default::default())).is_some()
    }

    #[cfg(feature = "flex")]
    #[test]
    fn gelu_is_one_operation_on_flex() {
        use burn::backend::Flex;

        assert!(is_one_operation::<Flex>());
        assert!(is_one_operation::<Autodiff<Flex>>());
        assert!(is_one_operation::<Autodiff<Flex, BalancedCheckpointing>>());
    }

    #[cfg(feature = "ndarray")]
    #[test]
    fn gelu_is_one_operation_on_ndarray_in_single_precision() {
        use burn::backend::NdArray;

        assert!(is_one_operation::<NdArray>());
        assert!(is_one_operation::<Autodiff<NdArray>>());
        assert!(is_one_operation::<Autodiff<NdArray, BalancedCheckpointing>>());
        assert!(!is_one_operation::<Autodiff<NdArray<f64>>>());
    }
}
