//! Checkpoints that are written completely or not at all.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use burn::{
    record::{FileRecorder, Recorder, RecorderError},
    tensor::backend::Backend,
};
use serde::{Serialize, de::DeserializeOwned};

use super::message_pack;
use crate::files::{sync, unfinished_in};

/// A recorder that writes to a temporary file, and renames it when it is complete. If the run is killed
/// during a save, or the save fails, an existing file stays as it was. A run that is killed may leave a
/// hidden directory `.unfinished-*` next to the file.
///
/// It wraps one of Burn's file recorders. Use full precision for checkpoints: half precision cannot
/// represent the optimizer's second moments. Errors that Burn's recorder does not report are not
/// reported here either, such as a disk that is full when the last bytes are written.
///
/// ```
/// use burn::record::{FullPrecisionSettings, NamedMpkFileRecorder};
/// use burn_lora::train::{AtomicRecorder, last_checkpoint};
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
    /// A recorder that writes the file format of `inner`.
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
        let save = || {
            let io = |error: io::Error| RecorderError::Unknown(error.to_string());
            let directory = unfinished_in(file.parent().unwrap_or(&file)).map_err(io)?;
            let mut unfinished = directory.path().join(file.file_name().unwrap_or_default());
            self.inner.save_item(item, unfinished.clone())?;
            // As recorders do.
            unfinished.set_extension(R::file_extension());
            file.set_extension(R::file_extension());
            // Without `sync`, the new name could reach the disk before the content.
            sync(&unfinished).and_then(|()| fs::rename(&unfinished, &file)).map_err(io)
        };
        save().map_err(|error| RecorderError::Unknown(format!("{}: {error}", file.display())))
    }

    /// The errors name the file, and say if it is cut off.
    fn load_item<I: DeserializeOwned>(&self, file: &mut PathBuf) -> Result<I, RecorderError> {
        self.inner.load_item(file).map_err(|error| {
            // As recorders do.
            file.set_extension(R::file_extension());
            let told = |problem: String| match is_whole(file) {
                // Burn's own words are about records of its old versions.
                Ok(false) => format!("{}: it is cut off", file.display()),
                _ => format!("{}: {problem}", file.display()),
            };
            match error {
                RecorderError::FileNotFound(problem) => RecorderError::FileNotFound(told(problem)),
                RecorderError::DeserializeError(problem) => {
                    RecorderError::DeserializeError(told(problem))
                }
                RecorderError::Unknown(problem) => RecorderError::Unknown(told(problem)),
            }
        })
    }
}

/// The files that burn-train writes for an epoch.
const PARTS: [&str; 3] = ["model", "optim", "scheduler"];

/// The last epoch with a complete checkpoint in `directory`: the model, the optimizer and the learning
/// rate. `directory` is the one that was passed to burn-train's `SupervisedTraining::new`. The result is
/// `None` if the directory does not exist.
///
/// A run that is killed between two files, or while an [`AtomicRecorder`] writes a file, leaves an
/// incomplete checkpoint, which is ignored. So is one with a file that is cut off, as other recorders and full
/// disks leave them, so that it does not hide the whole one before it: an empty file, or an `.mpk` file that ends
/// early. Other formats tell this only when they are loaded.
///
/// # Errors
///
/// If the directory, or a file in it, exists and cannot be read.
pub fn last_checkpoint(directory: impl AsRef<Path>) -> io::Result<Option<usize>> {
    let files = match fs::read_dir(directory.as_ref().join("checkpoint")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        files => files?,
    };
    let mut found = BTreeMap::<usize, BTreeMap<&str, PathBuf>>::new();
    for file in files {
        let path = file?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let stem = name.split('.').next().unwrap_or_default();
        if let Some((part, epoch)) = stem.split_once('-')
            && let Some(part) = PARTS.into_iter().find(|it| *it == part)
            && let Ok(epoch) = epoch.parse()
        {
            found.entry(epoch).or_default().insert(part, path.clone());
        }
    }
    for (epoch, parts) in found.into_iter().rev() {
        let mut whole = parts.len() == PARTS.len();
        for path in parts.values() {
            whole = whole && is_whole(path)?;
        }
        if whole {
            return Ok(Some(epoch));
        }
    }
    Ok(None)
}

/// Whether the file is not cut off, as far as its format tells.
fn is_whole(path: &Path) -> io::Result<bool> {
    match path.extension().is_some_and(|it| it == "mpk") {
        true => message_pack::is_whole(path),
        false => Ok(fs::metadata(path)?.len() > 0),
    }
}
