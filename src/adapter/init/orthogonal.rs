//! Orthogonal initial values: A and B are both random, and yet `A·B` is zero, as PEFT's
//! `init_lora_weights="orthogonal"` has them.
//!
//! With the rows of a random orthogonal matrix, A combines the even ones and B the odd ones. Each of A's rows is
//! then orthogonal to each of B's columns.

use burn::tensor::{Tensor, TensorData, backend::Backend};
use rand::{RngExt, rngs::StdRng};
use rand_distr::StandardNormal;

use crate::decomposition::random_orthogonal;

/// What the sums are divided by.
const DIVISOR: f64 = 10.0;

/// A and B, `[d_input, rank]` and `[rank, d_output]`, for an even rank.
pub(super) fn factors<B: Backend>(
    [d_input, rank, d_output]: [usize; 3],
    rng: &mut StdRng,
    device: &B::Device,
) -> (Tensor<B, 2>, Tensor<B, 2>) {
    let rows = random_orthogonal(rank, rng);
    // Rows, each a random combination of every second row of the orthogonal matrix.
    let mut combined = |count: usize, first: usize| {
        let mut values = Vec::with_capacity(count * rank);
        for _ in 0..count {
            let mut sum = vec![0.0; rank];
            for row in rows.iter().skip(first).step_by(2) {
                let by: f64 = rng.sample(StandardNormal);
                sum.iter_mut().zip(row).for_each(|(sum, it)| *sum += by * it / DIVISOR);
            }
            values.extend(sum.into_iter().map(|it| it as f32));
        }
        values
    };
    let a = combined(d_input, 0);
    let b_t = combined(d_output, 1);
    // Transposed on the host, so that it is not a permuted view.
    let b: Vec<f32> = (0..rank)
        .flat_map(|row| b_t[row..].iter().step_by(rank).copied().collect::<Vec<_>>())
        .collect();
    let tensor =
        |values: Vec<f32>, shape| Tensor::from_data(TensorData::new(values, shape), device);
    (tensor(a, [d_input, rank]), tensor(b, [rank, d_output]))
}
