//! Adapts a model of handwritten digits to a task it fails at, three ways side by side: full
//! fine-tuning, LoRA, and training the last layer only.
//!
//! ```text
//! cargo run --release --example mnist
//! cargo run --release --example mnist -- --generated --rank 4
//! cargo run --release --example mnist --no-default-features --features wgpu
//! ```

#[path = "../common/mod.rs"]
mod common;

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use burn::{
    module::Module,
    tensor::{Tensor, backend::Backend},
};
use burn_lora::{LoraConfig, LoraModule, ParameterReport, Scaling};
use clap::Parser;
use serde::Serialize;

use common::{
    Context, Result,
    backend::{self, Plain, Train},
    classifier::{Recipe, accuracy, fit, logits},
    digits::{Digits, mirror, rotate},
    mlp::Mlp,
    plot::{Panel, SeriesLabelPosition, draw},
    progress::History,
    table::{grouped, table},
};

/// Adapt a model of handwritten digits to a changed task: full fine-tuning, LoRA and the last layer
/// side by side.
#[derive(Parser, Debug)]
struct Args {
    /// Directory with MNIST's four IDX files, raw or .gz; otherwise the cache, or a download
    #[arg(long, value_name = "DIR", conflicts_with = "generated")]
    data: Option<PathBuf>,
    /// Use drawn digits, which need no files and no network
    #[arg(long)]
    generated: bool,
    /// Rank of the adapters
    #[arg(long, default_value = "8", value_parser = common::positive)]
    rank: usize,
    /// Strength of the adapters: the update counts alpha/rank
    #[arg(long, default_value = "16", value_parser = common::nonzero)]
    alpha: f64,
    /// Passes over the training images, for each training
    #[arg(long, default_value = "4", value_parser = common::positive)]
    epochs: usize,
    /// Number of training images; all by default
    #[arg(long, value_name = "N", value_parser = common::positive)]
    train_size: Option<usize>,
    /// Seed of weights, adapters, shuffling and generated digits
    #[arg(long, default_value = "42")]
    seed: u64,
    /// Directory for curves.svg, summary.json, the adapters and burn-train's logs
    #[arg(long, value_name = "DIR", default_value = "out/mnist")]
    out: PathBuf,
}

/// The new task: the same digits, turned by this much.
const DEGREES: f64 = 60.0;

/// LoRA wants about ten times the learning rate of full fine-tuning; here five times does best, and
/// the last layer alone wants the same.
const LEARNING_RATE: f64 = 1e-3;
const LORA_LEARNING_RATE: f64 = 5e-3;

#[derive(Serialize)]
struct Summary {
    dataset: &'static str,
    backend: &'static str,
    rank: usize,
    alpha: f64,
    seed: u64,
    train_size: usize,
    epochs: usize,
    base_accuracy_old: f64,
    base_accuracy_new: f64,
    methods: Vec<Method>,
    max_abs_logit_diff_merged: f64,
    base_restored_exactly: bool,
}

#[derive(Serialize)]
struct Method {
    name: &'static str,
    trainable: usize,
    total: usize,
    epoch_seconds: f64,
    accuracy_new: f64,
    accuracy_old: f64,
    /// The accuracy on the old task once the adapters are switched off, where there are any.
    accuracy_old_switched_off: Option<f64>,
    /// What has to be kept of the result, next to the base: the size of the adapters' files, or of
    /// the trained parameters in `f32`.
    bytes: u64,
    #[serde(skip)]
    history: History,
}

fn main() -> ExitCode {
    common::main(run)
}

fn run(args: Args) -> Result<()> {
    fs::create_dir_all(&args.out).context(args.out.display())?;
    let mut digits = Digits::load(args.data.as_deref(), args.generated, args.seed)?;
    digits.train.truncate(args.train_size.unwrap_or(usize::MAX));
    let rotated = digits.map(|image| rotate(image, DEGREES));
    println!(
        "Training on {} images ({}), testing on {}, with the {} backend\n",
        grouped(digits.train.len()),
        digits.name,
        grouped(digits.test.len()),
        backend::NAME,
    );
    let config = LoraConfig::new(args.rank, args.alpha)
        .with_scaling(Scaling::AlphaOverRank)
        .with_seed(args.seed);
    let job = Job { args: &args, config: &config, old: &digits };

    // 1. A base that reads upright digits, and fails at turned ones.
    Plain::seed(&Default::default(), args.seed);
    let base = Mlp::<Train>::new(&Default::default());
    let (base, _) = job.fit("base: upright digits", base, LEARNING_RATE, &digits);
    let base_logits = logits(&base, &digits.test);
    let base_accuracy_old = accuracy(base_logits.clone(), &digits.test);
    let base_accuracy_new = accuracy(logits(&base, &rotated.test), &rotated.test);
    println!(
        "\nThe base reads {base_accuracy_old:.2} % of upright digits, and {base_accuracy_new:.2} % \
         of those turned by {DEGREES} degrees.\n"
    );

    // 2. The same base, adapted to turned digits in three ways.
    let train = || base.clone().train::<Train>();
    let full = train().unfreeze();
    let lora = train().attach(&config).context("attaching adapters")?;
    let last = train().freeze(&["head"]).context("freezing")?;
    println!("{}\n", lora.parameters());

    let (full, _) = job.adapt("full fine-tuning", full, LEARNING_RATE, &rotated)?;
    let (lora, adapted) = job.adapt("LoRA", lora, LORA_LEARNING_RATE, &rotated)?;
    let (last, _) = job.adapt("last layer", last, LORA_LEARNING_RATE, &rotated)?;

    // 3. Merged into the base, the adapters cost nothing and compute the same.
    let merged = adapted.merge().context("merging")?;
    let unmerged = logits(&adapted, &rotated.test);
    let max_abs_logit_diff_merged =
        largest_difference(logits(&*merged, &rotated.test), unmerged.clone());

    // 4. Switched off, they leave the base as it was, to the bit.
    let restored = logits(&adapted.detach(), &digits.test);
    let base_restored_exactly = bits(restored) == bits(base_logits);

    // 5. A second set of adapters for another task, on the same base.
    let mirrored = digits.map(mirror);
    let second = train().attach(&config).context("attaching adapters")?;
    let (second, _) = job.adapt("LoRA, mirrored digits", second, LORA_LEARNING_RATE, &mirrored)?;

    println!();
    let largest = largest_difference(unmerged.clone(), unmerged.zeros_like());
    println!(
        "Merged into the base, the adapters give logits within {max_abs_logit_diff_merged:.1e} \
         (of up to {largest:.0})."
    );
    let exactly = if base_restored_exactly { "exactly" } else { "NOT exactly" };
    println!("Switched off, they give back the base {exactly}: {base_accuracy_old:.2} %.\n");

    let methods = vec![full, lora, last, second];
    println!("{}\n", results(&methods));
    let curves = args.out.join("curves.svg");
    draw_curves(&curves, &methods[..3], base_accuracy_new)?;
    let summary = Summary {
        dataset: digits.name,
        backend: backend::NAME,
        rank: args.rank,
        alpha: args.alpha,
        seed: args.seed,
        train_size: digits.train.len(),
        epochs: args.epochs,
        base_accuracy_old,
        base_accuracy_new,
        methods,
        max_abs_logit_diff_merged,
        base_restored_exactly,
    };
    let path = args.out.join("summary.json");
    let json = serde_json::to_string_pretty(&summary).context(path.display())?;
    fs::write(&path, json + "\n").context(path.display())?;
    let adapters = args.out.join("adapters");
    println!("Wrote {}, {} and {}", curves.display(), path.display(), adapters.display());
    Ok(())
}

struct Job<'a> {
    args: &'a Args,
    config: &'a LoraConfig,
    /// The digits that the base was trained on.
    old: &'a Digits,
}

impl Job<'_> {
    fn fit(
        &self,
        name: &str,
        model: Mlp<Train>,
        learning_rate: f64,
        digits: &Digits,
    ) -> (Mlp<Plain>, History) {
        let logs = self.args.out.join("logs");
        let (epochs, seed) = (self.args.epochs, self.args.seed);
        let recipe = Recipe { name, learning_rate, epochs, seed, logs: &logs };
        fit(&recipe, model, &digits.train, &digits.test)
    }

    /// Trains on the new task, and judges on both.
    fn adapt(
        &self,
        name: &'static str,
        model: Mlp<Train>,
        learning_rate: f64,
        new: &Digits,
    ) -> Result<(Method, Mlp<Plain>)> {
        let ParameterReport { trainable, total, layers, .. } = model.parameters();
        let adapted = layers.iter().any(|layer| layer.adapter.is_some());
        let old_accuracy =
            |model: &Mlp<Plain>| accuracy(logits(model, &self.old.test), &self.old.test);
        let (model, history) = self.fit(name, model, learning_rate, new);
        let seconds = history.durations.iter().sum::<Duration>().as_secs_f64();
        let method = Method {
            name,
            trainable,
            total,
            epoch_seconds: seconds / history.durations.len() as f64,
            accuracy_new: accuracy(logits(&model, &new.test), &new.test),
            accuracy_old: old_accuracy(&model),
            accuracy_old_switched_off: adapted.then(|| old_accuracy(&model.detach())),
            bytes: match adapted {
                true => self.save_adapters(name, &model)?,
                false => (trainable * size_of::<f32>()) as u64,
            },
            history,
        };
        Ok((method, model))
    }

    /// Saves the model's adapters, and returns the size of the files.
    fn save_adapters(&self, name: &str, model: &Mlp<Plain>) -> Result<u64> {
        let dir = self.args.out.join("adapters").join(common::file_name(name));
        let adapters = model.adapters(self.config).context("taking the adapters")?;
        adapters.save(&dir).context("saving the adapters")?;
        common::size_of_files(&dir)
    }
}

fn bits(tensor: Tensor<Plain, 2>) -> Vec<u32> {
    let data = tensor.into_data();
    data.iter::<f32>().map(f32::to_bits).collect()
}

fn largest_difference(a: Tensor<Plain, 2>, b: Tensor<Plain, 2>) -> f64 {
    (a - b).abs().max().into_data().iter::<f64>().fold(0.0, f64::max)
}

fn results(methods: &[Method]) -> String {
    let full = methods[0].epoch_seconds;
    let rows: Vec<_> = methods
        .iter()
        .map(|method| {
            [
                method.name.to_owned(),
                grouped(method.trainable),
                format!("{:.2} %", 100.0 * method.trainable as f64 / method.total as f64),
                format!("{:.2}", method.epoch_seconds / full),
                format!("{:.2} %", method.accuracy_new),
                format!("{:.2} %", method.accuracy_old),
                method.accuracy_old_switched_off.map_or("-".to_owned(), |it| format!("{it:.2} %")),
                grouped(method.bytes as usize),
            ]
        })
        .collect();
    let headers = [
        "method",
        "trainable",
        "share",
        "time/epoch",
        "new task",
        "old task",
        "switched off",
        "bytes to store",
    ];
    table(headers, &rows)
}

fn draw_curves(path: &Path, methods: &[Method], base_accuracy: f64) -> Result<()> {
    let losses = methods.iter().map(|method| (method.name, smoothed(&method.history)));
    let accuracies = methods.iter().map(|method| {
        let after = method.history.accuracies.iter().enumerate();
        let after = after.map(|(epoch, &accuracy)| (epoch as f64 + 1.0, accuracy));
        (method.name, std::iter::once((0.0, base_accuracy)).chain(after).collect())
    });
    use SeriesLabelPosition::{LowerRight, UpperRight};
    let panel =
        |title, y, curves, marks, legend| Panel { title, x: "epoch", y, curves, marks, legend };
    draw(
        path,
        &[
            panel("Training loss on the new task", "loss", losses.collect(), false, UpperRight),
            panel("Accuracy on the new task", "%", accuracies.collect(), true, LowerRight),
        ],
    )
}

/// The training loss against the epoch: 50 points, each the mean of the steps since the last.
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
