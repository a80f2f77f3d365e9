//! Adapts a recognizer of spoken digits to a new speaker with a few dozen recordings, and compares three
//! methods: full fine-tuning, LoRA on all layers, and training only the last layer.
//!
//! ```text
//! git clone https://github.com/Jakobovski/free-spoken-digit-dataset
//! cargo run --release --example spoken_digits --features audio -- --data free-spoken-digit-dataset
//! cargo run --release --example spoken_digits --features audio -- --generated
//! cargo run --release --example spoken_digits --no-default-features --features wgpu,audio -- --generated
//! ```
//!
//! The base never hears the new speaker. What a sound is to the model is in
//! `examples/common/speech/spectrogram.rs`, and the model in `examples/common/recognizer.rs`.

mod split;
#[cfg(test)]
mod tests;

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
    recognizer::{Grid, Recognizer},
    speech::Recordings,
};
use mimalloc::MiMalloc;
use serde::Serialize;

use split::Split;

/// Reuses the memory of large tensors: every training step allocates them again.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Adapt a recognizer of spoken digits to a new speaker, and compare full fine-tuning, LoRA and training
/// only the last layer.
#[derive(Parser, Debug)]
struct Args {
    /// Directory with the recordings of the Free Spoken Digit Dataset
    #[arg(long, value_name = "DIR", conflicts_with = "generated")]
    data: Option<PathBuf>,
    /// Use synthetic voices, which need no files
    #[arg(long)]
    generated: bool,
    /// The new speaker, whom the base does not hear; george by default, and child with --generated
    #[arg(long, value_name = "NAME")]
    speaker: Option<String>,
    /// Rank of the adapters
    #[arg(long, default_value = "6", value_parser = cli::positive)]
    rank: usize,
    /// Scale of the adapters: their update is multiplied by alpha/rank
    #[arg(long, default_value = "12", value_parser = cli::nonzero)]
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
    /// Passes over the recordings of the other speakers, for the base
    #[arg(long, value_name = "EPOCHS", default_value = "6", value_parser = cli::positive)]
    base_epochs: usize,
    /// Passes over the recordings of the new speaker, for each method
    #[arg(long, default_value = "20", value_parser = cli::positive)]
    epochs: usize,
    /// Number of recordings of the new speaker to adapt to
    #[arg(long, value_name = "N", default_value = "50", value_parser = cli::positive)]
    new_size: usize,
    #[command(flatten)]
    workers: WorkersArg,
    /// Seed of weights, adapters, shuffling and synthetic voices
    #[arg(long, default_value = "42")]
    seed: u64,
    /// Directory for curves.svg, summary.json, the adapters and burn-train's logs
    #[arg(long, value_name = "DIR", default_value = "out/spoken_digits")]
    out: PathBuf,
}

#[derive(Serialize)]
struct Summary {
    dataset: &'static str,
    backend: &'static str,
    new_speaker: String,
    rank: usize,
    alpha: f64,
    targets: Vec<String>,
    learning_rate: f64,
    lora_learning_rate: f64,
    seed: u64,
    train_size: usize,
    new_size: usize,
    test_size_old: usize,
    test_size_new: usize,
    base_epochs: usize,
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
    let recordings = Recordings::load(args.data.as_deref(), args.generated, args.seed)?;
    let speaker = args.speaker.as_deref().unwrap_or(recordings.newcomer);
    let Split { old, old_test, new, new_test } = Split::new(&recordings, speaker, args.new_size)?;
    println!(
        "Training on {} recordings of {} speakers ({}), adapting to {} of {speaker}, with the {} backend",
        grouped(old.len()),
        recordings.speakers().len() - 1,
        recordings.name,
        new.len(),
        backend::NAME,
    );
    println!(
        "Testing on {} other recordings of {speaker}, and on {} of the old speakers\n",
        new_test.len(),
        old_test.len(),
    );
    let config =
        LoraConfig::peft(args.rank, args.alpha).with_targets(&args.targets).with_seed(args.seed);
    let job = |epochs| Job::<Grid> {
        out: &args.out,
        epochs,
        seed: args.seed,
        lora_plus: 1.0,
        workers: args.workers.count(backend::cores()),
        start: None,
        names: Renaming::default(),
        old_test: &old_test,
    };

    // 1. Train a base on the old speakers. It never hears the new one.
    Plain::seed(&Default::default(), args.seed);
    let base = Recognizer::<Train>::new(10, &Default::default());
    // Reports wrong targets before the training.
    base.clone().attach(&config).context("attaching adapters")?;
    let base = base.train_only(&[".*"]).context("training the base")?;
    let (base, _) = job(args.base_epochs).fit(
        "base: old speakers",
        base,
        args.learning_rate,
        &old,
        &old_test,
    )?;
    let base = base.into_inner();
    let (base_logits, base_accuracy_new) = during("testing the base", || {
        (logits(&base, &old_test), accuracy(logits(&base, &new_test), &new_test))
    });
    let base_accuracy_old = accuracy(base_logits.clone(), &old_test);
    println!(
        "\nThe base understands {base_accuracy_old:.2} % of what the old speakers say, and \
         {base_accuracy_new:.2} % of what {speaker} says.\n"
    );

    // 2. Adapt this base to the new speaker with three methods.
    let train = || base.clone().train::<Train>();
    let full = train().train_only(&[".*"]).context("full fine-tuning")?;
    let lora = train().attach(&config).context("attaching adapters")?;
    let last = train().train_only(&["head"]).context("freezing")?;
    println!("{}\n", lora.parameters());
    let job = job(args.epochs);
    let (full, _) =
        job.adapt("full fine-tuning", full, args.learning_rate, &new, &new_test, &new_test)?;
    let (lora, adapted) =
        job.adapt("LoRA", lora, args.lora_learning_rate, &new, &new_test, &new_test)?;
    let (last, _) =
        job.adapt("last layer", last, args.lora_learning_rate, &new, &new_test, &new_test)?;

    // 3. Merge the adapters: the outputs stay the same. Detach them: the base comes back, bit for bit.
    let ending = job.end(adapted, &new_test, base_logits)?;

    let methods = vec![full, lora, last];
    println!("{}\n", results(&methods));
    let curves = args.out.join("curves.svg");
    draw_curves(&curves, &methods, base_accuracy_new)?;
    let summary = Summary {
        dataset: recordings.name,
        backend: backend::NAME,
        new_speaker: speaker.to_owned(),
        rank: args.rank,
        alpha: args.alpha,
        learning_rate: args.learning_rate,
        lora_learning_rate: args.lora_learning_rate,
        seed: args.seed,
        train_size: old.len(),
        new_size: new.len(),
        test_size_old: old_test.len(),
        test_size_new: new_test.len(),
        base_epochs: args.base_epochs,
        epochs: args.epochs,
        base_accuracy_old,
        base_accuracy_new,
        methods,
        ending,
        targets: args.targets,
    };
    let path = write_summary(&args.out, &summary)?;
    let adapters = args.out.join("adapters");
    println!("Wrote {}, {} and {}", curves.display(), path.display(), adapters.display());
    Ok(())
}
