//! Adapts a convolutional network to photographic negatives, and compares three methods: full
//! fine-tuning, LoRA on all layers, and training only the last layer.
//!
//! ```text
//! cargo run --release --example cifar10
//! cargo run --release --example cifar10 -- --generated
//! cargo run --release --example cifar10 --no-default-features --features wgpu
//! ```

mod data;
mod model;

use std::{path::PathBuf, process::ExitCode};

use burn_lora::report::grouped;
use clap::Parser;
use common::{
    Result, backend, cli,
    experiment::{Experiment, Options, Part, default, help},
};
use mimalloc::MiMalloc;
use serde_json::json;

use data::{Photos, negative};
use model::{Cnn, Norms};

/// Reuses the memory of large tensors: every training step allocates them again.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Adapt a convolutional network to photographic negatives, and compare full fine-tuning, LoRA and
/// training only the last layer.
#[derive(Parser, Debug)]
#[command(
    mut_arg("rank", default("7")),
    mut_arg("alpha", default("14")),
    mut_arg("learning_rate", default("0.002")),
    mut_arg("lora_learning_rate", default("0.01")),
    mut_arg("lora_learning_rate", help("Learning rate of LoRA, and of the last layer alone")),
    mut_arg("epochs", default("6")),
    mut_arg("epochs", help("Passes over the images, for each training")),
    mut_arg("seed", help("Seed of weights, adapters, shuffling and generated images")),
    mut_arg("out", default("out/cifar10"))
)]
struct Args {
    /// Directory with CIFAR-10's binary batches; otherwise the cache, or a download
    #[arg(long, value_name = "DIR", conflicts_with = "generated")]
    data: Option<PathBuf>,
    /// Use drawn shapes, which need no files and no network
    #[arg(long)]
    generated: bool,
    /// Number of images that the base is trained on; all by default
    #[arg(long, value_name = "N", value_parser = cli::positive)]
    train_size: Option<usize>,
    /// Number of negatives to adapt to; a quarter of the training images by default
    #[arg(long, value_name = "N", value_parser = cli::positive)]
    new_size: Option<usize>,
    /// Number of test images; all by default
    #[arg(long, value_name = "N", value_parser = cli::positive)]
    test_size: Option<usize>,
    /// Layers that get adapters, with commas between them: convs.0 to convs.3 or head; all by default
    #[arg(long, value_name = "LAYERS", value_delimiter = ',')]
    targets: Vec<String>,
    /// What normalizes the channels
    #[arg(long, value_enum, default_value_t = Norms::Group)]
    norms: Norms,
    #[command(flatten)]
    options: Options,
}

fn main() -> ExitCode {
    common::main(run)
}

fn run(args: Args) -> Result<()> {
    let options = &args.options;
    options.create_out()?;
    let mut photos = Photos::load(args.data.as_deref(), args.generated, options.seed)?;
    photos.train.truncate(args.train_size.unwrap_or(usize::MAX));
    photos.test.truncate(args.test_size.unwrap_or(usize::MAX));
    let mut negatives = photos.map(negative);
    negatives.train.truncate(args.new_size.unwrap_or(photos.train.len().div_ceil(4)));
    println!(
        "Training on {} images ({}), adapting to {}, testing on {}, with the {} backend\n",
        grouped(photos.train.len()),
        photos.name,
        grouped(negatives.train.len()),
        grouped(photos.test.len()),
        backend::NAME,
    );
    let config = options.config().with_targets(&args.targets);
    let experiment = Experiment::new(options, config, photos.samples(), negatives.samples());

    // 1. Train a base on photographs. It never sees a negative.
    let recipe = options.recipe("base: photographs", options.learning_rate);
    let base = experiment.train_base(&recipe, |device| Cnn::new(args.norms, device))?;
    println!(
        "\nThe base recognizes {:.2} % of photographs, and {:.2} % of negatives.\n",
        base.accuracy_old, base.accuracy_new,
    );

    // 2. Adapt this base to negatives with three methods.
    let comparison = experiment.compare(base, &Part::last_layer(options))?;

    // 3. Merge the adapters: the outputs stay the same. Detach them: the base comes back, bit for bit.
    experiment.finish(
        comparison,
        &json!({
            "dataset": photos.name,
            "targets": args.targets,
            "norms": args.norms,
            "train_size": photos.train.len(),
            "new_size": negatives.train.len(),
        }),
    )
}
