//! OLoRA ([Büyükakyüz 2024](https://arxiv.org/abs/2406.01775)): the adapter starts with orthonormal rows in B,
//! by the QR decomposition of the weight.

use burn::tensor::{Tensor, backend::Backend};

use crate::{decomposition::leading_qr, tensors::at_least_f32};

/// A and B, where `Wᵀ = Q·R`, B is the first columns of Q, and A the first rows of R, both transposed:
/// `[d_input, rank]` and `[rank, d_output]`.
pub(super) fn factors<B: Backend>(weight: Tensor<B, 2>, rank: usize) -> [Tensor<B, 2>; 2] {
    let [q, r] = leading_qr(at_least_f32(weight).transpose(), rank);
    // Through the host, so that they are not permuted views.
    let [a, b] = [r, q].map(|it| (it.device(), it.transpose().into_data()));
    [Tensor::from_data(a.1, &a.0), Tensor::from_data(b.1, &b.0)]
}
