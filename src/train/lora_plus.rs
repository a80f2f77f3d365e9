//! Two learning rates: LoRA+.

use std::collections::BTreeSet;

use burn::{
    module::{AutodiffModule, Param},
    optim::{GradientsParams, LearningRate, MultiGradientsParams, Optimizer},
    tensor::{Tensor, backend::AutodiffBackend},
};

use crate::{
    burn_faults::unshared_record,
    traverse::{Place, Visit, visit},
};

/// An optimizer with a higher learning rate for B than for A: LoRA+
/// ([Hayou et al. 2024](https://arxiv.org/abs/2402.12354)).
///
/// In each step, A trains with the learning rate `lr` of the step, and B with `ratio · lr`.
///
/// ```
/// use burn::{backend::{Autodiff, Flex}, optim::AdamWConfig};
/// use burn_lora::{LoraLinear, train::LoraPlus};
///
/// type B = Autodiff<Flex>;
/// let adamw = AdamWConfig::new().init::<B, LoraLinear<B>>();
/// let optimizer = LoraPlus::new(adamw, 16.0);
/// ```
///
/// It wraps any Burn optimizer, and is itself one, for training loops and for burn-train's `Learner`. An
/// adapter's bias trains with the learning rate of B. All other parameters train with `lr`. So do both
/// factors of an embedding's adapter, because there A starts at zero instead of B.
///
/// Its checkpoints are safe on GPUs, also with a ratio of 1: `docs/training.md` has the reason.
///
/// The authors find that training is then faster. They use a ratio of 16, and a learning rate for A that
/// is about half of that for LoRA.
#[derive(Clone, Debug)]
pub struct LoraPlus<O> {
    /// The optimizer for B.
    fast: O,
    /// The optimizer for all other parameters.
    slow: O,
    ratio: f64,
}

impl<O: Clone> LoraPlus<O> {
    /// An optimizer that trains like `optimizer`, but B with `ratio` times the learning rate.
    ///
    /// # Panics
    ///
    /// If `ratio` is not a finite number above 0.
    pub fn new(optimizer: O, ratio: f64) -> Self {
        assert!(
            ratio.is_finite() && ratio > 0.0,
            "the ratio of the learning rates must be a finite number above 0, got {ratio}"
        );
        Self { fast: optimizer.clone(), slow: optimizer, ratio }
    }
}

impl<B, M, O> Optimizer<M, B> for LoraPlus<O>
where
    B: AutodiffBackend,
    M: AutodiffModule<B>,
    O: Optimizer<M, B>,
{
    /// The state for B, and the state for all other parameters.
    type Record = (O::Record, O::Record);

    fn step(&mut self, lr: LearningRate, module: M, mut grads: GradientsParams) -> M {
        let of_b = take_b(&module, &mut grads);
        let module = self.slow.step(lr, module, grads);
        self.fast.step(self.ratio * lr, module, of_b)
    }

    fn step_multi(&mut self, lr: LearningRate, module: M, mut grads: MultiGradientsParams) -> M {
        let of_b = grads.grads.iter_mut();
        let of_b = of_b.map(|(grads, device)| (take_b(&module, grads), *device));
        let of_b = MultiGradientsParams { grads: of_b.collect() };
        let module = self.slow.step_multi(lr, module, grads);
        self.fast.step_multi(self.ratio * lr, module, of_b)
    }

    /// The states in memory of their own. burn-train reads a checkpoint on another thread, while the
    /// training goes on. Steps move the state to the device of the parameters.
    fn to_record(&self) -> Self::Record {
        let (fast, slow) = (self.fast.to_record(), self.slow.to_record());
        (unshared_record::<B, _>(fast), unshared_record::<B, _>(slow))
    }

    fn load_record(self, (fast, slow): Self::Record) -> Self {
        let (fast, slow) = (self.fast.load_record(fast), self.slow.load_record(slow));
        Self { fast, slow, ratio: self.ratio }
    }
}

/// Takes the gradients of B out of `grads`.
fn take_b<B: AutodiffBackend, M: AutodiffModule<B>>(
    module: &M,
    grads: &mut GradientsParams,
) -> GradientsParams {
    let mut taker = Taker { embeddings: BTreeSet::new(), grads, of_b: GradientsParams::new() };
    visit::<B, M>(module, &mut taker);
    taker.of_b
}

struct Taker<'a> {
    /// The paths of embeddings. A walk visits the table before the adapter.
    embeddings: BTreeSet<String>,
    grads: &'a mut GradientsParams,
    of_b: GradientsParams,
}

impl<B: AutodiffBackend> Visit<B> for Taker<'_> {
    fn param<const D: usize>(&mut self, place: &Place, param: &Param<Tensor<B, D>>) {
        if place.container() == "Struct:Embedding" {
            self.embeddings.insert(place.module().to_owned());
        }
        let Some(layer) = place.adapted_layer() else { return };
        if place.name() == "a" || self.embeddings.contains(layer) {
            return;
        }
        if let Some(grad) = self.grads.remove::<B::InnerBackend, D>(param.id) {
            self.of_b.register(param.id, grad);
        }
    }
}
