//! PiSSA ([Meng et al. 2024](https://arxiv.org/abs/2404.02948)): the adapter starts as the part of the weight
//! that has the largest singular values, `W ≈ U·S·Vᵀ`.
//!
//! A is `U·√(S/s)` and B is `√(S/s)·Vᵀ`, so that `s·A·B = U·S·Vᵀ`.

use burn::tensor::{Tensor, backend::Backend};

use crate::{decomposition::Svd, tensors::at_least_f32};

/// A and B by all singular values of the weight: `[d_input, rank]` and `[rank, d_output]`.
pub(super) fn exact<B: Backend>(
    weight: Tensor<B, 2>,
    rank: usize,
    scale: f64,
) -> [Tensor<B, 2>; 2] {
    let (device, weight) = (weight.device(), at_least_f32(weight));
    divided(Svd::exact(weight).factors(rank, &device), scale)
}

/// The same by the leading singular values alone, which is much faster, with as many `iterations` and spare
/// directions as PEFT's `pissa_niter_[iterations]` has.
pub(super) fn randomized<B: Backend>(
    weight: Tensor<B, 2>,
    rank: usize,
    iterations: usize,
    scale: f64,
) -> [Tensor<B, 2>; 2] {
    let (device, weight) = (weight.device(), at_least_f32(weight));
    divided(Svd::leading(weight, rank, 0, iterations).factors(rank, &device), scale)
}

fn divided<B: Backend>([a, b]: [Tensor<B, 2>; 2], scale: f64) -> [Tensor<B, 2>; 2] {
    let root = scale.abs().sqrt();
    [a.div_scalar(root), b.div_scalar(root * scale.signum())]
}
