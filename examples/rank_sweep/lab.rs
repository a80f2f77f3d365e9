//! Trains the points of the sweeps, and measures them.

use std::time::Instant;

use burn::tensor::Tensor;
use burn_lora::{Lora, LoraConfig, LoraModule, Scaling, train::Workers};
use common::{
    Context, Result,
    backend::{Plain, Train},
    classifier::{Learns, Trained, accuracy, logits},
    cli::live::{Live, Position, during},
};

use crate::{
    spread::Spread,
    sweeps::scaling::alpha_for,
    task::Task,
    train::Training,
    weights::{Matrices, differences, matrices, norm, relative_difference},
};
use serde::Serialize;

/// What all points share: the task, its base, and the settings that do not change.
pub struct Lab<M: Learns> {
    pub task: Task<M>,
    /// The base for inference.
    pub base: M::InnerModule,
    /// The base's matrices that adapters can change.
    pub weights: Matrices<Plain>,
    base_logits: Tensor<Plain, 2>,
    /// One training for each seed, of the adapters' values and of the order of the samples.
    pub seeds: Vec<u64>,
    pub workers: Workers,
    /// The rank and the alpha where they are not what is compared.
    pub rank: usize,
    pub alpha: f64,
    /// Sweeps have points in common.
    known: Vec<(LoraConfig, f64, Measured)>,
}

/// A point of a sweep: adapters, and how to call them in the progress.
pub struct Setting {
    pub label: String,
    pub config: LoraConfig,
    pub learning_rate: f64,
}

/// A setting and what was measured.
#[derive(Clone, Serialize)]
pub struct Point {
    pub rank: usize,
    pub alpha: f64,
    pub scaling: Scaling,
    /// What the update is multiplied by.
    pub scale: f64,
    /// The layers with adapters. Empty for all.
    pub targets: Vec<String>,
    pub learning_rate: f64,
    #[serde(flatten)]
    pub measured: Measured,
}

/// What was measured, over all seeds.
#[derive(Clone, Serialize)]
pub struct Measured {
    pub trainable: usize,
    /// The size of what trains in memory.
    pub bytes: usize,
    /// The percentage of test samples that are recognized.
    pub accuracy: Spread,
    /// The mean of the training loss over the last epoch.
    pub loss: Spread,
    /// The norm of all updates of weights, as a multiple of the norm of these weights.
    pub distance: Spread,
    /// The norm of the change of the logits of all test samples, as a multiple of the norm of the base's.
    pub logit_change: Spread,
    /// The time of one training.
    pub seconds: Spread,
}

/// The figures of one training.
struct Figures {
    accuracy: f64,
    loss: f64,
    distance: f64,
    logit_change: f64,
    seconds: f64,
}

impl<M: Learns> Lab<M> {
    pub fn new(task: Task<M>, seeds: Vec<u64>, workers: usize, rank: usize, alpha: f64) -> Self {
        let base = task.base.valid();
        let weights = matrices(&base, task.modules_to_save);
        let base_logits = during("testing the base", || logits(&base, &task.test));
        let (workers, known) = (Workers::new(workers), Vec::new());
        Self { task, base, weights, base_logits, seeds, workers, rank, alpha, known }
    }

    /// The configuration where neither scaling nor alpha is compared: the scale is `alpha/sqrt(rank)`.
    pub fn config(&self, rank: usize) -> LoraConfig {
        let scaling = Scaling::AlphaOverSqrtRank;
        LoraConfig::new(rank, alpha_for(scaling, self.rank, self.alpha))
            .with_scaling(scaling)
            .with_targets(self.task.targets.iter().copied())
            .with_modules_to_save(self.task.modules_to_save.iter().copied())
    }

    /// A point at the learning rate of all sweeps that do not compare it.
    pub fn setting(&self, label: String, config: LoraConfig) -> Setting {
        Setting { label, config, learning_rate: self.task.lora_learning_rate }
    }

    /// The base with fresh adapters.
    pub fn attach(&self, config: &LoraConfig) -> Result<Lora<Train, M>> {
        self.task.base.clone().attach(config).context("attaching adapters")
    }

    pub fn base_accuracy(&self) -> f64 {
        accuracy(self.base_logits.clone(), &self.task.test)
    }

    pub fn training(&self, learning_rate: f64, epochs: usize, seed: u64) -> Training<'_> {
        Training { learning_rate, epochs, seed, workers: &self.workers }
    }

    /// Trains and measures the settings, each with every seed. Points that are known are not trained again.
    pub fn sweep(&mut self, name: &str, settings: &[Setting]) -> Result<Vec<Point>> {
        let mut points = Vec::new();
        let mut live = Live::new(name, settings.first().map_or("", |it| &it.label));
        for (index, Setting { label, config, learning_rate }) in settings.iter().enumerate() {
            let mut known = self.known.iter();
            let known = known.find(|(it, rate, _)| rate == learning_rate && is_same(it, config));
            let measured = match known {
                Some((.., measured)) => measured.clone(),
                None => {
                    let all = |of_part: f64| (index as f64 + of_part) / settings.len() as f64;
                    let measured = self.measure(config, *learning_rate, |of_part, loss| {
                        let position =
                            Position { part: label.clone(), of_part, of_all: all(of_part) };
                        live.update(&position, loss);
                    })?;
                    self.known.push((config.clone(), *learning_rate, measured.clone()));
                    measured
                }
            };
            live.line(format_args!("{label:<28} {}", summary(&measured)));
            points.push(Point {
                rank: config.rank,
                alpha: config.alpha,
                scaling: config.scaling,
                scale: config.scaling.scale(config.alpha, config.rank),
                targets: config.targets.clone(),
                learning_rate: *learning_rate,
                measured,
            });
        }
        Ok(points)
    }

    /// Full fine-tuning, and the models that it gave.
    pub fn full(&self) -> Result<(Measured, Vec<M::InnerModule>)> {
        let mut live = Live::new("full fine-tuning", "");
        let (mut figures, mut models) = (Vec::new(), Vec::new());
        let fresh = || self.task.base.clone().train_only(&[".*"]).context("full fine-tuning");
        for (index, &seed) in self.seeds.iter().enumerate() {
            let (one, model) = self.train(fresh()?, self.task.learning_rate, seed, |part, loss| {
                let of_all = (index as f64 + part) / self.seeds.len() as f64;
                live.update(
                    &Position { part: format!("seed {seed}"), of_part: part, of_all },
                    loss,
                );
            });
            figures.push(one);
            models.push(model.into_inner());
        }
        let trainable = fresh()?.parameters().trainable;
        let measured = over_seeds(&figures, trainable, trainable * size_of::<f32>());
        live.line(format_args!("{:<28} {}", "", summary(&measured)));
        Ok((measured, models))
    }

    /// `progress` gets the share of the trainings that is done, and the loss.
    fn measure(
        &self,
        config: &LoraConfig,
        learning_rate: f64,
        mut progress: impl FnMut(f64, f64),
    ) -> Result<Measured> {
        let mut figures = Vec::new();
        for (index, &seed) in self.seeds.iter().enumerate() {
            let model = self.attach(&config.clone().with_seed(seed))?;
            let (one, _) = self.train(model, learning_rate, seed, |part, loss| {
                progress((index as f64 + part) / self.seeds.len() as f64, loss);
            });
            figures.push(one);
        }
        let model = self.attach(config)?;
        Ok(over_seeds(&figures, model.parameters().trainable, model.adapters().num_bytes()))
    }

    /// One training.
    fn train(
        &self,
        model: Lora<Train, M>,
        learning_rate: f64,
        seed: u64,
        mut progress: impl FnMut(f64, f64),
    ) -> (Figures, Trained<M>) {
        let training = self.training(learning_rate, self.task.epochs, seed);
        let steps = training.steps(&self.task.train);
        let mut losses = Vec::with_capacity(steps);
        let start = Instant::now();
        let model = training.run(model, &self.task.train, |_, loss| {
            losses.push(loss);
            progress(losses.len() as f64 / steps as f64, loss);
        });
        let seconds = start.elapsed().as_secs_f64();
        let last = &losses[steps - steps / self.task.epochs..];
        let new_logits = logits(&*model, &self.task.test);
        let figures = Figures {
            loss: last.iter().sum::<f64>() / last.len() as f64,
            distance: self.distance(&model),
            logit_change: relative_difference(&new_logits, &self.base_logits),
            accuracy: accuracy(new_logits, &self.task.test),
            seconds,
        };
        (figures, model)
    }

    /// The norm of all updates of weights, as a multiple of the norm of these weights.
    pub fn distance(&self, model: &Trained<M>) -> f64 {
        let adapters = model.adapters();
        let updates = match adapters.is_empty() {
            true => self.changes(model),
            false => adapters.iter().map(|(path, it)| (path.to_owned(), it.delta())).collect(),
        };
        norm(updates.values()) / norm(self.weights.values())
    }

    /// What full fine-tuning added to each matrix.
    pub fn changes(&self, tuned: &M::InnerModule) -> Matrices<Plain> {
        differences(matrices(tuned, self.task.modules_to_save), &self.weights)
    }
}

/// Whether adapters of two configurations of these sweeps compute the same.
fn is_same(a: &LoraConfig, b: &LoraConfig) -> bool {
    let [scale, other] = [a, b].map(|it| it.scaling.scale(it.alpha, it.rank));
    // The rules round differently.
    (a.rank, &a.targets) == (b.rank, &b.targets) && (scale / other - 1.0).abs() < 1e-9
}

fn over_seeds(figures: &[Figures], trainable: usize, bytes: usize) -> Measured {
    let spread = |figure: fn(&Figures) -> f64| Spread::of(figures.iter().map(figure));
    Measured {
        trainable,
        bytes,
        accuracy: spread(|it| it.accuracy),
        loss: spread(|it| it.loss),
        distance: spread(|it| it.distance),
        logit_change: spread(|it| it.logit_change),
        seconds: spread(|it| it.seconds),
    }
}

/// What the progress says of a point.
fn summary(measured: &Measured) -> String {
    let Measured { loss, accuracy, seconds, .. } = measured;
    format!("loss {:.4}  accuracy {:6.2} %  {:6.2} s", loss.mean, accuracy.mean, seconds.mean)
}

#[cfg(test)]
mod tests {
    use burn_lora::{LoraConfig, Scaling};

    use super::is_same;
    use crate::sweeps::scaling::alpha_for;

    #[test]
    fn only_points_that_compute_the_same_are_shared() {
        let peft = LoraConfig::peft(8, 16.0);
        let rule = Scaling::AlphaOverSqrtRank;
        let other = LoraConfig::new(8, alpha_for(rule, 8, 16.0)).with_scaling(rule);
        assert!(is_same(&peft, &other));
        assert!(!is_same(&peft, &LoraConfig { rank: 4, ..other.clone() }));
        assert!(!is_same(&peft, &LoraConfig { alpha: 15.0, ..peft.clone() }));
        assert!(!is_same(&peft, &other.with_targets(["fc1"])));
    }
}
