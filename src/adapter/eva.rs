//! What linear layers see, for EVA ([Paischer et al. 2024](https://arxiv.org/abs/2410.07170)): the adapters start
//! with the directions in which the layers' inputs vary the most.

use std::{
    fmt,
    sync::{Arc, Mutex},
};

use burn::tensor::{ElementConversion, Tensor, backend::Backend};

use super::LoraAdapter;
use crate::{
    decomposition::Svd,
    tensors::{at_least_f32, cast, constant, trainable},
};

/// Collects the covariance of a layer's inputs. Its memory depends on the layer's width alone.
#[derive(Clone)]
pub(crate) struct Observer<B: Backend>(Arc<Mutex<Option<Sums<B>>>>);

/// Sums over all inputs less `center`, which is the mean of the first ones. With numbers near zero, single
/// precision is enough.
struct Sums<B: Backend> {
    center: Tensor<B, 2>,
    count: usize,
    /// `[1, d_input]`.
    first: Tensor<B, 2>,
    /// `[d_input, d_input]`.
    second: Tensor<B, 2>,
}

impl<B: Backend> Default for Observer<B> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<B: Backend> fmt::Debug for Observer<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Observer")
    }
}

impl<B: Backend> Observer<B> {
    /// Takes note of the inputs `x: [batch, d_input]`.
    pub fn observe(&self, x: &Tensor<B, 2>) {
        let x = at_least_f32(constant(x.clone()));
        let mut kept = self.0.lock().expect("no observer panics");
        // The sums are moved out, so that a backend adds to them in place.
        let Sums { center, count, first, second } = kept.take().unwrap_or_else(|| Sums {
            center: x.clone().mean_dim(0),
            count: 0,
            first: x.clone().narrow(0, 0, 1).zeros_like(),
            second: cast(Tensor::zeros([x.dims()[1]; 2], &x.device()), x.dtype()),
        });
        let count = count + x.dims()[0];
        let x = x - center.clone();
        let first = first + x.clone().sum_dim(0);
        let second = second + x.clone().transpose().matmul(x);
        *kept = Some(Sums { center, count, first, second });
    }

    /// The `count` directions of the largest variance, and the share that each has in the whole; `None` if
    /// nothing was seen, or what was is not finite.
    pub fn principal(&self, count: usize) -> Option<Principal> {
        /// Directions beyond those, and rounds. With these numbers the result is nearly exact.
        const SPARE: usize = 10;
        const ROUNDS: usize = 8;

        let sums = self.0.lock().expect("no observer panics");
        let Sums { count: seen, first, second, .. } = sums.as_ref()?;
        let moved = first.clone().transpose().matmul(first.clone()).div_scalar(*seen as f64);
        let scatter = second.clone() - moved;
        if !scatter.clone().is_finite().all().into_scalar().elem::<bool>() {
            return None;
        }
        let size = scatter.dims()[0];
        let diagonal = cast(Tensor::eye(size, &scatter.device()), scatter.dtype());
        let diagonal = scatter.clone() * diagonal;
        let total: f64 = diagonal.sum().into_scalar().elem();
        let directions = Svd::leading(scatter, count, SPARE, ROUNDS);
        let share = |value: &f64| if total > 0.0 { value / total } else { 0.0 };
        let shares = directions.values().iter().take(count).map(share).collect();
        Some(Principal { directions, shares })
    }
}

/// Directions in the space of a layer's inputs, the most important ones first.
pub(crate) struct Principal {
    directions: Svd,
    /// The share of each direction in the variance of the inputs.
    pub shares: Vec<f64>,
}

impl Principal {
    /// The first `rank` directions as columns: `[d_input, rank]`.
    pub fn columns<B: Backend>(&self, rank: usize, device: &B::Device) -> Tensor<B, 2> {
        self.directions.left(rank, device)
    }
}

impl<B: Backend> LoraAdapter<B> {
    /// The adapter with this A, `[d_input, rank]`, and B at zero. The scale stays, whatever the rank was.
    pub(crate) fn starting_with(self, a: Tensor<B, 2>) -> Self {
        let ([_, rank], [_, d_output], scale) = (a.dims(), self.b.dims(), self.scale());
        let b = Tensor::zeros([rank, d_output], &a.device());
        // The scale is proportional to alpha.
        let alpha = scale / self.scaling.scale(1.0, rank);
        Self { a: trainable(a), b: trainable(b), alpha, ..self }
    }
}
