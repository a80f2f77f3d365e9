//! The directory of a run: what is in it, and whether a run may begin or go on there.

use std::{fs, path::Path};

use burn_lora_llm::{Context, Result, cli::arguments};
use clap::ValueEnum;
use serde_json::Value;

use crate::{
    dtype::Dtype,
    train::{ADAPTER, CHECKPOINTS},
};

/// Files that a run leaves in the end.
pub const CURVES: &str = "curves.svg";
pub const SUMMARY: &str = "summary.json";

/// Arguments that may be greater when a run is resumed, which makes it longer.
const GROWING: [&str; 1] = ["iters"];

/// What is read from files, and must not have changed when a run is resumed.
const FINGERPRINTS: &str = "fingerprints";

/// In which type a run multiplies.
pub const DTYPE: &str = "dtype";

/// The number of reviews that a run learns from.
const REVIEWS: &str = "reviews";

/// How a run begins.
#[derive(Clone, Copy, PartialEq)]
pub enum Start {
    /// Where there is no result.
    New,
    /// In the place of another result.
    Force,
    /// From the last checkpoint.
    Resume,
}

/// Fails if the run may not begin so in `out`. Nothing is changed.
///
/// # Errors
///
/// If there is a result that would be lost, or nothing to resume, or a run with other arguments.
pub fn check(out: &Path, start: Start, arguments: &Value) -> Result<()> {
    match start {
        Start::Resume => arguments::resume(out, arguments, &GROWING),
        Start::Force => Ok(()),
        Start::New => {
            let names = [ADAPTER, CHECKPOINTS, SUMMARY];
            match names.iter().map(|name| out.join(name)).find(|path| path.exists()) {
                Some(path) => Err(format!(
                    "{}: there is the result of an earlier run; go on with --resume, replace it with --force, or \
                     write to another --out",
                    path.display()
                )),
                None => Ok(()),
            }
        }
    }
}

/// Adds to the arguments how many reviews the run learns from, and returns that: as many as its steps take. A run that
/// goes on, though longer, keeps the number that it began with, so that all are seen equally often.
///
/// # Errors
///
/// If the arguments of the run that goes on cannot be read.
pub fn reviews(out: &Path, start: Start, arguments: &mut Value) -> Result<usize> {
    let before = if start == Start::Resume { arguments::read(out)? } else { Value::Null };
    let count = before[REVIEWS].as_u64().unwrap_or_else(|| {
        // Runs of the first version did not write it down.
        let of = if before.is_null() { &*arguments } else { &before };
        let factors = ["iters", "batch", "accumulate"];
        factors.iter().map(|name| of[name].as_u64().unwrap_or(1)).product()
    });
    arguments[REVIEWS] = count.into();
    Ok(count as usize)
}

/// In which type to multiply where `given` is asked for. A run that goes on keeps the type that it began with, whatever
/// `auto` would be now.
///
/// # Errors
///
/// If it is asked to go on with another, or its arguments cannot be read.
pub fn dtype(out: &Path, start: Start, given: Dtype) -> Result<Dtype> {
    if start != Start::Resume {
        return Ok(given);
    }
    let before = arguments::read(out)?;
    let then = match before[DTYPE].as_str() {
        Some(then) => Dtype::from_str(then, false).context(out.display())?,
        // Runs of the first version multiplied in f32, and did not write it down.
        None if given == Dtype::Auto => Dtype::F32,
        None => given,
    };
    match given == Dtype::Auto || given == then {
        true => Ok(then),
        false => Err(format!(
            "{}: `{DTYPE}` was {then}, and is {given} now; resume with --dtype {then}",
            out.display()
        )),
    }
}

/// Fails if files have changed since the run in `out` began. Those of a run that has no fingerprints are not compared.
///
/// # Errors
///
/// If one has.
pub fn check_files(out: &Path, fingerprints: &[(String, String)]) -> Result<()> {
    let before = arguments::read(out)?;
    for (file, now) in fingerprints {
        if before[FINGERPRINTS][file].as_str().is_some_and(|then| then != now) {
            return Err(format!(
                "{file} has changed since the run in {} began; resume with what it was, or begin anew with --force",
                out.display()
            ));
        }
    }
    Ok(())
}

/// Writes down with which arguments and files the run in `out` begins or goes on. What an earlier run left there is
/// removed when another begins.
///
/// # Errors
///
/// If a file cannot be written or removed.
pub fn begin(
    out: &Path,
    start: Start,
    arguments: &Value,
    fingerprints: &[(String, String)],
) -> Result<()> {
    if start != Start::Resume {
        forget(out)?;
    }
    let mut arguments = arguments.clone();
    arguments[FINGERPRINTS] = fingerprints.iter().cloned().collect();
    arguments::write(out, &arguments)
}

/// Removes what an earlier run left in `out`, but for what was generated.
///
/// # Errors
///
/// If it cannot be removed.
pub fn forget(out: &Path) -> Result<()> {
    for name in [ADAPTER, CHECKPOINTS] {
        arguments::forget(out, name)?;
    }
    for path in [CURVES, SUMMARY].map(|name| out.join(name)) {
        if path.exists() {
            fs::remove_file(&path).context(path.display())?;
        }
    }
    Ok(())
}
