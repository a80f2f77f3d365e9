//! What the examples share: the backend, data, training with progress, and reports.

pub mod backend;
pub mod benches;
pub mod classifier;
pub mod digits;
pub mod experiment;
pub mod grammar;
pub mod mlp;
pub mod progress;
pub mod recognizer;
pub mod resume;
pub mod speech;
pub mod tensors;
pub mod text;

use std::process::ExitCode;

use clap::Parser;

pub use burn_lora_llm::{Context, Result, cli};

/// Parses the arguments, checks the backend and runs the example. Wrong arguments end it with one line
/// and exit code 2. Any other error ends it with one line and exit code 1.
pub fn main<A: Parser>(run: impl FnOnce(A) -> Result<()>) -> ExitCode {
    cli::main(backend::NAME, backend::check, run)
}
