//! A gate with an activation times other numbers, in one pass over memory.

use std::{
    f64::consts::{FRAC_2_SQRT_PI, SQRT_2},
    fmt,
    marker::PhantomData,
};

use burn::{
    backend::{
        Autodiff,
        autodiff::{
            NodeId,
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops},
        },
    },
    tensor::{DType, Tensor, backend::Backend},
};
use rayon::prelude::*;

use super::{
    autodiff::{inner, output, parents, register},
    backend::Cpu,
    operation::Operation,
    rows::{of_rows, own, own_rows, row_by_row, rows},
    simd::{sigmoid, widest},
};
use crate::tensors::{primitive, tensor};

/// How many numbers a thread takes at once.
const BLOCK: usize = 1 << 13;

/// An activation `x·sigmoid(curve(x))`.
pub(crate) trait Activation: Send + Sync + 'static {
    fn curve(x: f32) -> f32;

    /// The derivative of the curve.
    fn slope(x: f32) -> f32;
}

/// `x·sigmoid(x)`
pub(crate) struct Silu;

impl Activation for Silu {
    #[inline(always)]
    fn curve(x: f32) -> f32 {
        x
    }

    #[inline(always)]
    fn slope(_: f32) -> f32 {
        1.0
    }
}

/// GELU by its approximation `x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³)))`, where `(1 + tanh(u))/2` is `sigmoid(2u)`.
pub(crate) struct GeluTanh;

impl GeluTanh {
    /// 2·√(2/π)
    const FACTOR: f32 = (SQRT_2 * FRAC_2_SQRT_PI) as f32;
    const CUBIC: f32 = 0.044_715;
}

impl Activation for GeluTanh {
    #[inline(always)]
    fn curve(x: f32) -> f32 {
        Self::FACTOR * (x + Self::CUBIC * x * x * x)
    }

    #[inline(always)]
    fn slope(x: f32) -> f32 {
        Self::FACTOR * (1.0 + 3.0 * Self::CUBIC * x * x)
    }
}

/// Replaces each number of a gate by `activation(gate) · up`.
pub(crate) fn gated<A: Activation>(gate: &mut [f32], up: &[f32]) {
    widest(
        #[inline(always)]
        || {
            for (gate, up) in gate.iter_mut().zip(up) {
                *gate = *gate * sigmoid(A::curve(*gate)) * up;
            }
        },
    );
}

/// `activation(gate) · up` for each number, of a pair of one shape in `f32`.
pub(crate) struct Gated<A, const D: usize>(PhantomData<A>);

impl<A: Activation, const D: usize> Operation for Gated<A, D> {
    type Input<B: Backend> = [Tensor<B, D>; 2];
    type Output<B: Backend> = Tensor<B, D>;

    fn forward<K: Cpu>([gate, up]: &[Tensor<K, D>; 2]) -> Option<Tensor<K, D>> {
        let in_f32 = gate.dtype() == DType::F32 && up.dtype() == DType::F32;
        if !in_f32 || gate.shape() != up.shape() || gate.shape().num_elements() == 0 {
            return None;
        }
        let (shape, device) = (gate.dims(), gate.device());
        let [gate, up] = [gate, up].map(|it| row_by_row(it.clone()));
        let pairs = rows::<K>(&gate).par_chunks(BLOCK).zip(rows::<K>(&up).par_chunks(BLOCK));
        let mut y = vec![0.0; shape.iter().product()];
        y.par_chunks_mut(BLOCK).zip(pairs).for_each(|(y, (gate, up))| {
            y.copy_from_slice(gate);
            gated::<A>(y, up);
        });
        Some(of_rows(y, shape, &device))
    }

    fn tracked<K: Cpu, C: CheckpointStrategy>(
        pair: &[Tensor<Autodiff<K, C>, D>; 2],
    ) -> Option<Tensor<Autodiff<K, C>, D>> {
        let y = Self::forward::<K>(&pair.each_ref().map(inner))?;
        let [gate, up] = pair.each_ref().map(|it| primitive(it.clone()));
        Some(output(GatedNode::<A, D>(PhantomData), [&gate, &up], y, |prep| {
            [&gate, &up].map(|it| prep.checkpoint(it))
        }))
    }
}

struct GatedNode<A, const D: usize>(PhantomData<A>);

impl<A, const D: usize> fmt::Debug for GatedNode<A, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GatedNode")
    }
}

impl<K: Cpu, A: Activation, const D: usize> Backward<K, 2> for GatedNode<A, D> {
    /// The nodes of both. The checkpointer keeps the tensors.
    type State = [NodeId; 2];

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let parents = parents(&ops);
        let [gate, up] = ops.state.map(|it| tensor(checkpointer.retrieve_node_output(it)));
        let dy = tensor(grads.consume::<K>(&ops.node));
        let gradients = gradients::<K, A, D>(gate, up, dy);
        register::<K, 2>(grads, parents, gradients.map(|it| Some(primitive(it))));
    }
}

/// With `σ = sigmoid(curve(gate))`: `dy·up·σ·(1 + gate·(1 - σ)·slope(gate))` and `dy·gate·σ`.
fn gradients<K: Cpu, A: Activation, const D: usize>(
    gate: Tensor<K, D>,
    up: Tensor<K, D>,
    dy: Tensor<K, D>,
) -> [Tensor<K, D>; 2] {
    let (shape, device) = (gate.dims(), gate.device());
    let [gate, up] = [gate, up].map(row_by_row);
    let pairs = rows::<K>(&gate).par_chunks(BLOCK).zip(rows::<K>(&up).par_chunks(BLOCK));
    // One of the gradients takes the place of dy.
    let mut d_up = own(dy);
    let mut d_gate = vec![0.0; shape.iter().product()];
    let blocks = d_gate.par_chunks_mut(BLOCK).zip(own_rows::<K>(&mut d_up).par_chunks_mut(BLOCK));
    blocks.zip(pairs).for_each(|((d_gate, d_up), (gate, up))| {
        widest(
            #[inline(always)]
            || {
                for (((d_gate, d_up), gate), up) in d_gate.iter_mut().zip(d_up).zip(gate).zip(up) {
                    let (dy, sigma) = (*d_up, sigmoid(A::curve(*gate)));
                    *d_gate = dy * up * sigma * (1.0 + gate * (1.0 - sigma) * A::slope(*gate));
                    *d_up = dy * gate * sigma;
                }
            },
        );
    });
    [of_rows(d_gate, shape, &device), tensor(d_up)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{run, testing::test_on_each_backend};

    fn is_one_operation<B: Backend>() -> bool {
        let ones = || Tensor::ones([2, 3, 4], &Default::default());
        run::<Gated<Silu, 3>, B>(&[ones(), ones()]).is_some()
            && run::<Gated<GeluTanh, 3>, B>(&[ones(), ones()]).is_some()
    }

    test_on_each_backend!(is_one_operation);
}
