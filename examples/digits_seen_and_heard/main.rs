//! Joins a recognizer of pictures and one of sounds, which were trained apart, by a small head that tells
//! whether the picture shows the digit that is spoken. Then the pictures are turned and the voice is a new
//! one, and nothing but such pairs says which digits these are. Compares full fine-tuning, LoRA in both
//! encoders, and frozen encoders, of which only the head trains.
//!
//! What the encoders were trained on: the ten digits, the one in upright pictures, the other as spoken by all
//! speakers but one. The head was trained on pairs of these.
//!
//! ```text
//! git clone https://github.com/Jakobovski/free-spoken-digit-dataset
//! cargo run --release --example digits_seen_and_heard --features audio -- \
//!     --recordings free-spoken-digit-dataset
//! cargo run --release --example digits_seen_and_heard --features audio -- --generated
//! cargo run --release --example digits_seen_and_heard --no-default-features --features wgpu,audio -- \
//!     --generated
//! ```

mod model;
mod pairs;
mod senses;
#[cfg(test)]
mod tests;

use std::{fs, path::PathBuf, process::ExitCode};

use burn::{module::Module, tensor::backend::Backend};
use burn_lora::{Lora, LoraConfig, LoraModule, peft::Renaming, report::grouped};
use clap::Parser;
use common::{
    Context, Result,
    adaptation::{Ending, Job, Method, draw_curves, results},
    backend::{self, Plain, Train},
    classifier::{Sample, accuracy, logits},
    cli::{self, live::during, workers::WorkersArg, write_summary},
    digits::rotate,
    recognizer::Recognizer,
};
use mimalloc::MiMalloc;
use serde::Serialize;

use model::{DIGITS, FUSION, Matcher};
use pairs::pairs;
use senses::{Sense, Senses};

/// Reuses the memory of large tensors: every training step allocates them again.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Join an encoder of pictures and one of sounds to tell whether a picture shows the digit that is spoken,
/// and compare full fine-tuning, LoRA in both encoders, and frozen encoders.
#[derive(Parser, Debug)]
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
    /// Rank of the adapters
    #[arg(long, default_value = "6", value_parser = cli::positive)]
    rank: usize,
    /// Scale of the adapters: their update is multiplied by alpha/rank
    #[arg(long, default_value = "12", value_parser = cli::nonzero)]
    alpha: f64,
    /// Layers that get adapters, with commas between them: eye.encoder.convs.0 to eye.encoder.convs.3,
    /// eye.head, and the same of ear; all by default
    #[arg(long, value_name = "LAYERS", value_delimiter = ',')]
    targets: Vec<String>,
    /// Learning rate of the encoders' pretraining and of full fine-tuning, which falls to zero along a cosine
    #[arg(long, value_name = "RATE", default_value = "0.001", value_parser = cli::rate)]
    learning_rate: f64,
    /// Learning rate of LoRA
    #[arg(long, value_name = "RATE", default_value = "0.004", value_parser = cli::rate)]
    lora_learning_rate: f64,
    /// Learning rate of the head on frozen encoders
    #[arg(long, value_name = "RATE", default_value = "0.05", value_parser = cli::rate)]
    head_learning_rate: f64,
    /// Passes over the pictures and over the recordings, for each encoder
    #[arg(long, value_name = "EPOCHS", default_value = "3", value_parser = cli::positive)]
    base_epochs: usize,
    /// Passes over the pairs, for each method
    #[arg(long, default_value = "5", value_parser = cli::positive)]
    epochs: usize,
    /// Number of pictures to train on, the eye before and the whole after
    #[arg(long, value_name = "N", default_value = "6000", value_parser = cli::positive)]
    train_size: usize,
    /// Number of pairs to train on
    #[arg(long, value_name = "N", default_value = "4000", value_parser = cli::positive)]
    new_size: usize,
    /// Number of pairs to test on
    #[arg(long, value_name = "N", default_value = "1000", value_parser = cli::positive)]
    test_size: usize,
    #[command(flatten)]
    workers: WorkersArg,
    /// Seed of weights, adapters, pairs, shuffling, drawn digits and synthetic voices
    #[arg(long, default_value = "42")]
    seed: u64,
    /// Directory for curves.svg, summary.json, the adapters and burn-train's logs
    #[arg(long, value_name = "DIR", default_value = "out/digits_seen_and_heard")]
    out: PathBuf,
}

/// The new pictures are turned by this angle.
const DEGREES: f64 = 60.0;

#[derive(Serialize)]
struct Summary {
    dataset_images: &'static str,
    dataset_recordings: &'static str,
    backend: &'static str,
    new_speaker: &'static str,
    rank: usize,
    alpha: f64,
    targets: Vec<String>,
    learning_rate: f64,
    lora_learning_rate: f64,
    head_learning_rate: f64,
    seed: u64,
    pictures: usize,
    recordings: usize,
    new_size: usize,
    test_size: usize,
    base_epochs: usize,
    epochs: usize,
    /// Of upright pictures, and of turned ones.
    eye_accuracy: [f64; 2],
    /// Of the old speakers, and of the new one.
    ear_accuracy: [f64; 2],
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
    let (images, recordings) = (args.images.as_deref(), args.recordings.as_deref());
    let turn = |pixels: &_| rotate(pixels, DEGREES);
    let senses =
        Senses::load(images, recordings, args.generated, args.train_size, args.seed, turn)?;
    let Senses { seen_before, heard_before, seen, heard, speaker, .. } = senses;
    // The tests are of pictures and recordings that no training has.
    let deal = |seen: &Sense, heard: &Sense| {
        let train = pairs(&seen.train, &heard.train, args.new_size, args.seed)?;
        let test = pairs(&seen.test, &heard.test, args.test_size, args.seed.wrapping_add(1))?;
        Ok::<_, String>((train, test))
    };
    let (old, old_test) = deal(&seen_before, &heard_before)?;
    let (new, new_test) = deal(&seen, &heard)?;
    println!(
        "Training encoders on {} pictures ({}) and {} recordings ({}), with the {} backend",
        grouped(seen_before.train.len()),
        senses.images,
        grouped(heard_before.train.len()),
        senses.recordings,
        backend::NAME,
    );
    println!(
        "Adapting to {} pairs of turned pictures and recordings of {speaker}, testing on {}\n",
        grouped(new.len()),
        grouped(new_test.len()),
    );
    let config = LoraConfig::peft(args.rank, args.alpha)
        .with_targets(&args.targets)
        .with_modules_to_save([FUSION])
        .with_seed(args.seed);

    // 1. Train the encoders apart: each with a head of its own, which tells the ten digits.
    let device = Default::default();
    Plain::seed(&device, args.seed);
    let [eye, ear] = [0; 2].map(|_| Recognizer::<Train>::new(DIGITS, &device));
    // Reports wrong targets before the training.
    let check = Matcher::new(eye.clone(), ear.clone());
    check.attach(&config).context("attaching adapters")?;
    let pretrain = |name, model: Recognizer<Train>, Sense { train, test }: &Sense| {
        let model = model.train_only(&[".*"]).context("pretraining")?;
        let job = job(&args, args.base_epochs, &[]);
        let (model, _) = job.fit(name, model, args.learning_rate, train, test)?;
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
        "\nThe eye recognizes {:.2} % of upright digits, and {:.2} % of turned ones.\n\
         The ear understands {:.2} % of what the old speakers say, and {:.2} % of what {speaker} says.\n",
        eye_accuracy[0], eye_accuracy[1], ear_accuracy[0], ear_accuracy[1],
    );

    // 2. Join them. The head learns from pairs of what they know.
    let base = Matcher::new(eye, ear).train::<Train>().train_only(&[FUSION]).context("freezing")?;
    let joining = job(&args, args.base_epochs, &old_test);
    let name = "head: old pairs";
    let (base, _) = joining.fit(name, base, args.head_learning_rate, &old, &old_test)?;
    let base = base.into_inner();
    let (base_logits, base_accuracy_new) = during("testing the whole", || {
        (logits(&base, &old_test), accuracy(logits(&base, &new_test), &new_test))
    });
    let base_accuracy_old = accuracy(base_logits.clone(), &old_test);
    println!(
        "\nTogether they are right about {base_accuracy_old:.2} % of the old pairs, and about \
         {base_accuracy_new:.2} % of the new ones.\n"
    );

    // 3. Adapt the whole to the new pairs with three methods.
    let train = || base.clone().train::<Train>();
    let full = train().train_only(&[".*"]).context("full fine-tuning")?;
    let lora = train().attach(&config).context("attaching adapters")?;
    let frozen = train().train_only(&[FUSION]).context("freezing")?;
    println!("{}\n", lora.parameters());
    let adapt = |name, model: Lora<Train, Matcher<Train>>, rate| {
        job(&args, args.epochs, &old_test).adapt(name, model, rate, &new, &new_test, &new_test)
    };
    let (full, _) = adapt("full fine-tuning", full, args.learning_rate)?;
    let (lora, adapted) = adapt("LoRA", lora, args.lora_learning_rate)?;
    let (frozen, _) = adapt("frozen encoders", frozen, args.head_learning_rate)?;

    // 4. Merge the adapters: the outputs stay the same. Detach them: the base comes back, bit for bit.
    let ending = job(&args, args.epochs, &old_test).end(adapted, &new_test, base_logits)?;

    let methods = vec![full, lora, frozen];
    println!("{}\n", results(&methods));
    let curves = args.out.join("curves.svg");
    draw_curves(&curves, &methods, base_accuracy_new)?;
    let summary = Summary {
        dataset_images: senses.images,
        dataset_recordings: senses.recordings,
        backend: backend::NAME,
        new_speaker: speaker,
        rank: args.rank,
        alpha: args.alpha,
        targets: args.targets.clone(),
        learning_rate: args.learning_rate,
        lora_learning_rate: args.lora_learning_rate,
        head_learning_rate: args.head_learning_rate,
        seed: args.seed,
        pictures: seen_before.train.len(),
        recordings: heard_before.train.len(),
        new_size: new.len(),
        test_size: new_test.len(),
        base_epochs: args.base_epochs,
        epochs: args.epochs,
        eye_accuracy,
        ear_accuracy,
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

/// What all trainings share.
fn job<'a, S: Sample>(args: &'a Args, epochs: usize, old_test: &'a [S]) -> Job<'a, S> {
    Job {
        out: &args.out,
        epochs,
        seed: args.seed,
        lora_plus: 1.0,
        workers: args.workers.count(backend::cores()),
        start: None,
        names: Renaming::default(),
        old_test,
    }
}
