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

use std::{fs, path::PathBuf, process::ExitCode};

use burn::{module::Module, tensor::backend::Backend};
use burn_lora::{LoraConfig, LoraModule, peft::Renaming, report::grouped};
use clap::Parser;
use common::{
    Context, Result,
    adaptation::{Ending, Job, Method, draw_curves, results},
    backend::{self, Plain, Train},
    classifier::{accuracy, logits},
    cli::{self, live::during, workers::WorkersArg, write_summary},
};
use mimalloc::MiMalloc;
use serde::Serialize;

use data::{Photos, negative};
use model::Cnn;

/// Reuses the memory of large tensors: every training step allocates them again.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Adapt a convolutional network to photographic negatives, and compare full fine-tuning, LoRA and
/// training only the last layer.
#[derive(Parser, Debug)]
struct Args {
    /// Directory with CIFAR-10's binary batches; otherwise the cache, or a download
    #[arg(long, value_name = "DIR", conflicts_with = "generated")]
    data: Option<PathBuf>,
    /// Use drawn shapes, which need no files and no network
    #[arg(long)]
    generated: bool,
    /// Rank of the adapters
    #[arg(long, default_value = "7", value_parser = cli::positive)]
    rank: usize,
    /// Scale of the adapters: their update is multiplied by alpha/rank
    #[arg(long, default_value = "14", value_parser = cli::nonzero)]
    alpha: f64,
    /// Layers that get adapters, with commas between them: convs.0 to convs.3 or head; all by default
    #[arg(long, value_name = "LAYERS", value_delimiter = ',')]
    targets: Vec<String>,
    /// Learning rate of the base and of full fine-tuning, which falls to zero along a cosine
    #[arg(long, value_name = "RATE", default_value = "0.002", value_parser = cli::rate)]
    learning_rate: f64,
    /// Learning rate of LoRA, and of the last layer alone
    #[arg(long, value_name = "RATE", default_value = "0.01", value_parser = cli::rate)]
    lora_learning_rate: f64,
    /// Passes over the images, for each training
    #[arg(long, default_value = "6", value_parser = cli::positive)]
    epochs: usize,
    /// Number of images that the base is trained on; all by default
    #[arg(long, value_name = "N", value_parser = cli::positive)]
    train_size: Option<usize>,
    /// Number of negatives to adapt to; a quarter of the training images by default
    #[arg(long, value_name = "N", value_parser = cli::positive)]
    new_size: Option<usize>,
    /// Number of test images; all by default
    #[arg(long, value_name = "N", value_parser = cli::positive)]
    test_size: Option<usize>,
    #[command(flatten)]
    workers: WorkersArg,
    /// Seed of weights, adapters, shuffling and generated images
    #[arg(long, default_value = "42")]
    seed: u64,
    /// Directory for curves.svg, summary.json, the adapters and burn-train's logs
    #[arg(long, value_name = "DIR", default_value = "out/cifar10")]
    out: PathBuf,
}

#[derive(Serialize)]
struct Summary {
    dataset: &'static str,
    backend: &'static str,
    rank: usize,
    alpha: f64,
    targets: Vec<String>,
    learning_rate: f64,
    lora_learning_rate: f64,
    seed: u64,
    train_size: usize,
    new_size: usize,
    epochs: usize,
    base_accuracy_old: f64,
    base_accuracy_new: f64,
    methods: Vec<Method>,
    #[serde(flatten)]
    ending: Ending,
}

fn main() -> ExitCode {
    common::main(run)
}

fn run(args: Args) -> Result<()> {
    fs::create_dir_all(&args.out).context(args.out.display())?;
    let mut photos = Photos::load(args.data.as_deref(), args.generated, args.seed)?;
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
    let config =
        LoraConfig::peft(args.rank, args.alpha).with_targets(&args.targets).with_seed(args.seed);
    let job = Job {
        out: &args.out,
        epochs: args.epochs,
        seed: args.seed,
        lora_plus: 1.0,
        workers: args.workers.count(backend::cores()),
        start: None,
        names: Renaming::default(),
        old_test: &photos.test,
    };

    // 1. Train a base on photographs. It never sees a negative.
    Plain::seed(&Default::default(), args.seed);
    let base = Cnn::<Train>::new(&Default::default());
    // Reports wrong targets before the training.
    base.clone().attach(&config).context("attaching adapters")?;
    let base = base.train_only(&[".*"]).context("training the base")?;
    let (base, _) =
        job.fit("base: photographs", base, args.learning_rate, &photos.train, &photos.test)?;
    let base = base.into_inner();
    let (base_logits, base_accuracy_new) = during("testing the base", || {
        (logits(&base, &photos.test), accuracy(logits(&base, &negatives.test), &negatives.test))
    });
    let base_accuracy_old = accuracy(base_logits.clone(), &photos.test);
    println!(
        "\nThe base recognizes {base_accuracy_old:.2} % of photographs, and \
         {base_accuracy_new:.2} % of negatives.\n"
    );

    // 2. Adapt this base to negatives with three methods.
    let train = || base.clone().train::<Train>();
    let full = train().train_only(&[".*"]).context("full fine-tuning")?;
    let lora = train().attach(&config).context("attaching adapters")?;
    let last = train().train_only(&["head"]).context("freezing")?;
    println!("{}\n", lora.parameters());
    let (new, test) = (&negatives.train, &negatives.test);
    let (full, _) = job.adapt("full fine-tuning", full, args.learning_rate, new, test, test)?;
    let (lora, adapted) = job.adapt("LoRA", lora, args.lora_learning_rate, new, test, test)?;
    let (last, _) = job.adapt("last layer", last, args.lora_learning_rate, new, test, test)?;

    // 3. Merge the adapters: the outputs stay the same. Detach them: the base comes back, bit for bit.
    let ending = job.end(adapted, test, base_logits)?;

    let methods = vec![full, lora, last];
    println!("{}\n", results(&methods));
    let curves = args.out.join("curves.svg");
    draw_curves(&curves, &methods, base_accuracy_new)?;
    let summary = Summary {
        dataset: photos.name,
        backend: backend::NAME,
        rank: args.rank,
        alpha: args.alpha,
        targets: args.targets,
        learning_rate: args.learning_rate,
        lora_learning_rate: args.lora_learning_rate,
        seed: args.seed,
        train_size: photos.train.len(),
        new_size: negatives.train.len(),
        epochs: args.epochs,
        base_accuracy_old,
        base_accuracy_new,
        methods,
        ending,
    };
    let path = write_summary(&args.out, &summary)?;
    let adapters = args.out.join("adapters");
    println!("Wrote {}, {} and {}", curves.display(), path.display(), adapters.display());
    Ok(())
}
