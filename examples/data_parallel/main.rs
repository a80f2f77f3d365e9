//! Trains on several processes or threads at once, each with its part of every batch: first a classifier of
//! handwritten digits in full, then adapters for rotated digits. Only what trains is sent.
//!
//! ```text
//! cargo run --release --example data_parallel --no-default-features --features flex -- --replicas 2
//! cargo build --release --example data_parallel --no-default-features --features flex,mpi
//! mpirun -n 2 --bind-to core target/release/examples/data_parallel --mpi
//! ```
//!
//! Start reading with [`train`], which is all that there is to it. `data_parallel plan` predicts what many
//! machines are worth.

mod plan;
mod train;

use std::{fs, path::PathBuf, process::ExitCode};

use burn::{
    module::{AutodiffModule, Module},
    tensor::backend::Backend,
};
use burn_lora::{
    Lora, LoraConfig, LoraModule,
    report::{grouped, table},
    train::{Replicas, ThreadReplica},
};
use clap::{Parser, Subcommand};
use common::{
    Context, Result,
    backend::{self, Plain, Train},
    classifier::{accuracy, logits},
    cli::{
        self,
        replicas::{Counted, MpiArg},
        write_summary,
    },
    digits::{Digit, Digits, rotate},
    mlp::Mlp,
};
use mimalloc::MiMalloc;
use serde::Serialize;

use plan::PlanArgs;
use train::{Cost, Model, Recipe, train};

/// Reuses the memory of large tensors: every training step allocates them again.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Train a classifier of handwritten digits, and adapters for rotated digits, on several processes or threads
/// at once.
#[derive(Parser, Debug)]
#[command(args_conflicts_with_subcommands = true)]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    mpi: MpiArg,
    /// Train with so many threads instead of processes, each with a model of its own
    #[arg(long, value_name = "N", default_value = "1", value_parser = cli::positive, conflicts_with = "mpi")]
    replicas: usize,
    /// Directory with MNIST's four IDX files, raw or .gz; otherwise drawn digits, which need no files
    #[arg(long, value_name = "DIR", conflicts_with = "generated")]
    data: Option<PathBuf>,
    /// Use drawn digits, as without --data
    #[arg(long)]
    generated: bool,
    /// Rank of the adapters
    #[arg(long, default_value = "8", value_parser = cli::positive)]
    rank: usize,
    /// Scale of the adapters: their update is multiplied by alpha/rank
    #[arg(long, default_value = "16", value_parser = cli::nonzero)]
    alpha: f64,
    /// Number of images of a batch, which all share
    #[arg(long, default_value = "128", value_parser = cli::positive)]
    batch: usize,
    /// Number of steps, for each training
    #[arg(long, default_value = "300", value_parser = cli::positive)]
    steps: usize,
    /// Learning rate of the base
    #[arg(long, value_name = "RATE", default_value = "0.001", value_parser = cli::rate)]
    learning_rate: f64,
    /// Learning rate of LoRA
    #[arg(long, value_name = "RATE", default_value = "0.005", value_parser = cli::rate)]
    lora_learning_rate: f64,
    /// Seed of weights, adapters, the order of the images, and drawn digits
    #[arg(long, default_value = "42")]
    seed: u64,
    /// Directory for summary.json and the adapters
    #[arg(long, value_name = "DIR", default_value = "out/data_parallel")]
    out: PathBuf,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Predict what many machines are worth, from the time of a step and what it sends
    Plan(PlanArgs),
}

/// The new task: the same digits, rotated by this angle.
const DEGREES: f64 = 60.0;

#[derive(Serialize)]
struct Summary {
    dataset: &'static str,
    backend: &'static str,
    replicas: usize,
    batch: usize,
    steps: usize,
    seed: u64,
    trainings: Vec<Training>,
    /// The fingerprint of the adapters: equal fingerprints are equal bits.
    fingerprint: String,
}

/// One of the two trainings.
#[derive(Serialize)]
struct Training {
    name: &'static str,
    trainable: usize,
    accuracy: f64,
    step_seconds: f64,
    /// The part of the time that went into sending, and waiting for the others.
    sending: f64,
    /// The bytes that a replica sent in a step.
    step_bytes: f64,
}

fn main() -> ExitCode {
    common::main(run)
}

fn run(args: Args) -> Result<()> {
    if let Some(Command::Plan(args)) = &args.command {
        return plan::run(args);
    }
    args.mpi.run(|replicas| {
        let digits = match &args.data {
            Some(dir) => Digits::read(dir)?,
            None => Digits::drawn(args.seed),
        };
        let rotated = digits.map(|image| rotate(image, DEGREES));
        // As each process does, so that all begin with the same weights.
        Plain::seed(&Default::default(), args.seed);
        let base = Mlp::<Train>::new(&Default::default());
        let base = base.train_only(&[".*"]).context("training the base")?;
        if replicas.is_first() {
            println!("{} replicas, {}", replicas.count().max(args.replicas), backend::NAME);
        }
        match args.replicas {
            1 => run_replica(&args, base, &digits, &rotated, replicas),
            count => {
                let results = ThreadReplica::run(count, |it| {
                    // Graphs of two threads must have nothing in common.
                    let base = base.clone().fork(&Default::default());
                    run_replica(&args, base, &digits, &rotated, &Counted::new(&it))
                });
                results.into_iter().collect()
            }
        }
    })
}

/// What each replica does.
fn run_replica(
    args: &Args,
    base: Model,
    digits: &Digits,
    rotated: &Digits,
    replicas: &Counted,
) -> Result<()> {
    let recipe = |name, learning_rate| Recipe {
        name,
        learning_rate,
        steps: args.steps,
        batch: args.batch,
        seed: args.seed,
    };
    // 1. The base learns upright digits, with all of its weights.
    let recipe_of_base = recipe("base: upright digits", args.learning_rate);
    let (base, cost) = train(base, &digits.train, &recipe_of_base, replicas)?;
    let full = told(recipe_of_base.name, &base, cost, &digits.test, replicas);

    // 2. Adapters learn rotated digits.
    let config = LoraConfig::peft(args.rank, args.alpha).with_seed(args.seed);
    let model = base.into_inner().attach(&config).context("attaching adapters")?;
    let recipe_of_lora = recipe("LoRA: rotated digits", args.lora_learning_rate);
    let (model, cost) = train(model, &rotated.train, &recipe_of_lora, replicas)?;
    let lora = told(recipe_of_lora.name, &model, cost, &rotated.test, replicas);

    // 3. All replicas have the same bits. The first of them saves.
    let adapters = model.adapters();
    let fingerprint = adapters.fingerprint();
    replicas.agree(&fingerprint).context("the replicas are no copies any more")?;
    let (Some(full), Some(lora)) = (full, lora) else { return Ok(()) };
    let trainings = vec![full, lora];
    println!("\n{}\nThe adapters' fingerprint, in all replicas: {fingerprint}", costs(&trainings));
    fs::create_dir_all(&args.out).context(args.out.display())?;
    let dir = args.out.join("adapters");
    adapters.save(&dir).context("the adapters cannot be saved")?;
    let summary = Summary {
        dataset: digits.name,
        backend: backend::NAME,
        replicas: replicas.count(),
        batch: args.batch,
        steps: args.steps,
        seed: args.seed,
        trainings,
        fingerprint,
    };
    let path = write_summary(&args.out, &summary)?;
    println!("Wrote {} and {}", path.display(), dir.display());
    Ok(())
}

/// What the first replica knows of a training.
fn told(
    name: &'static str,
    model: &Lora<Train, Mlp<Train>>,
    cost: Cost,
    test: &[Digit],
    replicas: &Counted,
) -> Option<Training> {
    replicas.is_first().then(|| Training {
        name,
        trainable: model.parameters().trainable,
        accuracy: accuracy(logits(&*model.valid(), test), test),
        step_seconds: cost.seconds / cost.steps as f64,
        sending: cost.sent.seconds / cost.seconds,
        step_bytes: cost.sent.bytes as f64 / cost.steps as f64,
    })
}

fn costs(trainings: &[Training]) -> String {
    let head =
        ["training", "trainable", "accuracy", "ms per step", "sending, waiting", "bytes per step"];
    let rows = trainings.iter().map(|it| {
        vec![
            it.name.to_owned(),
            grouped(it.trainable),
            format!("{:.1} %", it.accuracy),
            format!("{:.1}", 1e3 * it.step_seconds),
            format!("{:.0} %", 100.0 * it.sending),
            grouped(it.step_bytes as usize),
        ]
    });
    table(&head, &rows.collect::<Vec<_>>())
}
