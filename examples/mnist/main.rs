//! Adapts a classifier of handwritten digits to rotated digits, and compares three methods: full
//! fine-tuning, LoRA, and training only the last layer.
//!
//! ```text
//! cargo run --release --example mnist
//! cargo run --release --example mnist -- --generated --rank 4
//! cargo run --release --example mnist --no-default-features --features wgpu
//! ```

use std::{path::PathBuf, process::ExitCode};

use burn_lora::{LoraModule, report::grouped};
use clap::Parser;
use common::{
    Context, Result, backend, cli,
    digits::{Digits, mirror, rotate},
    experiment::{Experiment, Options, Part, default, help},
    mlp::Mlp,
};
use mimalloc::MiMalloc;
use serde_json::json;

/// Reuses the memory of large tensors: every training step allocates them again.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Adapt a classifier of handwritten digits to rotated digits, and compare full fine-tuning, LoRA and
/// training only the last layer.
#[derive(Parser, Debug)]
#[command(
    mut_arg("lora_learning_rate", help("Learning rate of LoRA, and of the last layer alone")),
    mut_arg("out", default("out/mnist"))
)]
struct Args {
    /// Directory with MNIST's four IDX files, raw or .gz; otherwise the cache, or a download
    #[arg(long, value_name = "DIR", conflicts_with = "generated")]
    data: Option<PathBuf>,
    /// Use drawn digits, which need no files and no network
    #[arg(long)]
    generated: bool,
    /// Number of training images; all by default
    #[arg(long, value_name = "N", value_parser = cli::positive)]
    train_size: Option<usize>,
    /// Layers that get adapters, with commas between them: fc1, fc2 or head; all by default
    #[arg(long, value_name = "LAYERS", value_delimiter = ',')]
    targets: Vec<String>,
    #[command(flatten)]
    options: Options,
}

/// The new task: the same digits, rotated by this angle.
const DEGREES: f64 = 60.0;

fn main() -> ExitCode {
    common::main(run)
}

fn run(args: Args) -> Result<()> {
    let options = &args.options;
    options.create_out()?;
    let mut digits = Digits::load(args.data.as_deref(), args.generated, options.seed)?;
    digits.train.truncate(args.train_size.unwrap_or(usize::MAX));
    let rotated = digits.map(|image| rotate(image, DEGREES));
    println!(
        "Training on {} images ({}), testing on {}, with the {} backend\n",
        grouped(digits.train.len()),
        digits.name,
        grouped(digits.test.len()),
        backend::NAME,
    );
    let config = options.config().with_targets(&args.targets);
    let experiment = Experiment::new(options, config, digits.samples(), rotated.samples());

    // 1. Train a base on upright digits. It fails on rotated ones.
    let recipe = options.recipe("base: upright digits", options.learning_rate);
    let base = experiment.train_base(&recipe, Mlp::new)?;
    println!(
        "\nThe base recognizes {:.2} % of upright digits,\nand {:.2} % of digits rotated by {DEGREES} degrees.\n",
        base.accuracy_old, base.accuracy_new,
    );

    // 2. Adapt this base to rotated digits with three methods.
    let mut comparison = experiment.compare(base, &Part::last_layer(options))?;

    // 3. Train a second set of adapters for another task, on the same base.
    let mirrored = digits.map(mirror);
    let second = comparison.base.to_train();
    let second = second.attach(&experiment.config).context("attaching adapters")?;
    let recipe = options.recipe("LoRA, mirrored digits", options.lora_learning_rate);
    let (second, _) = experiment.adapt(&recipe, second, &mirrored.samples())?;
    comparison.methods.push(second);

    // 4. Merge the first adapters: the outputs stay the same. Detach them: the base comes back, bit for bit.
    experiment.finish(
        comparison,
        &json!({
            "dataset": digits.name,
            "targets": args.targets,
            "train_size": digits.train.len(),
        }),
    )
}
