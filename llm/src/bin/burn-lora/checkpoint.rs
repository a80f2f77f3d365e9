//! What a training that was stopped goes on from.

use std::{
    fs,
    path::{Path, PathBuf},
};

use burn::{
    module::Module,
    optim::Optimizer,
    record::{FullPrecisionSettings, NamedMpkFileRecorder, Recorder},
};

use burn_lora_llm::{Context, Result};

use crate::{
    backend::Train,
    train::{History, Model},
};

type MessagePack = NamedMpkFileRecorder<FullPrecisionSettings>;

/// The number of checkpoints that are kept.
const KEPT: usize = 2;

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
        let text = |error: burn::record::RecorderError| error.to_string();
        Recorder::<Train>::record(&recorder, model.clone().into_record(), record("model"))
            .map_err(text)?;
        Recorder::<Train>::record(&recorder, optimizer.to_record(), record("optimizer"))
            .map_err(text)?;
        let history_text = serde_json::to_vec(history).map_err(|error| error.to_string())?;
        fs::write(record("history.json"), history_text).map_err(|error| error.to_string())?;
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

/// The model, the optimizer and the history of the last checkpoint in `dir`, or those that are given if
/// there is none.
///
/// # Errors
///
/// If it cannot be read, or is one of a model with other adapters.
pub fn load<O: Optimizer<Model, Train>>(
    dir: &Path,
    model: Model,
    optimizer: O,
) -> Result<(Model, O, History)> {
    let Some((_, last)) = all(dir)?.pop() else {
        return Ok((model, optimizer, History::default()));
    };
    let device = Default::default();
    let recorder = MessagePack::default();
    let read = |name: &str| last.join(name);
    let record = Recorder::<Train>::load(&recorder, read("model"), &device);
    let record = record.context(last.display())?;
    let model = model.try_load_record(record).context(last.display())?;
    let record = Recorder::<Train>::load(&recorder, read("optimizer"), &device);
    let optimizer = optimizer.load_record(record.context(last.display())?);
    let history = fs::read(read("history.json")).context(last.display())?;
    let history = serde_json::from_slice(&history).context(last.display())?;
    Ok((model, optimizer, history))
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
