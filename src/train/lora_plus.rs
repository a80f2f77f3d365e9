//! Two learning rates: LoRA+.

use std::collections::BTreeSet;

use burn::{
    module::{AutodiffModule, Param},
    optim::{GradientsParams, LearningRate, MultiGradientsParams, Optimizer},
    tensor::{Tensor, backend::AutodiffBackend},
};

use crate::model::{Place, Visit, visit};

/// An optimizer that trains B faster than A, which LoRA+
/// ([Hayou et al. 2024](https://arxiv.org/abs/2402.12354)) finds to learn faster: with the learning rate
/// `lr` of each step for A, and `ratio · lr` for B.
///
/// ```
/// use burn::{backend::{Autodiff, Flex}, optim::AdamWConfig};
/// use burn_lora::{LoraLinear, LoraPlus};
///
/// type B = Autodiff<Flex>;
/// let adamw = AdamWConfig::new().init::<B, LoraLinear<B>>();
/// let optimizer = LoraPlus::new(adamw, 16.0);
/// ```
///
/// It wraps any Burn optimizer, and is one: for training loops, and for burn-train's `Learner`. An
/// adapter's bias goes with its B. What else trains has the learning rate `lr`, and so have both factors
/// of an embedding's adapter, where not B starts at zero, but A.
///
/// The authors use a ratio of 16, and a learning rate for A that is about half of what LoRA would get.
#[derive(Clone, Debug)]
pub struct LoraPlus<O> {
    /// For B.
    fast: O,
    /// For all others.
    slow: O,
    ratio: f64,
}

impl<O: Clone> LoraPlus<O> {
    /// Trains as `optimizer` does, and B with `ratio` times the learning rate.
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
    /// The state for B, and the state for all others.
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

    fn to_record(&self) -> Self::Record {
        (self.fast.to_record(), self.slow.to_record())
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
    /// The paths of embeddings. A walk meets the table before the adapter.
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
