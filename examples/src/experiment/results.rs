//! The results of an experiment: numbers, a table and a figure.

use std::path::Path;

use burn_lora::report::{grouped, table};
use burn_lora_llm::{
    Result,
    cli::plot::{Panel, SeriesLabelPosition, draw},
};
use serde::Serialize;

use super::Options;
use crate::progress::History;

/// The results of one method.
#[derive(Serialize)]
pub struct Method {
    pub name: String,
    pub trainable: usize,
    pub total: usize,
    pub epoch_seconds: f64,
    pub accuracy_new: f64,
    /// The accuracy on the old task, if it has test samples.
    pub accuracy_old: Option<f64>,
    /// The same without the adapters, if the method has any.
    pub accuracy_old_switched_off: Option<f64>,
    /// The size of what is stored in addition to the base: the adapters' files, or the trained parameters in
    /// `f32`.
    pub bytes: u64,
    #[serde(skip)]
    pub history: History,
}

/// How the outputs change when the adapters are merged and when they are detached.
#[derive(Serialize)]
pub struct Ending {
    pub max_abs_logit_diff_merged: f64,
    pub base_restored_exactly: bool,
}

impl Ending {
    /// How the restored base compares with the base, in words.
    pub fn exactly(&self) -> &'static str {
        if self.base_restored_exactly { "exactly" } else { "NOT exactly" }
    }
}

/// The results of an experiment.
#[derive(Serialize)]
pub struct Results {
    /// The accuracy of the base on its own task, in percent, if that was measured.
    pub base_accuracy_old: Option<f64>,
    /// The accuracy of the base on the new task, in percent.
    pub base_accuracy_new: f64,
    pub methods: Vec<Method>,
    #[serde(flatten)]
    pub ending: Ending,
}

impl Results {
    /// Prints the table and writes `summary.json`, to which the example adds `own`. The figure and the
    /// adapters are there already.
    pub fn report(&self, options: &Options, own: &impl Serialize) -> Result<()> {
        #[derive(Serialize)]
        struct Summary<'a, T> {
            #[serde(flatten)]
            own: &'a T,
            #[serde(flatten)]
            results: &'a Results,
        }
        println!("{}\n", results(&self.methods));
        let summary = options.write_summary(&Summary { own, results: self })?;
        let [curves, adapters] = [options.curves(), options.adapters()];
        println!("Wrote {}, {} and {}", curves.display(), summary.display(), adapters.display());
        Ok(())
    }
}

/// The table of the results. It has columns for the old task, if that was measured.
fn results(methods: &[Method]) -> String {
    let full = methods[0].epoch_seconds;
    let percent = |value: f64| format!("{value:.2} %");
    let with_old = methods.iter().any(|method| method.accuracy_old.is_some());
    let row = |method: &Method| {
        let mut row = vec![
            method.name.clone(),
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
    let losses = methods.iter().map(|method| (&*method.name, smoothed(&method.history)));
    let accuracies = methods.iter().map(|method| {
        let after = method.history.accuracies.iter().enumerate();
        let after = after.map(|(epoch, &accuracy)| (epoch as f64 + 1.0, accuracy));
        (&*method.name, std::iter::once((0.0, base_accuracy)).chain(after).collect())
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
