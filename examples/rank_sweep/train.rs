//! A training without logs, checkpoints and evaluation: a sweep has a hundred of them.

use burn::{
    lr_scheduler::{LrScheduler, cosine::CosineAnnealingLrSchedulerConfig},
    module::AutodiffModule,
    optim::{AdamConfig, Optimizer},
};
use burn_lora::{
    Lora,
    train::{Backward, Workers},
};
use common::{
    backend::Train,
    classifier::{Learns, Sample, SampleOf, Trained},
};

/// How to train.
pub struct Training<'a> {
    /// The learning rate at the start. It falls to zero along a cosine.
    pub learning_rate: f64,
    pub epochs: usize,
    /// The seed of the order of the samples.
    pub seed: u64,
    pub workers: &'a Workers,
}

impl Training<'_> {
    /// The number of steps.
    pub fn steps<S: Sample>(&self, samples: &[S]) -> usize {
        self.epochs * samples.len().div_ceil(S::BATCH)
    }

    /// Trains what is trainable in `model`, with Adam. `after` gets the model and the loss of each step.
    pub fn run<M: Learns>(
        &self,
        mut model: Lora<Train, M>,
        samples: &[SampleOf<M>],
        mut after: impl FnMut(&Lora<Train, M>, f64),
    ) -> Trained<M> {
        let schedule =
            CosineAnnealingLrSchedulerConfig::new(self.learning_rate, self.steps(samples));
        let mut schedule =
            schedule.init().expect("the learning rate and the number of steps are positive");
        let mut adam = AdamConfig::new().init();
        let batches = SampleOf::<M>::batches::<Train>(samples, Some(self.seed));
        for _ in 0..self.epochs {
            for batch in batches.iter() {
                let Backward { loss, gradients } = self.backward(&model, &batch);
                model = adam.step(schedule.step(), model, gradients);
                after(&model, loss);
            }
        }
        model.valid()
    }

    /// The workers share the samples.
    fn backward<M: Learns>(&self, model: &Lora<Train, M>, batch: &[SampleOf<M>]) -> Backward {
        let parts: Vec<_> = batch.chunks(batch.len().div_ceil(self.workers.count())).collect();
        self.workers.backward(model, parts, |model, part| {
            let share = part.len() as f64 / batch.len() as f64;
            Backward::new(model, model.classify(part).loss * share)
        })
    }
}
