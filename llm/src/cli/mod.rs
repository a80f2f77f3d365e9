//! What programs with arguments need: parsing them, progress, figures, downloads, and reports.
//!
//! The program `burn-lora` and the examples of burn-lora share it.

pub mod arguments;
pub mod backend;
pub mod download;
pub mod hub;
pub mod live;
pub mod plot;
pub mod quantize;
pub mod relatives;
pub mod replicas;
pub mod workers;

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Parser, error::ErrorKind};
use serde::Serialize;

use crate::{Context, Result};

/// What clap calls a program that needs arguments and has none. It prints the help then.
const NO_ARGUMENTS: ErrorKind = ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;

/// Parses the arguments, checks the backend of this name and runs the program. Wrong arguments end it with one
/// line and exit code 2. Without any, a program that needs some prints its help, with the same exit code. Any other
/// error ends it with one line and exit code 1.
pub fn main<A: Parser>(
    backend: &str,
    check: impl FnOnce() -> Result<()>,
    run: impl FnOnce(A) -> Result<()>,
) -> ExitCode {
    let backend = format!(
        "Backend: {backend}, chosen when the program was built (`--no-default-features --features BACKEND`)"
    );
    let matches = A::command().after_help(backend).try_get_matches();
    let args = match matches.and_then(|matches| A::from_arg_matches(&matches)) {
        Ok(args) => args,
        Err(error) if !error.use_stderr() || error.kind() == NO_ARGUMENTS => error.exit(),
        Err(error) => {
            eprintln!("{}", one_line(&error.to_string()));
            return ExitCode::from(2);
        }
    };
    match check().and_then(|()| run(args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// clap's message, its suggestions and the usage, which are paragraphs of one or more lines.
fn one_line(text: &str) -> String {
    let paragraphs = text.trim().split("\n\n");
    let paragraphs = paragraphs.map(|it| it.lines().map(str::trim).collect::<Vec<_>>().join(" "));
    paragraphs.collect::<Vec<_>>().join("; ")
}

/// Parses a learning rate.
pub fn rate(text: &str) -> Result<f64> {
    match text.parse() {
        Ok(value) if value > 0.0 && value <= 1.0 => Ok(value),
        _ => Err("a number above 0 and at most 1 is needed".to_owned()),
    }
}

/// Parses a number that must be finite and not 0.
pub fn nonzero(text: &str) -> Result<f64> {
    match text.parse() {
        Ok(value) if f64::is_finite(value) && value != 0.0 => Ok(value),
        _ => Err("a finite number other than 0 is needed".to_owned()),
    }
}

/// Parses a finite number of at least 1.
pub fn at_least_one(text: &str) -> Result<f64> {
    match text.parse() {
        Ok(value) if f64::is_finite(value) && value >= 1.0 => Ok(value),
        _ => Err("a finite number of at least 1 is needed".to_owned()),
    }
}

/// Parses a whole number of at least 1.
pub fn positive(text: &str) -> Result<usize> {
    match text.parse() {
        Ok(value) if value > 0 => Ok(value),
        _ => Err("a whole number of at least 1 is needed".to_owned()),
    }
}

/// The name as that of a file or directory.
pub fn file_name(name: &str) -> String {
    name.replace([' ', ':', ','], "-")
}

/// Writes `summary.json` into the directory, and returns its path.
pub fn write_summary(dir: &Path, summary: &impl Serialize) -> Result<PathBuf> {
    let path = dir.join("summary.json");
    let json = serde_json::to_string_pretty(summary).context(path.display())?;
    fs::write(&path, json + "\n").context(path.display())?;
    Ok(path)
}

/// The sum of the sizes of a directory's files.
pub fn size_of_files(dir: &Path) -> Result<u64> {
    let files = fs::read_dir(dir).context(dir.display())?;
    let sizes = files.map(|file| Ok(file?.metadata()?.len()));
    sizes.sum::<std::io::Result<u64>>().context(dir.display())
}
