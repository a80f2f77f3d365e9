//! What a backward pass gives.

use burn::{
    module::AutodiffModule,
    optim::{GradientsAccumulator, GradientsParams},
    tensor::{Tensor, backend::AutodiffBackend},
};

/// A loss, and the gradients of what trains.
pub struct Backward {
    /// The value of the loss.
    pub loss: f64,
    /// The gradients, for an optimizer's `step`.
    pub gradients: GradientsParams,
}

impl Backward {
    /// Computes the gradients of a loss of shape `[1]` with respect to the parameters of `model` that
    /// train.
    pub fn new<B: AutodiffBackend, M: AutodiffModule<B>>(model: &M, loss: Tensor<B, 1>) -> Self {
        let value = loss.clone().into_data().iter::<f64>().sum();
        let gradients = GradientsParams::from_grads(loss.backward(), model);
        Self { loss: value, gradients }
    }

    /// The sum of several losses of `model`, added in their order. Without any it is zero. Each is added
    /// before the next is asked for, so that an iterator that computes them holds the gradients of one.
    pub fn sum<B: AutodiffBackend, M: AutodiffModule<B>>(
        model: &M,
        parts: impl IntoIterator<Item = Self>,
    ) -> Self {
        let mut sum = GradientsAccumulator::new();
        let mut loss = 0.0;
        for part in parts {
            loss += part.loss;
            sum.accumulate(model, part.gradients);
        }
        Self { loss, gradients: sum.grads() }
    }
}
