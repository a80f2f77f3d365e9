//! The directory in which Python's PEFT library keeps adapters: `adapter_config.json` and
//! `adapter_model.safetensors`.

mod config;
mod directory;
mod json;
mod tensors;

use std::{fs, path::Path};

use burn::tensor::backend::Backend;

use crate::{LoraAdapters, LoraError};

pub(crate) use config::Targets;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

impl<B: Backend> LoraAdapters<B> {
    /// Reads a directory written by [`save`](Self::save), or by Python's PEFT library.
    ///
    /// Adapters of linear layers are read, with `alpha/r` and rsLoRA scaling, rank and alpha
    /// patterns, `lora_bias`, `bias` and `modules_to_save`, in `f32`, `f16` or `bf16`; they become
    /// the backend's default type. What the configuration says beyond that is kept, and saved again.
    ///
    /// # Errors
    ///
    /// If a file is missing, malformed, or holds NaN or infinite values; if the tensors are not
    /// exactly those that the configuration calls for, listing all that differ; or if the
    /// configuration has a field set that would change the result and is not supported.
    pub fn load(dir: impl AsRef<Path>, device: &B::Device) -> Result<Self, LoraError> {
        let dir = dir.as_ref();
        let (config, weights) = (read(&dir.join(CONFIG))?, read(&dir.join(WEIGHTS))?);
        Self::parse(&config, &weights, &dir.display().to_string(), device)
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
        Self::parse(config, weights, "", device)
    }

    fn parse(
        config: &[u8],
        weights: &[u8],
        dir: &str,
        device: &B::Device,
    ) -> Result<Self, LoraError> {
        let name = |file: &str| Path::new(dir).join(file).display().to_string();
        let (config_name, weights_name) = (name(CONFIG), name(WEIGHTS));
        let config = config::parse(config, &config_name)?;
        tensors::read(config, weights, &weights_name, device)
    }

    /// Writes the adapters as a directory that [`load`](Self::load) and Python's PEFT library read.
    ///
    /// The directory appears, or replaces the one that is there, as a whole: whenever the process
    /// is interrupted, the old adapters or the new ones are there. Other files in it are kept. An
    /// interrupted save may leave a hidden directory with a name that ends in `.tmp` beside it.
    ///
    /// PEFT knows the scaling rules `alpha/rank` and `alpha/√rank`, one for all adapters; other sets
    /// are written with the alphas that give the same scales by `alpha/rank`.
    ///
    /// # Errors
    ///
    /// If something cannot be expressed in PEFT's format, or a file cannot be written; what was
    /// there before stays.
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

/// Reads a regular file. Anything else, such as a device, could go on forever.
fn read(path: &Path) -> Result<Vec<u8>, LoraError> {
    let io = |source| LoraError::Io { path: path.to_owned(), source };
    if !fs::metadata(path).map_err(io)?.is_file() {
        let problem = "not a file".to_owned();
        return Err(LoraError::InvalidFile { file: path.display().to_string(), problem });
    }
    fs::read(path).map_err(io)
}
