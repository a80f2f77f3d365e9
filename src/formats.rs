//! The directory format in which Python's PEFT library stores adapters: `adapter_config.json` and
//! `adapter_model.safetensors`. And the files of image models, and of llama.cpp.

mod config;
mod directory;
mod find;
mod gguf;
mod image;
mod json;
mod keys;
mod mlx;
mod outgoing;
mod tensors;

use std::{fs, io::Read, path::Path};

use burn::tensor::backend::Backend;

use crate::{adapters::LoraAdapters, error::LoraError};
use config::PeftConfig;
use mlx::MlxConfig;

pub use gguf::Family;
pub use image::ImageFormat;

pub(crate) const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

/// The files that a set is read from.
pub(crate) const FILES: [&str; 3] = [CONFIG, WEIGHTS, mlx::WEIGHTS];

impl<B: Backend> LoraAdapters<B> {
    /// Reads a directory written by [`save`](Self::save), by Python's PEFT library, or by mlx-lm
    /// (`adapters.safetensors`).
    ///
    /// Supported are adapters of linear layers, embeddings and convolutions without groups, with
    /// `alpha/r` or rsLoRA scaling, rank and alpha patterns, `lora_bias`, `bias` and `modules_to_save`.
    /// Tensors in `f64`, `f32`, `f16` or `bf16` are converted to the backend's default type. All other
    /// fields of PEFT's configuration are kept, and saved again.
    ///
    /// Whether the adapter of an embedding also moves a head that is the same table is up to the field
    /// `ensure_weight_tying`; see [`LoraEmbedding::project`](crate::nn::LoraEmbedding::project). With
    /// `fan_in_fan_out`, a weight that was trained in full may be that of a `Conv1D` of Hugging Face's,
    /// `[d_input, d_output]`: the model's shapes tell, and a square weight is an error when the set is
    /// put on a model.
    ///
    /// # Errors
    ///
    /// If a file is missing, is malformed, or holds NaN or infinite values. If others save to `dir` so
    /// often that the two files of one set are never met. If the tensors are not
    /// exactly those that the configuration requires; the error lists all differences. If the
    /// configuration sets an unsupported field that would change the result, or has an expression that Python's `re`
    /// refuses or that is not supported here: a reference to a group, a condition, an atomic or a possessive group, a
    /// character by name, or one of the flags `a`, `L`, `m` and `x`.
    ///
    /// Whether every layer that the configuration targets has an adapter, and every module in `modules_to_save` its
    /// parameters, is known when the set is put on a model, and an error there. What PEFT does not use of a file is not
    /// used here: see [`unused`](Self::unused).
    pub fn load(dir: impl AsRef<Path>, device: &B::Device) -> Result<Self, LoraError> {
        let dir = dir.as_ref();
        let named = |name: &str| dir.join(name).display().to_string();
        let (config, weights, length) = directory::open(dir, |text| {
            let config = Config::parse(text, &named(CONFIG))?;
            let weights = config.weights();
            Ok((config, weights))
        })?;
        let file = named(config.weights());
        config.read(weights, length, &file, device)
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
        let config = Config::parse(config, CONFIG)?;
        let file = config.weights();
        config.read(weights, weights.len() as u64, file, device)
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
    /// The adapter of an embedding that was made here also updates a head that is the same table, so
    /// `ensure_weight_tying` is written. Adapters that started as a part of the weight
    /// ([`Init::Pissa`](crate::Init::Pissa)) are written with twice their rank, so that they fit the original
    /// base. Weights are written as PyTorch's `Linear` has them: in Python,
    /// transpose one that belongs to a `Conv1D`.
    ///
    /// A set that was put together by hand or read from a file of mlx-lm, and was on no model yet, must say what its
    /// adapters are for: see [`LoraAdapter::new`](crate::LoraAdapter::new).
    ///
    /// # Errors
    ///
    /// If something cannot be expressed in PEFT's format, or a file cannot be written. An existing
    /// directory then stays as it was. PEFT's format has nothing for adapters of convolutions with groups and of
    /// transposed ones, as [`parameters`](crate::LoraModule::parameters) tells before a training. The record of the
    /// adapted model holds them: Burn's `save_file` writes it, and a [`Lora::new`](crate::Lora::new) of the base reads it.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<(), LoraError> {
        let (set, dir) = (&self.standalone(), dir.as_ref());
        let config = config::write(set, &dir.join(CONFIG).display().to_string())?;
        directory::replace(dir, |unfinished| {
            fs::write(unfinished.join(CONFIG), &config)
                .map_err(|source| LoraError::Io { path: unfinished.join(CONFIG), source })?;
            tensors::write(set, &unfinished.join(WEIGHTS), &dir.join(WEIGHTS))
        })
    }

    /// Like [`save`](Self::save), but returns the contents of the two files, `adapter_config.json` and
    /// `adapter_model.safetensors`, which [`from_bytes`](Self::from_bytes) reads: for archives, databases and networks.
    ///
    /// ```
    /// # fn main() -> Result<(), burn_lora::LoraError> {
    /// use burn::{backend::Flex, tensor::Tensor};
    /// use burn_lora::{LoraAdapter, LoraAdapters, Scaling};
    ///
    /// let device = Default::default();
    /// let (a, b) = (Tensor::<Flex, 2>::ones([4, 2], &device), Tensor::ones([2, 3], &device));
    /// let adapter = LoraAdapter::new(a, b, 0.5, Scaling::Alpha).of_linear();
    /// let set = LoraAdapters::new([("fc", adapter)]);
    /// let (config, weights) = set.to_bytes()?;
    /// let again = LoraAdapters::<Flex>::from_bytes(&config, &weights, &device)?;
    /// assert_eq!(again.get("fc").unwrap().b.to_data(), set.get("fc").unwrap().b.to_data());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// If something cannot be expressed in PEFT's format, or is not finite.
    pub fn to_bytes(&self) -> Result<(Vec<u8>, Vec<u8>), LoraError> {
        let set = self.standalone();
        Ok((config::write(&set, CONFIG)?, tensors::to_bytes(&set, Path::new(WEIGHTS))?))
    }
}

/// The configuration of either format.
enum Config {
    Peft(Box<PeftConfig>),
    Mlx(MlxConfig),
}

impl Config {
    fn parse(text: &[u8], file: &str) -> Result<Self, LoraError> {
        find::check_start(text, file)?;
        // A byte-order mark is ignored.
        let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
        match mlx::parse(text, file) {
            Some(config) => config.map(Self::Mlx),
            None => config::parse(text, file).map(|config| Self::Peft(Box::new(config))),
        }
    }

    /// The name of the file of the tensors.
    fn weights(&self) -> &'static str {
        match self {
            Self::Peft(_) => WEIGHTS,
            Self::Mlx(_) => mlx::WEIGHTS,
        }
    }

    /// Reads the tensors from `length` bytes of `weights`.
    fn read<B: Backend>(
        self,
        mut weights: impl Read,
        length: u64,
        file: &str,
        device: &B::Device,
    ) -> Result<LoraAdapters<B>, LoraError> {
        let io = |source| LoraError::Io { path: file.into(), source };
        // The first bytes tell whether this is the file itself.
        let mut start = Vec::new();
        weights.by_ref().take(64).read_to_end(&mut start).map_err(io)?;
        find::check_tensors(&start, file)?;
        let weights = start.as_slice().chain(weights);
        match self {
            Self::Peft(config) => tensors::read(*config, weights, length, file, device),
            Self::Mlx(config) => mlx::read(config, weights, length, file, device),
        }
    }
}
