//! Sweeps over rank, scaling, layers, alpha and initial values: what each does to the accuracy and the cost
//! of an adapter, next to full fine-tuning.
//!
//! ```text
//! cargo run --release --example rank_sweep -- --generated
//! cargo run --release --example rank_sweep -- --data mnist --sweep rank,scaling
//! cargo run --release --example rank_sweep --no-default-features --features flex -- --task text \
//!     --sweep rank,layers --seeds 1
//! ```
//!
//! The second task, text, takes ten times as long for each point.
//!
//! Start reading with [`lab`], which trains and measures, and [`sweeps`].

mod digits;
mod lab;
mod report;
mod sentences;
mod spread;
mod sweeps;
mod task;
mod train;
mod weights;

use std::{path::PathBuf, process::ExitCode, time::Instant};

use burn::module::Module;
use clap::{Parser, ValueEnum};
use mimalloc::MiMalloc;
use serde_json::{Map, json};

use burn_lora::report::grouped;
use common::{
    Result, backend,
    classifier::{Learns, accuracy, logits},
    cli::{self, live::during},
    experiment::{Options, default, default_if, help},
};
use lab::Lab;
use sweeps::{alpha, initialization, layers, rank, scaling, singular_values};
use task::Task;

/// Reuses the memory of large tensors: every training step allocates them again.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Sweep over rank, scaling, layers, alpha and initial values of adapters, and compare with full
/// fine-tuning.
#[derive(Parser, Debug)]
#[command(
    mut_arg("rank", help("Rank of the adapters where it is not compared")),
    mut_arg("alpha", help(ALPHA)),
    mut_arg("learning_rate", default_if("task", "text", sentences::RATES[0], digits::RATES[0])),
    mut_arg("learning_rate", help(LEARNING_RATE)),
    mut_arg("lora_learning_rate", default_if("task", "text", sentences::RATES[1], digits::RATES[1])),
    mut_arg("epochs", |it| it.hide_default_value(true)),
    mut_arg("epochs", help("Passes over the samples, for each training")),
    mut_arg("seed", help("Seed of the base and of generated samples, and first seed of the trainings")),
    mut_arg("out", default("out/rank_sweep")),
    mut_arg("out", help("Directory for the figures, summary.json and the base's logs")),
)]
struct Args {
    /// The task that a base is adapted to
    #[arg(long, value_enum, default_value = "digits")]
    task: TaskName,
    /// Directory with MNIST's four IDX files, raw or .gz; otherwise the cache, or a download
    #[arg(long, value_name = "DIR", conflicts_with = "generated")]
    data: Option<PathBuf>,
    /// Use drawn digits, which need no files and no network
    #[arg(long)]
    generated: bool,
    /// What to compare, with commas between; everything by default
    #[arg(long, value_enum, value_name = "SWEEPS", value_delimiter = ',')]
    sweep: Vec<Sweep>,
    /// Number of samples to train on
    #[arg(long, value_name = "N", default_value = "4000", value_parser = cli::positive)]
    train_size: usize,
    /// Number of trainings for each point, which differ in the adapters' values and the order of the samples
    #[arg(long, value_name = "N", default_value = "3", value_parser = cli::positive)]
    seeds: usize,
    #[command(flatten)]
    options: Options,
}

const ALPHA: &str = "Scale of the adapters at this rank: their update is multiplied by alpha/rank";
const LEARNING_RATE: &str = "Learning rate of full fine-tuning, which falls to zero along a cosine; by default \
                             one that suits the task";

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum TaskName {
    /// Rotated digits, as in the example mnist
    Digits,
    /// Generated sentences, as in the example text_classification
    Text,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Sweep {
    Rank,
    Scaling,
    Layers,
    Alpha,
    #[value(alias = "initialisation")]
    Initialization,
    SingularValues,
}

fn main() -> ExitCode {
    common::main(run)
}

fn run(args: Args) -> Result<()> {
    args.options.create_out()?;
    match args.task {
        TaskName::Digits => compare(&args, digits::task(&args)?),
        TaskName::Text => compare(&args, sentences::task(&args)?),
    }
}

/// Runs the sweeps that were asked for, and prints their tables at the end.
fn compare<M: Learns>(args: &Args, task: Task<M>) -> Result<()> {
    let options = &args.options;
    let start = Instant::now();
    let seeds = (0..args.seeds as u64).map(|index| options.seed + index).collect();
    let mut lab = Lab::new(task, seeds, options.workers(), options.rank, options.alpha);
    let task = &lab.task;
    let base_accuracy = lab.base_accuracy();
    println!(
        "\nThe base recognizes {base_accuracy:.2} % of the new task. Adapting on {} samples ({}), testing on \
         {}, with the {} backend. Trainings for each point: {}, of {} epochs.\n",
        grouped(task.train.len()),
        task.dataset,
        grouped(task.test.len()),
        backend::NAME,
        args.seeds,
        task.epochs,
    );
    let mut summary = json!({
        "task": args.task.to_possible_value().map(|it| it.get_name().to_owned()),
        "dataset": task.dataset,
        "seeds": args.seeds,
        "train_size": task.train.len(),
        "test_size": task.test.len(),
        "parameters": lab.base.num_params(),
        "base_accuracy_old": during("testing the base", || {
            let old = &task.old_test;
            (!old.is_empty()).then(|| accuracy(logits(&lab.base, old), old))
        }),
        "base_accuracy_new": base_accuracy,
    });

    let (full, tuned) = lab.full()?;
    let (mut reports, mut results, mut files) = (Vec::new(), Map::new(), Vec::new());
    let chosen = if args.sweep.is_empty() { Sweep::value_variants() } else { &args.sweep };
    for &sweep in chosen {
        let name = sweep.name();
        let figure = options.out.join(format!("{name}.svg"));
        let report = match sweep {
            Sweep::Rank => rank::run(&mut lab, &full, &figure)?,
            Sweep::Scaling => scaling::run(&mut lab, &full, &figure)?,
            Sweep::Layers => layers::run(&mut lab, &full, &figure)?,
            Sweep::Alpha => alpha::run(&mut lab, &full, &figure)?,
            Sweep::Initialization => initialization::run(&lab, &figure)?,
            Sweep::SingularValues => singular_values::run(&lab, &tuned[0], &figure)?,
        };
        results.insert(name, report.values);
        reports.push((report.title, report.table));
        files.push(figure);
    }
    let seconds = start.elapsed().as_secs_f64();
    for (title, table) in reports {
        println!("\n{title}\n\n{table}");
    }
    summary["full"] = json!(full);
    summary["sweeps"] = results.into();
    summary["seconds"] = json!(seconds);
    let path = options.write_summary(&summary)?;
    files.push(path);
    let files: Vec<_> = files.iter().map(|path| path.display().to_string()).collect();
    println!(
        "\nBehind a mean, the brackets have the lowest and the highest of {} trainings.",
        args.seeds
    );
    println!("The sweeps took {seconds:.0} s. Wrote {}", files.join(", "));
    Ok(())
}

impl Sweep {
    /// The name of its figure and of its part of the summary.
    fn name(self) -> String {
        let value = self.to_possible_value().expect("no sweep is hidden");
        value.get_name().replace('-', "_")
    }
}
