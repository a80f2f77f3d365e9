//! The best approximation of a given rank, of adapters of a higher rank and of fully trained weights.

use std::collections::BTreeMap;

use burn::{
    module::Param,
    tensor::{Tensor, TensorData, backend::Backend},
};
use nalgebra::DMatrix;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use rand_distr::StandardNormal;

use super::LoraAdapters;
use crate::{
    adapter::{LoraAdapter, frozen},
    config::Scaling,
};

/// Adapters that approximate updates of a higher rank.
#[derive(Clone, Debug)]
pub struct Approximation<B: Backend> {
    /// The adapters.
    pub adapters: LoraAdapters<B>,
    /// The share of each layer's update that is kept, from 0 to 1, by the paths in `adapters`. It is a
    /// share of the sum of the update's squared elements. The relative error of the update, in the
    /// Frobenius norm, is `√(1 - kept)`.
    pub kept: BTreeMap<String, f64>,
}

impl<B: Backend> LoraAdapters<B> {
    /// The best approximation of the updates by adapters of at most `rank`. The dense updates are
    /// never formed. The factors are decomposed by QR, which leaves a matrix whose sides are at most the
    /// old rank.
    ///
    /// Biases, and parameters that were trained in full, stay as they are.
    ///
    /// # Panics
    ///
    /// If the rank is 0, or an adapter holds NaN or infinite values.
    pub fn truncate(&self, rank: usize) -> Approximation<B> {
        assert!(rank > 0, "the rank must be at least 1, got 0");
        let mut adapters = self.clone();
        let mut kept = BTreeMap::new();
        for (path, adapter) in &mut adapters.adapters {
            // A = Qa·Ra and Bᵀ = Qb·Rb, so that A·B = Qa·(Ra·Rbᵀ)·Qbᵀ.
            let a = matrix(frozen(&adapter.a)).qr();
            let b = matrix(frozen(&adapter.b)).transpose().qr();
            let small = Svd::new(a.r() * b.r().transpose() * adapter.scale());
            let share = small.kept(rank, small.total());
            let device = adapter.a.device();
            let truncated = small.adapter(&a.q(), &b.q(), rank, &device);
            **adapter = LoraAdapter {
                bias: adapter.bias_delta().map(|bias| Param::from_tensor(bias.detach())),
                dropout: adapter.dropout.clone(),
                layout: adapter.layout.clone(),
                tie: adapter.tie,
                ..truncated
            };
            kept.insert(path.clone(), share);
        }
        Approximation { adapters, kept }
    }
}

/// The best adapter of `rank` for the update `delta: [d_input, d_output]`, and the share that it
/// keeps. Only the leading singular vectors are needed; they are found by subspace iteration
/// ([Halko et al. 2009](https://arxiv.org/abs/0909.4061)).
pub(crate) fn extract<B: Backend>(delta: Tensor<B, 2>, rank: usize) -> (LoraAdapter<B>, f64) {
    /// Directions beyond the rank, and rounds. With these numbers the result is nearly exact.
    const SPARE: usize = 10;
    const ROUNDS: usize = 8;

    let [d_input, d_output] = delta.dims();
    let device = delta.device();
    let total = values(delta.clone()).iter().map(|it| it * it).sum();
    let width = (rank + SPARE).min(d_input).min(d_output);
    let mut rng = StdRng::seed_from_u64(0);
    let random = DMatrix::from_fn(d_output, width, |_, _| rng.sample(StandardNormal));
    let product = |left: &Tensor<B, 2>, right: &DMatrix<f64>| {
        matrix(left.clone().matmul(tensor(right, &device).cast(left.dtype())))
    };
    let transposed = delta.clone().transpose();
    let mut basis = product(&delta, &random).qr().q();
    for _ in 0..ROUNDS {
        let back = product(&transposed, &basis).qr().q();
        basis = product(&delta, &back).qr().q();
    }
    // delta ≈ basis·(basisᵀ·delta) = basis·Rᵀ·Qᵀ, where deltaᵀ·basis = Q·R.
    let rest = product(&transposed, &basis).qr();
    let small = Svd::new(rest.r().transpose());
    let kept = small.kept(rank, total);
    (small.adapter(&basis, &rest.q(), rank, &device), kept)
}

/// The singular value decomposition of a small matrix, largest values first.
struct Svd {
    left: DMatrix<f64>,
    values: Vec<f64>,
    right: DMatrix<f64>,
}

impl Svd {
    fn new(matrix: DMatrix<f64>) -> Self {
        // The iteration does not end if a value is NaN or infinite.
        assert!(
            matrix.iter().all(|it| it.is_finite()),
            "there is no decomposition of NaN or infinite values"
        );
        let svd = matrix.svd(true, true);
        let (left, right) = (svd.u.expect("asked for"), svd.v_t.expect("asked for"));
        Self { left, values: svd.singular_values.iter().copied().collect(), right }
    }

    fn total(&self) -> f64 {
        self.values.iter().map(|it| it * it).sum()
    }

    fn kept(&self, rank: usize, total: f64) -> f64 {
        let kept: f64 = self.values.iter().take(rank).map(|it| it * it).sum();
        // All of an update of zero is kept.
        if total > 0.0 { (kept / total).min(1.0) } else { 1.0 }
    }

    /// The adapter of the `rank` largest singular values. The columns of `input` and `output` are the
    /// bases for the matrix's rows and columns. A and B are each scaled by the values' square roots.
    fn adapter<B: Backend>(
        &self,
        input: &DMatrix<f64>,
        output: &DMatrix<f64>,
        rank: usize,
        device: &B::Device,
    ) -> LoraAdapter<B> {
        let rank = rank.min(self.values.len());
        let mut left = self.left.columns(0, rank).into_owned();
        let mut right = self.right.rows(0, rank).into_owned();
        for (index, value) in self.values.iter().take(rank).enumerate() {
            left.column_mut(index).scale_mut(value.sqrt());
            right.row_mut(index).scale_mut(value.sqrt());
        }
        let (a, b) = (input * left, right * output.transpose());
        LoraAdapter::new(tensor(&a, device), tensor(&b, device), 1.0, Scaling::Alpha)
    }
}

fn values<B: Backend>(tensor: Tensor<B, 2>) -> Vec<f64> {
    tensor.into_data().convert::<f64>().to_vec().expect("the data was converted to this type")
}

fn matrix<B: Backend>(tensor: Tensor<B, 2>) -> DMatrix<f64> {
    let [rows, columns] = tensor.dims();
    DMatrix::from_row_slice(rows, columns, &values(tensor))
}

fn tensor<B: Backend>(matrix: &DMatrix<f64>, device: &B::Device) -> Tensor<B, 2> {
    let values: Vec<f32> = matrix.transpose().iter().map(|it| *it as f32).collect();
    Tensor::from_data(TensorData::new(values, [matrix.nrows(), matrix.ncols()]), device)
}
