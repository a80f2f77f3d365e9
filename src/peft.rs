//! The directory in which Python's PEFT library keeps adapters: `adapter_config.json` and
//! `adapter_model.safetensors`.

mod config;
mod directory;
mod json;
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
    /// The directory appears, or replaces the one that is there, as a whole: whenever the process
    /// is interrupted, the old adapters or the new ones are there. (Where the operating system cannot
    /// exchange two directories, on Windows for one, there is a moment with neither in its place, and
    /// the old ones beside it.) Other files in it are kept; a directory that holds directories or
    /// links is refused. An interrupted save may leave a hidden directory beside it.
    ///
    /// PEFT knows the scaling rules `alpha/rank` and `alpha/√rank`, one for all adapters; other sets
    /// are written with the alphas that give the same scales by `alpha/rank`. Of dropout it knows one
    /// probability: the largest is written.
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

/// Opens a regular file, and tells its length. Anything else, such as a device, could go on forever.
fn open(path: &Path) -> Result<(File, u64), LoraError> {
    let io = |source| LoraError::Io { path: path.to_owned(), source };
    let metadata = fs::metadata(path).map_err(io)?;
    if !metadata.is_file() {
        let problem = "not a file".to_owned();
        return Err(LoraError::InvalidFile { file: path.display().to_string(), problem });
    }
    Ok((File::open(path).map_err(io)?, metadata.len()))
}
