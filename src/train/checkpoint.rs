//! Checkpoints that are written completely or not at all.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use burn::{
    record::{FileRecorder, Recorder, RecorderError},
    tensor::backend::Backend,
};
use serde::{Serialize, de::DeserializeOwned};

use crate::files::sync;

/// A recorder that writes beside the file and renames when it is done. If a run is killed while it
/// writes, or a save fails, the old file stays, if there was one.
///
/// It wraps one of Burn's file recorders. Use full precision for checkpoints: half precision destroys the
/// optimizer's second moments. An error that Burn's recorder does not notice is not noticed here either,
/// such as a disk that is full when the last bytes are written.
///
/// ```
/// use burn::record::{FullPrecisionSettings, NamedMpkFileRecorder};
/// use burn_lora::{AtomicRecorder, last_checkpoint};
///
/// # let dir = std::path::Path::new("nowhere");
/// let recorder = AtomicRecorder::<NamedMpkFileRecorder<FullPrecisionSettings>>::default();
/// // training.with_file_checkpointer(recorder), and to go on where it ended:
/// if let Some(epoch) = last_checkpoint(dir).expect("the directory can be read") {
///     // training.checkpoint(epoch)
/// }
/// ```
#[derive(Clone, Debug, Default)]
pub struct AtomicRecorder<R> {
    inner: R,
}

impl<R> AtomicRecorder<R> {
    /// Writes as `inner` does.
    pub fn new(inner: R) -> Self {
        Self { inner }
    }
}

impl<B: Backend, R: FileRecorder<B>> FileRecorder<B> for AtomicRecorder<R> {
    fn file_extension() -> &'static str {
        R::file_extension()
    }
}

impl<B: Backend, R: FileRecorder<B>> Recorder<B> for AtomicRecorder<R> {
    type Settings = R::Settings;
    type RecordArgs = PathBuf;
    type RecordOutput = ();
    type LoadArgs = PathBuf;

    fn save_item<I: Serialize>(&self, item: I, mut file: PathBuf) -> Result<(), RecorderError> {
        // Recorders replace everything after the last dot, so the name must not contain one.
        let name = file.file_stem().unwrap_or_default().to_string_lossy().replace('.', "_");
        let mut unfinished = file.with_file_name(format!("{name}{UNFINISHED}"));
        let written = self.inner.save_item(item, unfinished.clone());
        file.set_extension(R::file_extension());
        unfinished.set_extension(R::file_extension());
        let moved = written.and_then(|()| {
            // Without this, the new name could reach the disk before the content.
            let moved = sync(&unfinished).and_then(|()| fs::rename(&unfinished, &file));
            moved.map_err(|error| RecorderError::Unknown(error.to_string()))
        });
        moved.map_err(|error| {
            // It may not even exist.
            let _ = fs::remove_file(&unfinished);
            RecorderError::Unknown(format!("{}: {error}", file.display()))
        })
    }

    fn load_item<I: DeserializeOwned>(&self, file: &mut PathBuf) -> Result<I, RecorderError> {
        self.inner.load_item(file)
    }
}

/// What is added to the name of a file that is not complete.
const UNFINISHED: &str = "~unfinished";

/// The files that burn-train writes for an epoch.
const PARTS: [&str; 3] = ["model", "optim", "scheduler"];

/// The last epoch of which `directory` has the whole checkpoint: the model, the optimizer and the
/// learning rate. `directory` is the one that burn-train's `SupervisedTraining::new` was given; one that
/// does not exist has none.
///
/// A run that is killed between two files, or in the middle of one that an [`AtomicRecorder`] writes,
/// leaves a checkpoint that is not whole: the one before it is found.
///
/// # Errors
///
/// If the directory is there and cannot be read.
pub fn last_checkpoint(directory: impl AsRef<Path>) -> io::Result<Option<usize>> {
    let files = match fs::read_dir(directory.as_ref().join("checkpoint")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        files => files?,
    };
    let mut found = BTreeMap::<usize, BTreeSet<&str>>::new();
    for file in files {
        let name = file?.file_name();
        let name = name.to_string_lossy();
        let stem = name.split('.').next().unwrap_or_default();
        if let Some((part, epoch)) = stem.split_once('-')
            && let Some(part) = PARTS.into_iter().find(|it| *it == part)
            && let Ok(epoch) = epoch.parse()
        {
            found.entry(epoch).or_default().insert(part);
        }
    }
    let whole = found.into_iter().rev().find(|(_, parts)| parts.len() == PARTS.len());
    Ok(whole.map(|(epoch, _)| epoch))
}
