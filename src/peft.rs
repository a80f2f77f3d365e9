//! The directory format in which Python's PEFT library stores adapters: `adapter_config.json` and
//! `adapter_model.safetensors`.

mod config;
mod directory;
mod json;
mod keys;
mod tensors;

use std::{fs, io::Read, path::Path};

use burn::tensor::backend::Backend;

use crate::{adapters::LoraAdapters, error::LoraError};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

impl<B: Backend> LoraAdapters<B> {
    /// Reads a directory written by [`save`](Self::save), or by Python's PEFT library.
    ///
    /// Supported are adapters of linear layers, embeddings and convolutions without groups, with
    /// `alpha/r` or rsLoRA scaling, rank and alpha patterns, `lora_bias`, `bias` and `modules_to_save`.
    /// Tensors in `f32`, `f16` or `bf16` are converted to the backend's default type. All other fields
    /// of the configuration are kept, and saved again.
    ///
    /// # Errors
    ///
    /// If a file is missing, is malformed, or holds NaN or infinite values. If others save to `dir` so
    /// often that the two files of one set are never met. If the tensors are not
    /// exactly those that the configuration requires; the error lists all differences. If the
    /// configuration sets an unsupported field that would change the result.
    pub fn load(dir: impl AsRef<Path>, device: &B::Device) -> Result<Self, LoraError> {
        let dir = dir.as_ref();
        let (config_path, weights_path) = (dir.join(CONFIG), dir.join(WEIGHTS));
        let [(mut file, _), (weights, length)] = directory::open(dir)?;
        let mut config = Vec::new();
        file.read_to_end(&mut config)
            .map_err(|source| LoraError::Io { path: config_path.clone(), source })?;
        let config = config::parse(&config, &config_path.display().to_string())?;
        tensors::read(config, weights, length, &weights_path.display().to_string(), device)
    }

    /// Like [`load`](Self::load), from the contents of the two files.
    ///
    /// # Errors
    ///
    /// As for `load`.
    pub fn from_bytes(
        config: &[u8],
        weights: &[u8],
        device: &B::Device,
    ) -> Result<Self, LoraError> {
        let config = config::parse(config, CONFIG)?;
        tensors::read(config, weights, weights.len() as u64, WEIGHTS, device)
    }

    /// Writes the adapters as a directory that [`load`](Self::load) and Python's PEFT library read.
    ///
    /// Other files in `dir` are kept, and `dir` keeps its mode and owner. On Linux and macOS the whole
    /// directory is replaced in one step: if the process is killed, `dir` holds either the old adapters
    /// or the new ones. Some directories cannot be replaced: mount points, the current directory, those
    /// with directories or links in them, those of which the parent cannot be written. There, and on
    /// other systems, the two files are replaced one after the other. A process that is killed in these
    /// microseconds leaves no configuration in `dir`; the missing files are then in a hidden directory
    /// `.unfinished-*` in `dir`. A killed save may also leave such a directory in `dir` or next to it.
    ///
    /// Several threads or processes may save to `dir` and load from it at once: [`load`](Self::load)
    /// returns one of the sets. (Where the operating system cannot lock directories, such as on Windows,
    /// only one at a time may save.)
    ///
    /// PEFT has one scaling rule for all adapters of a directory, `alpha/rank` or `alpha/√rank`. Other
    /// sets are written with `alpha/rank`, and with the alphas that give the same scales. PEFT has one
    /// dropout probability for all adapters: the largest one is written.
    ///
    /// # Errors
    ///
    /// If something cannot be expressed in PEFT's format, or a file cannot be written. An existing
    /// directory then stays as it was.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<(), LoraError> {
        let dir = dir.as_ref();
        let config = config::write(self, &dir.join(CONFIG).display().to_string())?;
        directory::replace(dir, |unfinished| {
            fs::write(unfinished.join(CONFIG), &config)
                .map_err(|source| LoraError::Io { path: unfinished.join(CONFIG), source })?;
            tensors::write(self, &unfinished.join(WEIGHTS))
        })
    }
}
