//! What LoRA costs: passes, training steps, memory and adapters, each in turn with what it is compared
//! with. Prints tables in Markdown.
//!
//! ```text
//! cargo bench --bench suite --no-default-features --features flex
//! ```
//!
//! Names after `--` choose parts: `-- forward train_step text methods quantized mixed workers layers
//! growth adapters files`. `--plots DIR` draws the growth and the workers.

// Only a main function.
#![allow(missing_docs)]

mod adapters;
mod files;
mod forward;
mod growth;
mod methods;
mod mixed;
mod quantized;
mod workers;

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use common::{
    backend,
    benches::{layers, measure, text, train_step},
};
use mimalloc::MiMalloc;

/// Keeps the memory of large tensors, which every training step asks for again.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Measures what LoRA costs.
#[derive(Parser)]
struct Args {
    /// The parts to run; all of them by default
    #[arg(value_parser = PARTS.map(|(name, _)| name))]
    parts: Vec<String>,
    /// Where to draw step time against rank, tokens and layers, and speed against workers: the directory of
    /// growth.svg and workers.svg
    #[arg(long, value_name = "DIR")]
    plots: Option<PathBuf>,
    /// Given by cargo, and without a meaning here
    #[arg(long, hide = true)]
    bench: bool,
}

impl Args {
    /// Where to draw a figure.
    fn plot(&self, file: &str) -> Option<PathBuf> {
        self.plots.as_ref().map(|dir| dir.join(file))
    }
}

/// A part's name, and what runs it.
type Part = (&'static str, fn(&Args));

const PARTS: [Part; 11] = [
    ("forward", |_| forward::run()),
    ("train_step", |_| train_step::run()),
    ("text", |_| text::run()),
    ("methods", |_| methods::run()),
    ("quantized", |_| quantized::run()),
    ("mixed", |_| mixed::run()),
    ("workers", |args| workers::run(args.plot("workers.svg").as_deref())),
    ("layers", |_| layers::run()),
    ("growth", |args| growth::run(args.plot("growth.svg").as_deref())),
    ("adapters", |_| adapters::run()),
    ("files", |_| files::run()),
];

fn main() -> ExitCode {
    let args = Args::parse();
    if let Err(error) = backend::check() {
        eprintln!("error: {error}");
        return ExitCode::FAILURE;
    }
    println!("{}\n", measure::machine());
    for (name, part) in PARTS {
        if args.parts.is_empty() || args.parts.iter().any(|chosen| chosen == name) {
            part(&args);
        }
    }
    ExitCode::SUCCESS
}
