//! What a training that was stopped goes on from.

use std::{
    fmt::Display,
    fs,
    path::{Path, PathBuf},
};

use burn::{
    module::Module,
    optim::Optimizer,
    record::{FullPrecisionSettings, NamedMpkFileRecorder, Record, Recorder, RecorderError},
};

use burn_lora_llm::{Context, Result};

use crate::{
    backend::Train,
    train::{History, Model},
};

type MessagePack = NamedMpkFileRecorder<FullPrecisionSettings>;

/// The number of checkpoints that are kept.
const KEPT: usize = 2;

/// The files of a checkpoint. The first two get the ending of their format.
const MODEL: &str = "model";
const OPTIMIZER: &str = "optimizer";
const HISTORY: &str = "history.json";

/// The name of an unfinished checkpoint.
const UNFINISHED: &str = ".unfinished";

/// Writes a checkpoint to `dir`, and removes old ones. It is complete, or does not exist.
///
/// # Errors
///
/// If it cannot be written. Older checkpoints are then kept.
pub fn save<O: Optimizer<Model, Train>>(
    dir: &Path,
    model: &Model,
    optimizer: &O,
    history: &History,
) -> Result<()> {
    let unfinished = dir.join(UNFINISHED);
    let write = || {
        if unfinished.exists() {
            fs::remove_dir_all(&unfinished).map_err(|error| error.to_string())?;
        }
        fs::create_dir_all(&unfinished).map_err(|error| error.to_string())?;
        let record = |name: &str| unfinished.join(name);
        let recorder = MessagePack::default();
        let text = |error: RecorderError| error.to_string();
        Recorder::<Train>::record(&recorder, model.clone().into_record(), record(MODEL))
            .map_err(text)?;
        Recorder::<Train>::record(&recorder, optimizer.to_record(), record(OPTIMIZER))
            .map_err(text)?;
        let history_text = serde_json::to_vec(history).map_err(|error| error.to_string())?;
        fs::write(record(HISTORY), history_text).map_err(|error| error.to_string())?;
        let complete = dir.join(history.losses.len().to_string());
        if complete.exists() {
            fs::remove_dir_all(&complete).map_err(|error| error.to_string())?;
        }
        fs::rename(&unfinished, complete).map_err(|error| error.to_string())
    };
    write().map_err(|problem: String| format!("{}: {problem}", dir.display()))?;
    for (_, old) in all(dir)?.into_iter().rev().skip(KEPT) {
        fs::remove_dir_all(&old).context(old.display())?;
    }
    Ok(())
}

/// What a training goes on from.
pub struct Checkpoint<O> {
    pub model: Model,
    pub optimizer: O,
    pub history: History,
    /// Why later checkpoints were passed over.
    pub passed: Vec<String>,
}

impl<O> Checkpoint<O> {
    /// The beginning.
    pub fn begin(model: Model, optimizer: O) -> Self {
        Self { model, optimizer, history: History::default(), passed: Vec::new() }
    }
}

/// The last checkpoint in `dir` that can be read, or what is given if there is none.
///
/// # Errors
///
/// If there are checkpoints and none of them can be read, or if it is one of a model with other adapters.
pub fn load<O: Optimizer<Model, Train>>(
    dir: &Path,
    model: Model,
    optimizer: O,
) -> Result<Checkpoint<O>> {
    let mut passed = Vec::new();
    for (_, path) in all(dir)?.into_iter().rev() {
        match read(&path) {
            Ok((of_model, of_optimizer, history)) => {
                let model = model.try_load_record(of_model).context(path.display())?;
                let optimizer = optimizer.load_record(of_optimizer);
                return Ok(Checkpoint { model, optimizer, history, passed });
            }
            Err(problem) => passed.push(problem),
        }
    }
    match passed.is_empty() {
        true => Ok(Checkpoint::begin(model, optimizer)),
        false => Err(format!(
            "{}, and there is no other checkpoint; begin anew with --force",
            passed.join("; ")
        )),
    }
}

type ModelRecord = <Model as Module<Train>>::Record;

/// The parts of the checkpoint in `dir`.
fn read<R: Record<Train>>(dir: &Path) -> Result<(ModelRecord, R, History)> {
    let history = dir.join(HISTORY);
    let text = fs::read(&history).context(history.display())?;
    let history = serde_json::from_slice(&text).map_err(|error| cut(&history, error))?;
    Ok((record(dir.join(MODEL))?, record(dir.join(OPTIMIZER))?, history))
}

fn record<R: Record<Train>>(path: PathBuf) -> Result<R> {
    let file = path.with_extension("mpk");
    let read = || Recorder::<Train>::load(&MessagePack::default(), path, &Default::default());
    read().map_err(|error| match error {
        RecorderError::FileNotFound(problem) => format!("{}: {problem}", file.display()),
        RecorderError::DeserializeError(problem) | RecorderError::Unknown(problem) => {
            // More lines are about records of Burn's old versions.
            cut(&file, problem.lines().next().unwrap_or_default())
        }
    })
}

fn cut(file: &Path, error: impl Display) -> String {
    format!("{} is cut off or damaged ({error})", file.display())
}

/// All checkpoints, by the number of steps that were done.
fn all(dir: &Path) -> Result<Vec<(usize, PathBuf)>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.context(dir.display())?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.context(dir.display())?.path();
        let step = path.file_name().and_then(|it| it.to_str()).and_then(|it| it.parse().ok());
        found.extend(step.map(|step: usize| (step, path)));
    }
    found.sort();
    Ok(found)
}
