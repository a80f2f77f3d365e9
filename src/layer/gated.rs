use burn::tensor::{
    Tensor,
    activation::{gelu_approximate, silu},
    backend::Backend,
};

use crate::ops::{Activation, Gated, GeluTanh, Silu, run};

/// `silu(gate)·up`, element by element: the activation of Llama's feed-forward networks ([Shazeer
/// 2020](https://arxiv.org/abs/2002.05202)). The shape is any, and the same for both.
///
/// On the CPU backends of the features `flex` and `ndarray` it is one operation, in `f32`, that uses all cores and
/// goes over the numbers once in each direction.
///
/// # Panics
///
/// If the shapes differ.
pub fn swiglu<B: Backend, const D: usize>(gate: Tensor<B, D>, up: Tensor<B, D>) -> Tensor<B, D> {
    gated::<Silu, B, D>(gate, up, silu)
}

/// `gelu(gate)·up`, element by element, where GELU is approximated by a hyperbolic tangent: the activation of Gemma's
/// feed-forward networks. Otherwise as [`swiglu`].
///
/// # Panics
///
/// If the shapes differ.
pub fn geglu<B: Backend, const D: usize>(gate: Tensor<B, D>, up: Tensor<B, D>) -> Tensor<B, D> {
    gated::<GeluTanh, B, D>(gate, up, gelu_approximate)
}

fn gated<A: Activation, B: Backend, const D: usize>(
    gate: Tensor<B, D>,
    up: Tensor<B, D>,
    activation: impl Fn(Tensor<B, D>) -> Tensor<B, D>,
) -> Tensor<B, D> {
    assert!(
        gate.dims() == up.dims(),
        "a gate of the shape {:?} expected, got {:?}",
        up.dims(),
        gate.dims(),
    );
    let pair = [gate, up];
    run::<Gated<A, D>, B>(&pair).unwrap_or_else(|| {
        let [gate, up] = pair;
        activation(gate) * up
    })
}
