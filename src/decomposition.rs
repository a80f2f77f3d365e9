//! Singular values and QR of matrices, computed on the host in double precision.

use burn::tensor::{Tensor, TensorData, backend::Backend};
use nalgebra::DMatrix;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use rand_distr::StandardNormal;

/// The singular value decomposition of a matrix, largest values first, or the leading part of one.
pub(crate) struct Svd {
    /// The left singular vectors are the columns: `[rows, count]`.
    left: DMatrix<f64>,
    values: Vec<f64>,
    /// The right singular vectors are the rows: `[count, columns]`.
    right: DMatrix<f64>,
}

impl Svd {
    /// All singular values.
    pub fn exact<B: Backend>(tensor: Tensor<B, 2>) -> Self {
        Self::of(matrix(tensor))
    }

    /// The `count` largest singular values, found by subspace iteration
    /// ([Halko et al. 2009](https://arxiv.org/abs/0909.4061)). `spare` directions more than these and
    /// each of the `rounds` make the result more precise.
    pub fn leading<B: Backend>(
        tensor: Tensor<B, 2>,
        count: usize,
        spare: usize,
        rounds: usize,
    ) -> Self {
        let ([rows, columns], device) = (tensor.dims(), tensor.device());
        let width = (count + spare).min(rows).min(columns);
        let mut rng = StdRng::seed_from_u64(0);
        let random = DMatrix::from_fn(columns, width, |_, _| rng.sample(StandardNormal));
        let product = |left: &Tensor<B, 2>, right: &DMatrix<f64>| {
            matrix(left.clone().matmul(self::tensor::<B>(right, &device).cast(left.dtype())))
        };
        let transposed = tensor.clone().transpose();
        let mut basis = product(&tensor, &random).qr().q();
        for _ in 0..rounds {
            let back = product(&transposed, &basis).qr().q();
            basis = product(&tensor, &back).qr().q();
        }
        // M ≈ basis·(basisᵀ·M) = basis·Rᵀ·Qᵀ, where Mᵀ·basis = Q·R.
        let rest = product(&transposed, &basis).qr();
        Self::of(rest.r().transpose()).between(&basis, &rest.q().transpose())
    }

    /// That of the product `scale·left·right`. The product is never formed: the factors are decomposed by
    /// QR, which leaves a matrix whose sides are at most their rank.
    pub fn of_product<B: Backend>(left: Tensor<B, 2>, right: Tensor<B, 2>, scale: f64) -> Self {
        // left = Ql·Rl and rightᵀ = Qr·Rr, so that left·right = Ql·(Rl·Rrᵀ)·Qrᵀ.
        let (left, right) = (matrix(left).qr(), matrix(right).transpose().qr());
        let small = Self::of(left.r() * right.r().transpose() * scale);
        small.between(&left.q(), &right.q().transpose())
    }

    fn of(matrix: DMatrix<f64>) -> Self {
        // The iteration does not end if a value is NaN or infinite.
        assert!(
            matrix.iter().all(|it| it.is_finite()),
            "there is no decomposition of NaN or infinite values"
        );
        let svd = matrix.svd(true, true);
        let (left, right) = (svd.u.expect("asked for"), svd.v_t.expect("asked for"));
        Self { left, values: svd.singular_values.iter().copied().collect(), right }
    }

    /// The decomposition of `left·M·right`, where M is what this one is of, and the columns of `left` and the
    /// rows of `right` are orthonormal.
    fn between(self, left: &DMatrix<f64>, right: &DMatrix<f64>) -> Self {
        Self { left: left * self.left, values: self.values, right: self.right * right }
    }

    /// The singular values.
    pub fn values(&self) -> &[f64] {
        &self.values
    }

    /// The first left singular vectors as columns: `[rows, count]`.
    pub fn left<B: Backend>(&self, count: usize, device: &B::Device) -> Tensor<B, 2> {
        tensor(&self.left.columns(0, count.min(self.values.len())).into_owned(), device)
    }

    /// The sum of the squares of all values.
    pub fn total(&self) -> f64 {
        self.values.iter().map(|it| it * it).sum()
    }

    /// The share that the `rank` largest values have in the sum of squares `total`.
    pub fn kept(&self, rank: usize, total: f64) -> f64 {
        let kept: f64 = self.values.iter().take(rank).map(|it| it * it).sum();
        // All of a matrix of zeros is kept.
        if total > 0.0 { (kept / total).min(1.0) } else { 1.0 }
    }

    /// Two factors whose product is the best approximation of the given rank, or of as many values as there
    /// are: `[rows, rank]` and `[rank, columns]`. Both have the square roots of the values.
    pub fn factors<B: Backend>(&self, rank: usize, device: &B::Device) -> [Tensor<B, 2>; 2] {
        let rank = rank.min(self.values.len());
        let mut left = self.left.columns(0, rank).into_owned();
        let mut right = self.right.rows(0, rank).into_owned();
        for (index, value) in self.values.iter().take(rank).enumerate() {
            left.column_mut(index).scale_mut(value.sqrt());
            right.row_mut(index).scale_mut(value.sqrt());
        }
        [tensor(&left, device), tensor(&right, device)]
    }
}

/// The first `rank` columns of Q and rows of R in the QR decomposition of the matrix: `[rows, rank]` and
/// `[rank, columns]`.
pub(crate) fn leading_qr<B: Backend>(matrix: Tensor<B, 2>, rank: usize) -> [Tensor<B, 2>; 2] {
    let ([rows, columns], device) = (matrix.dims(), matrix.device());
    let rank = rank.min(rows).min(columns);
    // Q's first columns are those of the matrix made orthonormal, whatever comes after them.
    let q = self::matrix(matrix.clone().narrow(1, 0, rank)).qr().q();
    let r = q.transpose() * self::matrix(matrix);
    [tensor(&q, &device), tensor(&r, &device)]
}

/// The rows of a random orthogonal matrix `[size, size]`.
pub(crate) fn random_orthogonal(size: usize, rng: &mut StdRng) -> Vec<Vec<f64>> {
    let q = DMatrix::from_fn(size, size, |_, _| rng.sample(StandardNormal)).qr().q();
    q.row_iter().map(|row| row.iter().copied().collect()).collect()
}

/// The sum of the squares of all elements.
pub(crate) fn sum_of_squares<B: Backend>(tensor: Tensor<B, 2>) -> f64 {
    values(tensor).iter().map(|it| it * it).sum()
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
