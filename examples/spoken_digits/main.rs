//! Adapts a recognizer of spoken digits to a new speaker with a few dozen recordings, and compares three
//! methods: full fine-tuning, LoRA on all layers, and training only the last layer.
//!
//! ```text
//! git clone https://github.com/Jakobovski/free-spoken-digit-dataset
//! cargo run --release --example spoken_digits -- --data free-spoken-digit-dataset
//! cargo run --release --example spoken_digits -- --generated
//! cargo run --release --example spoken_digits --no-default-features --features wgpu -- --generated
//! ```
//!
//! The base never hears the new speaker. Sounds become spectrograms in
//! `examples/src/speech/spectrogram.rs`, and the model is in `examples/src/recognizer.rs`.

mod split;
#[cfg(test)]
mod tests;

use std::{path::PathBuf, process::ExitCode};

use burn_lora::report::grouped;
use clap::Parser;
use common::{
    Result, backend,
    classifier::Recipe,
    cli,
    experiment::{Experiment, Options, Part, Samples, default, help},
    recognizer::Recognizer,
    speech::Recordings,
};
use mimalloc::MiMalloc;
use serde_json::json;

use split::Split;

/// Reuses the memory of large tensors: every training step allocates them again.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Adapt a recognizer of spoken digits to a new speaker, and compare full fine-tuning, LoRA and training
/// only the last layer.
#[derive(Parser, Debug)]
#[command(
    mut_arg("rank", default("6")),
    mut_arg("alpha", default("12")),
    mut_arg("learning_rate", default("0.002")),
    mut_arg("lora_learning_rate", default("0.01")),
    mut_arg("lora_learning_rate", help("Learning rate of LoRA, and of the last layer alone")),
    mut_arg("epochs", default("20")),
    mut_arg("epochs", help("Passes over the recordings of the new speaker, for each method")),
    mut_arg("seed", help("Seed of weights, adapters, shuffling and synthetic voices")),
    mut_arg("out", default("out/spoken_digits"))
)]
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
    /// Number of recordings of the new speaker to adapt to
    #[arg(long, value_name = "N", default_value = "50", value_parser = cli::positive)]
    new_size: usize,
    /// Layers that get adapters, with commas between them: convs.0 to convs.3 or head; all by default
    #[arg(long, value_name = "LAYERS", value_delimiter = ',')]
    targets: Vec<String>,
    /// Passes over the recordings of the other speakers, for the base
    #[arg(long, value_name = "EPOCHS", default_value = "6", value_parser = cli::positive)]
    base_epochs: usize,
    #[command(flatten)]
    options: Options,
}

fn main() -> ExitCode {
    common::main(run)
}

fn run(args: Args) -> Result<()> {
    let options = &args.options;
    options.create_out()?;
    let recordings = Recordings::load(args.data.as_deref(), args.generated, options.seed)?;
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
    let config = options.config().with_targets(&args.targets);
    let tasks = (Samples::new(&old, &old_test), Samples::new(&new, &new_test));
    let experiment = Experiment::new(options, config, tasks.0, tasks.1);

    // 1. Train a base on the old speakers. It never hears the new one.
    let recipe = Recipe {
        epochs: args.base_epochs,
        ..options.recipe("base: old speakers", options.learning_rate)
    };
    let base = experiment.train_base(&recipe, |device| Recognizer::new(10, device))?;
    println!(
        "\nThe base understands {:.2} % of what the old speakers say, and {:.2} % of what {speaker} says.\n",
        base.accuracy_old, base.accuracy_new,
    );

    // 2. Adapt this base to the new speaker with three methods.
    let comparison = experiment.compare(base, &Part::last_layer(options))?;

    // 3. Merge the adapters: the outputs stay the same. Detach them: the base comes back, bit for bit.
    experiment.finish(
        comparison,
        &json!({
            "dataset": recordings.name,
            "new_speaker": speaker,
            "targets": args.targets,
            "train_size": old.len(),
            "new_size": new.len(),
            "test_size_old": old_test.len(),
            "test_size_new": new_test.len(),
            "base_epochs": args.base_epochs,
        }),
    )
}
