//! The options that the examples share, and what follows from them.

use std::{fs, path::PathBuf};

use burn_lora::{LoraConfig, nn::Precision};
use burn_lora_llm::{
    Context, Result,
    cli::{self, workers::WorkersArg},
};
use clap::{Arg, Args, ValueEnum};
use serde::Serialize;

use crate::{backend, classifier::Recipe};

/// The options of an experiment. Examples with other defaults or another help set them with [`default`] and
/// [`help`]: `#[command(mut_arg("rank", default("6")))]`.
#[derive(Args, Clone, Debug, Serialize)]
pub struct Options {
    /// Rank of the adapters
    #[arg(long, default_value = "8", value_parser = cli::positive)]
    pub rank: usize,
    /// Scale of the adapters: their update is multiplied by alpha/rank
    #[arg(long, default_value = "16", value_parser = cli::nonzero)]
    pub alpha: f64,
    /// Learning rate of the base and of full fine-tuning, which falls to zero along a cosine
    #[arg(long, value_name = "RATE", default_value = "0.001", value_parser = cli::rate)]
    pub learning_rate: f64,
    /// Learning rate of LoRA
    #[arg(long, value_name = "RATE", default_value = "0.005", value_parser = cli::rate)]
    pub lora_learning_rate: f64,
    /// Passes over the training images, for each training
    #[arg(long, default_value = "4", value_parser = cli::positive)]
    pub epochs: usize,
    /// The type of the numbers that layers multiply in training, on the CPU backends flex and ndarray
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    dtype: Dtype,
    #[command(flatten)]
    #[serde(skip)]
    workers: WorkersArg,
    /// Seed of weights, adapters, shuffling and generated digits
    #[arg(long, default_value = "42")]
    pub seed: u64,
    /// Directory for curves.svg, summary.json, the adapters and burn-train's logs
    #[arg(long, value_name = "DIR", default_value = "out")]
    #[serde(skip)]
    pub out: PathBuf,
}

/// The type of the numbers that layers multiply.
#[derive(Clone, Copy, Debug, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
enum Dtype {
    /// Single precision.
    F32,
    /// The upper half of single precision.
    Bf16,
}

/// Sets the default of an option.
pub fn default(value: &'static str) -> impl FnOnce(Arg) -> Arg {
    move |option| option.default_value(value)
}

/// Sets the default of an option whose help tells the default in words: `value` if another option `other` has the
/// value `equals`, and `otherwise` if not.
pub fn default_if(
    other: &'static str,
    equals: &'static str,
    value: &'static str,
    otherwise: &'static str,
) -> impl FnOnce(Arg) -> Arg {
    move |option| {
        let option = option.default_value_if(other, equals, value).default_value(otherwise);
        option.hide_default_value(true)
    }
}

/// Sets the help of an option.
pub fn help(text: &'static str) -> impl FnOnce(Arg) -> Arg {
    move |option| option.help(text)
}

impl Options {
    /// Creates the directory of the results. Fails if the backend has no products in bf16, and they are asked for.
    pub fn create_out(&self) -> Result<()> {
        if matches!(self.dtype, Dtype::Bf16) && !backend::ON_CPU {
            return Err(format!("`--dtype bf16` cannot be used on the backend {}", backend::NAME));
        }
        fs::create_dir_all(&self.out).context(self.out.display())
    }

    /// The adapters of this rank and scale, on all layers.
    pub fn config(&self) -> LoraConfig {
        LoraConfig::peft(self.rank, self.alpha).with_seed(self.seed)
    }

    /// The number of threads that share a step.
    pub fn workers(&self) -> usize {
        self.workers.count(backend::cores())
    }

    /// The precision of the products of layers, in trainings.
    pub fn precision(&self) -> Precision {
        match self.dtype {
            Dtype::F32 => Precision::F32,
            Dtype::Bf16 => Precision::Bf16,
        }
    }

    /// A training of this name, without checkpoints.
    pub fn recipe<'a>(&self, name: &'a str, learning_rate: f64) -> Recipe<'a> {
        Recipe {
            name,
            learning_rate,
            epochs: self.epochs,
            seed: self.seed,
            lora_plus: 1.0,
            precision: self.precision(),
            workers: self.workers(),
            start: None,
            logs: self.out.join("logs"),
        }
    }

    /// The figure of the losses and accuracies.
    pub fn curves(&self) -> PathBuf {
        self.out.join("curves.svg")
    }

    /// The directory of the adapters.
    pub fn adapters(&self) -> PathBuf {
        self.out.join("adapters")
    }

    /// Writes `summary.json`: the backend, these options, and what is the example's own.
    pub fn write_summary(&self, own: &impl Serialize) -> Result<PathBuf> {
        #[derive(Serialize)]
        struct Summary<'a, T> {
            backend: &'static str,
            #[serde(flatten)]
            options: &'a Options,
            #[serde(flatten)]
            own: &'a T,
        }
        cli::write_summary(&self.out, &Summary { backend: backend::NAME, options: self, own })
    }
}
