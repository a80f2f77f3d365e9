//! The directory format in which Python's PEFT library stores adapters: `adapter_config.json` and
//! `adapter_model.safetensors`.

mod config;
mod directory;
mod json;
mod keys;
mod tensors;

use std::{
    fs::{self, File},
    io::Read,
    path::Path,
};

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
    /// If a file is missing, is malformed, or holds NaN or infinite values. If the tensors are not
    /// exactly those that the configuration requires; the error lists all differences. If the
    /// configuration sets an unsupported field that would change the result.
    pub fn load(dir: impl AsRef<Path>, device: &B::Device) -> Result<Self, LoraError> {
        let dir = dir.as_ref();
        let (config_path, weights_path) = (dir.join(CONFIG), dir.join(WEIGHTS));
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| LoraError::Io { path, source }
        };
        let (mut file, _) = open(&config_path)?;
        let mut config = Vec::new();
        file.read_to_end(&mut config).map_err(io(&config_path))?;
        let (weights, length) = open(&weights_path)?;
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
    /// The directory is replaced in one step: if the process is interrupted, `dir` holds either the old
    /// adapters or the new ones. (There is an exception where the operating system cannot exchange two
    /// directories, as on Windows: for a moment `dir` does not exist, and the old directory is next to
    /// it.) Other files in `dir` are kept. It is an error if `dir` holds directories or links. An
    /// interrupted save may leave a hidden directory next to `dir`.
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
        directory::replace(dir, &[CONFIG, WEIGHTS], |unfinished| {
            fs::write(unfinished.join(CONFIG), &config)
                .map_err(|source| LoraError::Io { path: unfinished.join(CONFIG), source })?;
            tensors::write(self, &unfinished.join(WEIGHTS))
        })
    }
}

/// Opens a regular file, and returns its length. Other files, such as devices, may have no end.
fn open(path: &Path) -> Result<(File, u64), LoraError> {
    let io = |source| LoraError::Io { path: path.to_owned(), source };
    let metadata = fs::metadata(path).map_err(io)?;
    if !metadata.is_file() {
        let problem = "not a file".to_owned();
        return Err(LoraError::InvalidFile { file: path.display().to_string(), problem });
    }
    Ok((File::open(path).map_err(io)?, metadata.len()))
}
