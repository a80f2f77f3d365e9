//! What of the factors trains, and from where.

use burn::tensor::{
    Tensor,
    backend::{AutodiffBackend, Backend},
};

use super::{LoraAdapter, Observer};
use crate::{
    config::Scaling,
    tensors::{cast, cat, constant, frozen, trainable},
};

/// How the factors of an adapter train.
#[derive(Clone, Debug)]
pub(crate) struct Training<B: Backend> {
    /// Whether only B trains: LoRA-FA.
    pub freezes_a: bool,
    /// A and B as they were at first, if they were taken from the base's weight: PiSSA and OLoRA. The
    /// published methods subtract `s·A₀·B₀` from the weight. Here the weight stays, and the update is
    /// `s·(A·B − A₀·B₀)`, which is the same sum.
    pub start: Option<[Tensor<B, 2>; 2]>,
    /// Who takes note of the layer's inputs.
    pub observer: Option<Observer<B>>,
}

impl<B: Backend> Default for Training<B> {
    fn default() -> Self {
        Self { freezes_a: false, start: None, observer: None }
    }
}

impl<B: Backend> Training<B> {
    pub fn fork(self, device: &B::Device) -> Self {
        Self { start: self.start.map(|it| it.map(|it| constant(it.to_device(device)))), ..self }
    }
}

impl<B: AutodiffBackend> Training<B> {
    pub fn valid(&self) -> Training<B::InnerBackend> {
        let start = self.start.clone().map(|it| it.map(Tensor::inner));
        Training { freezes_a: self.freezes_a, start, observer: None }
    }

    pub fn from_inner(inner: Training<B::InnerBackend>) -> Self {
        let start = inner.start.map(|it| it.map(Tensor::from_inner));
        Self { freezes_a: inner.freezes_a, start, observer: None }
    }
}

impl<B: Backend> LoraAdapter<B> {
    /// The factors of the update as part of the autodiff graph: `[d_input, rank]` and `[rank, d_output]`. If
    /// A and B were taken from the weight, the rank is twice theirs:
    /// `A·B − A₀·B₀` is `[A A₀]` times `[B; −B₀]`.
    pub(crate) fn factors(&self) -> [Tensor<B, 2>; 2] {
        let a = if self.training.freezes_a { frozen(&self.a) } else { self.a.val() };
        let b = self.b.val();
        match &self.training.start {
            None => [a, b],
            Some([a_0, b_0]) => {
                let (a_0, b_0) = (cast(a_0.clone(), a.dtype()), cast(b_0.clone().neg(), b.dtype()));
                [cat(&[a, a_0], 1), cat(&[b, b_0], 0)]
            }
        }
    }

    /// The same factors as constants.
    pub(crate) fn constant_factors(&self) -> [Tensor<B, 2>; 2] {
        self.factors().map(constant)
    }

    /// The same update as one by A and B alone. Taken from the weight, they have twice the rank then, as
    /// in the files that PEFT converts, and both halves train. The scale stays.
    pub(crate) fn standalone(&self) -> Self {
        let mut adapter = self.clone();
        if self.training.start.is_some() {
            let [a, b] = self.constant_factors();
            let growth = a.dims()[1] as f64 / self.rank() as f64;
            adapter.alpha *= match self.scaling {
                Scaling::Alpha => 1.0,
                Scaling::AlphaOverRank => growth,
                Scaling::AlphaOverSqrtRank => growth.sqrt(),
            };
            (adapter.a, adapter.b) = (trainable(a), trainable(b));
        }
        adapter.training = Training::default();
        adapter
    }
}
