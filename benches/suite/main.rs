//! What LoRA costs: passes, training steps, memory and adapters, each in turn with what it is compared
//! with. Prints tables in Markdown.
//!
//! ```text
//! cargo bench --bench suite --no-default-features --features flex
//! ```
//!
//! Names after `--` choose parts: `-- forward train_step text layers growth adapters files`. `--plot FILE`
//! draws the growth.

// Only a main function.
#![allow(missing_docs)]

mod adapters;
#[path = "../../examples/common/mod.rs"]
mod common;
mod files;
mod forward;
mod growth;
mod layers;
mod measure;
mod minilm;
mod models;
mod text;
mod train_step;

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use common::backend;
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
    /// Where to draw step time against rank, tokens and layers, as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Given by cargo, and without a meaning here
    #[arg(long, hide = true)]
    bench: bool,
}

/// A part's name, and what runs it.
type Part = (&'static str, fn(&Args));

const PARTS: [Part; 7] = [
    ("forward", |_| forward::run()),
    ("train_step", |_| train_step::run()),
    ("text", |_| text::run()),
    ("layers", |_| layers::run()),
    ("growth", |args| growth::run(args.plot.as_deref())),
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
