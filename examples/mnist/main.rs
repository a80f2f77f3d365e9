//! Adapts a classifier of handwritten digits to rotated digits, and compares three methods: full
//! fine-tuning, LoRA, and training only the last layer.
//!
//! ```text
//! cargo run --release --example mnist
//! cargo run --release --example mnist -- --generated --rank 4
//! cargo run --release --example mnist --no-default-features --features wgpu
//! ```

use std::{fs, path::PathBuf, process::ExitCode};

use burn::{module::Module, tensor::backend::Backend};
use burn_lora::{LoraConfig, LoraModule, peft::Renaming, report::grouped};
use clap::Parser;
use common::{
    Context, Result,
    adaptation::{Job, Method, bits, draw_curves, largest_difference, results},
    backend::{self, Plain, Train},
    classifier::{accuracy, logits},
    cli::{self, live::during, workers::WorkersArg, write_summary},
    digits::{Digits, mirror, rotate},
    mlp::Mlp,
};
use mimalloc::MiMalloc;
use serde::Serialize;

/// Reuses the memory of large tensors: every training step allocates them again.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Adapt a classifier of handwritten digits to rotated digits, and compare full fine-tuning, LoRA and
/// training only the last layer.
#[derive(Parser, Debug)]
struct Args {
    /// Directory with MNIST's four IDX files, raw or .gz; otherwise the cache, or a download
    #[arg(long, value_name = "DIR", conflicts_with = "generated")]
    data: Option<PathBuf>,
    /// Use drawn digits, which need no files and no network
    #[arg(long)]
    generated: bool,
    /// Rank of the adapters
    #[arg(long, default_value = "8", value_parser = cli::positive)]
    rank: usize,
    /// Scale of the adapters: their update is multiplied by alpha/rank
    #[arg(long, default_value = "16", value_parser = cli::nonzero)]
    alpha: f64,
    /// Layers that get adapters, with commas between them: fc1, fc2 or head; all by default
    #[arg(long, value_name = "LAYERS", value_delimiter = ',')]
    targets: Vec<String>,
    /// Learning rate of the base and of full fine-tuning, which falls to zero along a cosine
    #[arg(long, value_name = "RATE", default_value = "0.001", value_parser = cli::rate)]
    learning_rate: f64,
    /// Learning rate of LoRA, and of the last layer alone
    #[arg(long, value_name = "RATE", default_value = "0.005", value_parser = cli::rate)]
    lora_learning_rate: f64,
    /// Passes over the training images, for each training
    #[arg(long, default_value = "4", value_parser = cli::positive)]
    epochs: usize,
    /// Number of training images; all by default
    #[arg(long, value_name = "N", value_parser = cli::positive)]
    train_size: Option<usize>,
    #[command(flatten)]
    workers: WorkersArg,
    /// Seed of weights, adapters, shuffling and generated digits
    #[arg(long, default_value = "42")]
    seed: u64,
    /// Directory for curves.svg, summary.json, the adapters and burn-train's logs
    #[arg(long, value_name = "DIR", default_value = "out/mnist")]
    out: PathBuf,
}

/// The new task: the same digits, rotated by this angle.
const DEGREES: f64 = 60.0;

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
    epochs: usize,
    base_accuracy_old: f64,
    base_accuracy_new: f64,
    methods: Vec<Method>,
    max_abs_logit_diff_merged: f64,
    base_restored_exactly: bool,
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
        old_test: &digits.test,
    };

    // 1. Train a base on upright digits. It fails on rotated ones.
    Plain::seed(&Default::default(), args.seed);
    let base = Mlp::<Train>::new(&Default::default());
    // Reports wrong targets before the training.
    base.clone().attach(&config).context("attaching adapters")?;
    let base = base.train_only(&[".*"]).context("training the base")?;
    let (base, _) =
        job.fit("base: upright digits", base, args.learning_rate, &digits.train, &digits.test)?;
    let base = base.into_inner();
    let (base_logits, base_accuracy_new) = during("testing the base", || {
        (logits(&base, &digits.test), accuracy(logits(&base, &rotated.test), &rotated.test))
    });
    let base_accuracy_old = accuracy(base_logits.clone(), &digits.test);
    println!(
        "\nThe base recognizes {base_accuracy_old:.2} % of upright digits,\nand \
         {base_accuracy_new:.2} % of digits rotated by {DEGREES} degrees.\n"
    );

    // 2. Adapt this base to rotated digits with three methods.
    let train = || base.clone().train::<Train>();
    let full = train().train_only(&[".*"]).context("full fine-tuning")?;
    let lora = train().attach(&config).context("attaching adapters")?;
    let last = train().train_only(&["head"]).context("freezing")?;
    println!("{}\n", lora.parameters());

    let adapt = |name, model, rate, digits: &Digits| {
        job.adapt(name, model, rate, &digits.train, &digits.test, &digits.test)
    };
    let (full, _) = adapt("full fine-tuning", full, args.learning_rate, &rotated)?;
    let (lora, adapted) = adapt("LoRA", lora, args.lora_learning_rate, &rotated)?;
    let (last, _) = adapt("last layer", last, args.lora_learning_rate, &rotated)?;

    // 3. Merge the adapters into the base: the outputs stay the same.
    let merged = adapted.merge().context("merging")?;
    let unmerged = logits(&*adapted, &rotated.test);
    let max_abs_logit_diff_merged =
        largest_difference(logits(&merged, &rotated.test), unmerged.clone());

    // 4. Detach the adapters: the base comes back, bit for bit.
    let restored = logits(&adapted.detach(), &digits.test);
    let base_restored_exactly = bits(restored) == bits(base_logits);

    // 5. Train a second set of adapters for another task, on the same base.
    let mirrored = digits.map(mirror);
    let second = train().attach(&config).context("attaching adapters")?;
    let (second, _) = adapt("LoRA, mirrored digits", second, args.lora_learning_rate, &mirrored)?;

    println!();
    let largest = largest_difference(unmerged.clone(), unmerged.zeros_like());
    println!(
        "Merging the adapters changes the logits by at most {max_abs_logit_diff_merged:.1e} \
         (they are up to {largest:.0})."
    );
    let exactly = if base_restored_exactly { "exactly" } else { "NOT exactly" };
    println!(
        "Without them, the model computes {exactly} what the base does: {base_accuracy_old:.2} %.\n"
    );

    let methods = vec![full, lora, last, second];
    println!("{}\n", results(&methods));
    let curves = args.out.join("curves.svg");
    draw_curves(&curves, &methods[..3], base_accuracy_new)?;
    let summary = Summary {
        dataset: digits.name,
        backend: backend::NAME,
        rank: args.rank,
        alpha: args.alpha,
        targets: args.targets,
        learning_rate: args.learning_rate,
        lora_learning_rate: args.lora_learning_rate,
        seed: args.seed,
        train_size: digits.train.len(),
        epochs: args.epochs,
        base_accuracy_old,
        base_accuracy_new,
        methods,
        max_abs_logit_diff_merged,
        base_restored_exactly,
    };
    let path = write_summary(&args.out, &summary)?;
    let adapters = args.out.join("adapters");
    println!("Wrote {}, {} and {}", curves.display(), path.display(), adapters.display());
    Ok(())
}
