//! Data-parallel training: every replica has the whole model, and a part of each batch.

use std::time::Instant;

use burn::optim::{AdamConfig, Optimizer};
use burn_lora::{
    Lora,
    train::{Backward, Replicas, fingerprint},
};
use common::{
    Context, Result,
    backend::Train,
    classifier::Classifier,
    cli::{
        live::{Live, Position},
        replicas::{Counted, Sent},
    },
    digits::Digit,
    mlp::Mlp,
};
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};

/// A model of which something trains: all of it, or adapters.
pub type Model = Lora<Train, Mlp<Train>>;

/// How to train.
#[derive(Debug)]
pub struct Recipe {
    pub name: &'static str,
    pub learning_rate: f64,
    pub steps: usize,
    /// The number of images of a batch, which the replicas share.
    pub batch: usize,
    pub seed: u64,
}

/// What a training cost.
pub struct Cost {
    pub steps: usize,
    pub seconds: f64,
    pub sent: Sent,
}

/// Trains for some steps.
///
/// # Errors
///
/// If the replicas differ, or the loss is not a number.
pub fn train(
    mut model: Model,
    digits: &[Digit],
    recipe: &Recipe,
    replicas: &Counted,
) -> Result<(Model, Cost)> {
    // Replicas that differ would train to a wrong result without an error.
    replicas
        .agree(&format!("{recipe:#?}\n{} images\n{}", digits.len(), fingerprint(&model)))
        .context("the replicas differ")?;
    let mut optimizer = AdamConfig::new().init();
    let mut order = Order::new(digits, recipe.seed);
    let mut live = replicas.is_first().then(|| Live::new(recipe.name, "starting"));
    let (start, before) = (Instant::now(), replicas.sent());
    for step in 0..recipe.steps {
        // All know the whole batch, and compute their part of it.
        let batch = order.next(recipe.batch);
        let place = |index: usize| index * batch.len() / replicas.count();
        let part = &batch[place(replicas.index())..place(replicas.index() + 1)];
        let pass = (!part.is_empty()).then(|| {
            // Its share of the loss of the batch, so that the sum is the mean over the batch.
            let share = part.len() as f64 / batch.len() as f64;
            Backward::new(&model, model.classify(part).loss * share)
        });
        let sum = Backward::sum(&model, pass).all_reduce(&model, replicas);
        if !sum.loss.is_finite() {
            return Err(format!("the loss is {} in step {}", sum.loss, step + 1));
        }
        // All have the same gradients, and the same optimizer. So they stay the same.
        model = optimizer.step(recipe.learning_rate, model, sum.gradients);
        if let Some(live) = &mut live {
            let done = (step + 1) as f64 / recipe.steps as f64;
            let part = format!("step {}/{}", step + 1, recipe.steps);
            live.update(&Position { part, of_part: done, of_all: done }, sum.loss);
        }
    }
    let Sent { bytes, seconds } = replicas.sent();
    let sent = Sent { bytes: bytes - before.bytes, seconds: seconds - before.seconds };
    let cost = Cost { steps: recipe.steps, seconds: start.elapsed().as_secs_f64(), sent };
    Ok((model, cost))
}

/// Goes through the images again and again, each time in another order, the same for all replicas.
struct Order<'a> {
    digits: &'a [Digit],
    left: Vec<usize>,
    rng: StdRng,
}

impl<'a> Order<'a> {
    fn new(digits: &'a [Digit], seed: u64) -> Self {
        Self { digits, left: Vec::new(), rng: StdRng::seed_from_u64(seed) }
    }

    fn next(&mut self, count: usize) -> Vec<Digit> {
        if self.left.len() < count {
            self.left = (0..self.digits.len()).collect();
            self.left.shuffle(&mut self.rng);
        }
        let rest = self.left.len().saturating_sub(count);
        self.left.split_off(rest).into_iter().map(|it| self.digits[it].clone()).collect()
    }
}
