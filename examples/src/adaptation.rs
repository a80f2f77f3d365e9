//! The experiment of several examples: adapts one base to a new task with different methods.

use std::{path::Path, time::Duration};

use burn::{module::Module, tensor::Tensor};
use burn_lora::{
    Lora, LoraAdapters,
    peft::Renaming,
    report::{ParameterReport, grouped, table},
};
use burn_lora_llm::{
    Context, Result,
    cli::{
        file_name,
        live::during,
        plot::{Panel, SeriesLabelPosition, draw},
        size_of_files,
    },
};

use super::{
    backend::{Plain, Train},
    classifier::{Classifier, Learns, Recipe, Sample, Start, Trained, accuracy, fit, logits},
    progress::History,
};
use serde::Serialize;

/// The results of one method.
#[derive(Serialize)]
pub struct Method {
    pub name: &'static str,
    pub trainable: usize,
    pub total: usize,
    pub epoch_seconds: f64,
    pub accuracy_new: f64,
    /// The accuracy on the old task, where there is one.
    pub accuracy_old: Option<f64>,
    /// The accuracy on the old task without the adapters, where there are any.
    pub accuracy_old_switched_off: Option<f64>,
    /// What has to be stored in addition to the base: the adapters' files, or the trained parameters in
    /// `f32`.
    pub bytes: u64,
    #[serde(skip)]
    pub history: History,
}

/// What becomes of the outputs when the adapters are merged, and when they are taken off.
#[derive(Serialize)]
pub struct Ending {
    pub max_abs_logit_diff_merged: f64,
    pub base_restored_exactly: bool,
}

/// The settings that all trainings of an example share.
pub struct Job<'a, S> {
    /// The directory for logs and adapters.
    pub out: &'a Path,
    pub epochs: usize,
    pub seed: u64,
    /// The learning rate of B as a multiple of A's (LoRA+).
    pub lora_plus: f64,
    /// The number of threads that share a step.
    pub workers: usize,
    /// Where to start. `None` means from the model, without checkpoints.
    pub start: Option<Start>,
    /// The names of the model's modules in Python.
    pub names: Renaming,
    /// Test samples of the task that the base was trained on. Empty if it is another kind of task.
    pub old_test: &'a [S],
}

impl<S: Sample> Job<'_, S> {
    pub fn fit<M: Learns + Classifier<Train, Sample = S>>(
        &self,
        name: &str,
        model: Lora<Train, M>,
        learning_rate: f64,
        train: &[S],
        test: &[S],
    ) -> Result<(Trained<M>, History)> {
        let logs = &self.out.join("logs");
        let &Self { epochs, seed, lora_plus, workers, start, .. } = self;
        let recipe = Recipe { name, learning_rate, epochs, seed, lora_plus, workers, start, logs };
        fit(&recipe, model, train, test)
    }

    /// Trains on the new task. Evaluates on `watched` after each epoch, and on both tasks at the end.
    pub fn adapt<M: Learns + Classifier<Train, Sample = S>>(
        &self,
        name: &'static str,
        model: Lora<Train, M>,
        learning_rate: f64,
        train: &[S],
        watched: &[S],
        test: &[S],
    ) -> Result<(Method, Trained<M>)> {
        let ParameterReport { trainable, total, layers, .. } = model.parameters();
        let adapted = layers.iter().any(|layer| layer.adapter.is_some());
        let old_accuracy = |model: &M::InnerModule| {
            let old = (!self.old_test.is_empty()).then_some(self.old_test);
            old.map(|test| accuracy(logits(model, test), test))
        };
        let (model, history) = self.fit(name, model, learning_rate, train, watched)?;
        let seconds = history.durations.iter().sum::<Duration>().as_secs_f64();
        let (accuracy_new, accuracy_old, accuracy_old_switched_off) =
            during(&format!("testing {name}"), || {
                let new = accuracy(logits(&*model, test), test);
                let detached = adapted.then(|| old_accuracy(&model.detach())).flatten();
                (new, old_accuracy(&model), detached)
            });
        let method = Method {
            name,
            trainable,
            total,
            epoch_seconds: seconds / history.durations.len() as f64,
            accuracy_new,
            accuracy_old,
            accuracy_old_switched_off,
            bytes: match adapted {
                true => self.save(name, model.adapters())?,
                false => (trainable * size_of::<f32>()) as u64,
            },
            history,
        };
        Ok((method, model))
    }

    /// Merges the adapters, and takes them off, and says what this changes: next to nothing on the new task, and
    /// nothing at all of what the base computed of the old one.
    pub fn end<M: Module<Plain> + Classifier<Plain, Sample = S>>(
        &self,
        adapted: Lora<Plain, M>,
        new_test: &[S],
        base_logits: Tensor<Plain, 2>,
    ) -> Result<Ending> {
        let merged = adapted.merge().context("merging")?;
        let max_abs_logit_diff_merged =
            largest_difference(logits(&merged, new_test), logits(&*adapted, new_test));
        let restored = logits(&adapted.detach(), self.old_test);
        let base_restored_exactly = bits(restored) == bits(base_logits.clone());
        let exactly = if base_restored_exactly { "exactly" } else { "NOT exactly" };
        let base_accuracy = accuracy(base_logits, self.old_test);
        println!(
            "\nMerging the adapters changes the logits by at most {max_abs_logit_diff_merged:.1e}."
        );
        println!(
            "Without them, the model computes {exactly} what the base does: {base_accuracy:.2} %.\n"
        );
        Ok(Ending { max_abs_logit_diff_merged, base_restored_exactly })
    }

    /// Saves the adapters under their names in Python, and returns the size of the files.
    fn save(&self, name: &str, adapters: LoraAdapters<Plain>) -> Result<u64> {
        let dir = self.out.join("adapters").join(file_name(name));
        let adapters = adapters.renamed(&self.names).context("renaming the adapters")?;
        adapters.save(&dir).context("saving the adapters")?;
        size_of_files(&dir)
    }
}

/// The bits of every element.
pub fn bits(tensor: Tensor<Plain, 2>) -> Vec<u32> {
    let data = tensor.into_data();
    data.iter::<f32>().map(f32::to_bits).collect()
}

/// The largest difference of two elements.
pub fn largest_difference(a: Tensor<Plain, 2>, b: Tensor<Plain, 2>) -> f64 {
    (a - b).abs().max().into_data().iter::<f64>().fold(0.0, f64::max)
}

/// The table of the results. It has columns for the old task, where there is one.
pub fn results(methods: &[Method]) -> String {
    let full = methods[0].epoch_seconds;
    let percent = |value: f64| format!("{value:.2} %");
    let with_old = methods.iter().any(|method| method.accuracy_old.is_some());
    let row = |method: &Method| {
        let mut row = vec![
            method.name.to_owned(),
            grouped(method.trainable),
            percent(100.0 * method.trainable as f64 / method.total as f64),
            format!("{:.2}", method.epoch_seconds / full),
            grouped(method.bytes as usize),
            percent(method.accuracy_new),
        ];
        if with_old {
            let old = [method.accuracy_old, method.accuracy_old_switched_off];
            row.extend(old.map(|it| it.map_or("-".to_owned(), percent)));
        }
        row
    };
    let mut headers =
        vec!["method", "trainable", "share", "time/epoch", "bytes to store", "new task"];
    if with_old {
        headers.extend(["old task", "switched off"]);
    }
    let table = table(&headers, &methods.iter().map(row).collect::<Vec<_>>());
    format!("{table}\ntime/epoch is relative to {}.", methods[0].name)
}

/// Draws the losses and the accuracies on the new task.
pub fn draw_curves(path: &Path, methods: &[Method], base_accuracy: f64) -> Result<()> {
    let losses = methods.iter().map(|method| (method.name, smoothed(&method.history)));
    let accuracies = methods.iter().map(|method| {
        let after = method.history.accuracies.iter().enumerate();
        let after = after.map(|(epoch, &accuracy)| (epoch as f64 + 1.0, accuracy));
        (method.name, std::iter::once((0.0, base_accuracy)).chain(after).collect())
    });
    use SeriesLabelPosition::{LowerRight, UpperRight};
    let panel = |title, y, curves, marks, legend| Panel {
        title,
        x: "epoch",
        y,
        curves,
        marks,
        from_zero: false,
        legend,
    };
    draw(
        path,
        &[
            panel("Training loss on the new task", "loss", losses.collect(), false, UpperRight),
            panel("Accuracy on the new task", "%", accuracies.collect(), true, LowerRight),
        ],
    )
}

/// The training loss by epoch, as 50 points. Each is the mean over the steps since the point before.
fn smoothed(history: &History) -> Vec<(f64, f64)> {
    let epochs = history.durations.len() as f64;
    let steps = history.losses.len();
    let points = history.losses.chunks(steps.div_ceil(50).max(1));
    let mut step = 0;
    points
        .map(|losses| {
            let middle = step as f64 + losses.len() as f64 / 2.0;
            step += losses.len();
            (epochs * middle / steps as f64, losses.iter().sum::<f64>() / losses.len() as f64)
        })
        .collect()
}
