//! Joins two classifiers of digits, one of pictures and one of recordings, by a small head that tells whether a
//! picture shows the digit that is spoken. Then adapts this model to rotated pictures and a new speaker. It
//! learns from pairs alone: whether picture and recording match, but not which digit they show. Compares full
//! fine-tuning, LoRA in both encoders, and training only the head on frozen encoders.
//!
//! The encoders are pretrained apart, on upright pictures and on all speakers but one. The head learns from
//! pairs of these.
//!
//! ```text
//! git clone https://github.com/Jakobovski/free-spoken-digit-dataset
//! cargo run --release --example digits_seen_and_heard -- --recordings free-spoken-digit-dataset
//! cargo run --release --example digits_seen_and_heard -- --generated
//! cargo run --release --example digits_seen_and_heard --no-default-features --features wgpu -- \
//!     --generated
//! ```

mod model;
mod pairs;
mod senses;
#[cfg(test)]
mod tests;

use std::{path::PathBuf, process::ExitCode};

use burn::{module::Module, tensor::backend::Backend};
use burn_lora::{LoraModule, report::grouped};
use clap::Parser;
use common::{
    Context, Result,
    backend::{self, Plain, Train},
    classifier::{Recipe, accuracy, fit, logits},
    cli::{self, live::during},
    digits::rotate,
    experiment::{Base, Experiment, Options, Part, Samples, default, help},
    recognizer::Recognizer,
};
use mimalloc::MiMalloc;
use serde_json::json;

use model::{DIGITS, FUSION, Matcher};
use pairs::pairs;
use senses::{Sense, Senses};

/// Reuses the memory of large tensors: every training step allocates them again.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Join an encoder of pictures and one of sounds to tell whether a picture shows the digit that is spoken,
/// and compare full fine-tuning, LoRA in both encoders, and frozen encoders.
#[derive(Parser, Debug)]
#[command(
    mut_arg("rank", default("6")),
    mut_arg("alpha", default("12")),
    mut_arg("learning_rate", help(LEARNING_RATE)),
    mut_arg("lora_learning_rate", default("0.004")),
    mut_arg("epochs", default("5")),
    mut_arg("epochs", help("Passes over the pairs, for each method")),
    mut_arg("seed", help(SEED)),
    mut_arg("out", default("out/digits_seen_and_heard"))
)]
struct Args {
    /// Directory with MNIST's four IDX files, raw or .gz; otherwise the cache, or a download
    #[arg(long, value_name = "DIR", conflicts_with = "generated")]
    images: Option<PathBuf>,
    /// Directory with the recordings of the Free Spoken Digit Dataset
    #[arg(long, value_name = "DIR", conflicts_with = "generated")]
    recordings: Option<PathBuf>,
    /// Use drawn digits and synthetic voices, which need no files and no network
    #[arg(long)]
    generated: bool,
    /// Number of pictures to train on, the eye before and the whole after
    #[arg(long, value_name = "N", default_value = "6000", value_parser = cli::positive)]
    train_size: usize,
    /// Number of pairs to train on
    #[arg(long, value_name = "N", default_value = "4000", value_parser = cli::positive)]
    new_size: usize,
    /// Number of pairs to test on
    #[arg(long, value_name = "N", default_value = "1000", value_parser = cli::positive)]
    test_size: usize,
    /// Layers that get adapters, with commas between them: eye.encoder.convs.0 to eye.encoder.convs.3,
    /// eye.head, and the same of ear; all by default
    #[arg(long, value_name = "LAYERS", value_delimiter = ',')]
    targets: Vec<String>,
    /// Learning rate of the head on frozen encoders
    #[arg(long, value_name = "RATE", default_value = "0.05", value_parser = cli::rate)]
    head_learning_rate: f64,
    /// Passes over the pictures and over the recordings, for each encoder
    #[arg(long, value_name = "EPOCHS", default_value = "3", value_parser = cli::positive)]
    base_epochs: usize,
    #[command(flatten)]
    options: Options,
}

const LEARNING_RATE: &str = "Learning rate of the encoders' pretraining and of full fine-tuning, which falls to \
                             zero along a cosine";
const SEED: &str = "Seed of weights, adapters, pairs, shuffling, drawn digits and synthetic voices";

/// The new pictures are rotated by this angle.
const DEGREES: f64 = 60.0;

fn main() -> ExitCode {
    common::main(run)
}

fn run(args: Args) -> Result<()> {
    let options = &args.options;
    options.create_out()?;
    let (images, recordings) = (args.images.as_deref(), args.recordings.as_deref());
    let rotated = |pixels: &_| rotate(pixels, DEGREES);
    let senses =
        Senses::load(images, recordings, args.generated, args.train_size, options.seed, rotated)?;
    let Senses { seen_before, heard_before, seen, heard, speaker, .. } = senses;
    // No training has the pictures and recordings of the tests.
    let split = |seen: &Sense, heard: &Sense| {
        let train = pairs(&seen.train, &heard.train, args.new_size, options.seed)?;
        let test = pairs(&seen.test, &heard.test, args.test_size, options.seed.wrapping_add(1))?;
        Ok::<_, String>((train, test))
    };
    let (old, old_test) = split(&seen_before, &heard_before)?;
    let (new, new_test) = split(&seen, &heard)?;
    println!(
        "Training encoders on {} pictures ({}) and {} recordings ({}), with the {} backend",
        grouped(seen_before.train.len()),
        senses.images,
        grouped(heard_before.train.len()),
        senses.recordings,
        backend::NAME,
    );
    println!(
        "Adapting to {} pairs of rotated pictures and recordings of {speaker}, testing on {}\n",
        grouped(new.len()),
        grouped(new_test.len()),
    );
    let config = options.config().with_targets(&args.targets).with_modules_to_save([FUSION]);
    let tasks = (Samples::new(&old, &old_test), Samples::new(&new, &new_test));
    let experiment = Experiment::new(options, config, tasks.0, tasks.1);
    let base_recipe = |name, learning_rate| Recipe {
        epochs: args.base_epochs,
        ..options.recipe(name, learning_rate)
    };

    // 1. Pretrain the encoders apart, each as a classifier of the ten digits.
    let device = Default::default();
    Plain::seed(&device, options.seed);
    let [eye, ear] = [0; 2].map(|_| Recognizer::<Train>::new(DIGITS, &device));
    // Reports wrong targets before the training.
    let check = Matcher::new(eye.clone(), ear.clone());
    check.attach(&experiment.config).context("attaching adapters")?;
    let pretrain = |name, model: Recognizer<Train>, Sense { train, test }: &Sense| {
        let model = model.train_only(&[".*"]).context("pretraining")?;
        let (model, _) = fit(&base_recipe(name, options.learning_rate), model, train, test)?;
        Ok::<_, String>(model.into_inner())
    };
    let eye = pretrain("eye: upright digits", eye, &seen_before)?;
    let ear = pretrain("ear: old speakers", ear, &heard_before)?;
    let [eye_accuracy, ear_accuracy] = during("testing the encoders", || {
        let of = |model: &Recognizer<Plain>, [old, new]: [&Sense; 2]| {
            [old, new].map(|sense| accuracy(logits(model, &sense.test), &sense.test))
        };
        [of(&eye, [&seen_before, &seen]), of(&ear, [&heard_before, &heard])]
    });
    println!(
        "\nThe eye recognizes {:.2} % of upright digits, and {:.2} % of rotated ones.\n\
         The ear understands {:.2} % of what the old speakers say, and {:.2} % of what {speaker} says.\n",
        eye_accuracy[0], eye_accuracy[1], ear_accuracy[0], ear_accuracy[1],
    );

    // 2. Join them. The head learns from pairs of the old pictures and speakers.
    let model =
        Matcher::new(eye, ear).train::<Train>().train_only(&[FUSION]).context("freezing")?;
    let recipe = base_recipe("head: old pairs", args.head_learning_rate);
    let (model, _) = fit(&recipe, model, &old, &old_test)?;
    let base: Base<Matcher<Train>> = experiment.evaluate(model);
    println!(
        "\nTogether they are right about {:.2} % of the old pairs, and about {:.2} % of the new ones.\n",
        base.accuracy_old, base.accuracy_new,
    );

    // 3. Adapt the model to the new pairs with three methods.
    let frozen =
        Part { name: "frozen encoders", layers: &[FUSION], learning_rate: args.head_learning_rate };
    let comparison = experiment.compare(base, &frozen)?;

    // 4. Merge the adapters: the outputs stay the same. Detach them: the base comes back, bit for bit.
    experiment.finish(
        comparison,
        &json!({
            "dataset_images": senses.images,
            "dataset_recordings": senses.recordings,
            "new_speaker": speaker,
            "targets": args.targets,
            "head_learning_rate": args.head_learning_rate,
            "pictures": seen_before.train.len(),
            "recordings": heard_before.train.len(),
            "new_size": new.len(),
            "test_size": new_test.len(),
            "base_epochs": args.base_epochs,
            // Of upright pictures and of rotated ones; of the old speakers and of the new one.
            "eye_accuracy": eye_accuracy,
            "ear_accuracy": ear_accuracy,
        }),
    )
}
