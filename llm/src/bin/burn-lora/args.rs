//! The arguments of the commands.

use std::{net::IpAddr, path::PathBuf};

use burn::tensor::backend::Backend;
use burn_lora::quantize::Quantization;
use burn_lora_llm::{
    Result,
    cli::{self, quantize::Kind, relatives::Relative, replicas::MpiArg, workers::WorkersArg},
    llama::Llama,
    merged::{GgufKind, Precision},
};
use clap::{Parser, Subcommand};
use serde_json::{Value, json};

use crate::dtype::Dtype;

/// Fine-tune a language model of the Llama family with LoRA, evaluate it, let it answer, and merge the
/// adapters into its weights.
#[derive(Parser, Debug)]
#[command(
    name = "burn-lora",
    disable_version_flag = true,
    arg_required_else_help = true,
    args_conflicts_with_subcommands = true
)]
pub struct Args {
    /// Print the version
    #[arg(short = 'V', long)]
    pub version: bool,
    /// With --version: print the backend, and which instructions of the processor are used, too
    #[arg(short = 'v', long, requires = "version")]
    pub verbose: bool,
    /// None is given with `--version` alone.
    #[command(subcommand)]
    pub command: Option<Command>,
}

#[derive(Subcommand, Debug)]
pub enum Command {
    /// Train adapters
    Train(TrainArgs),
    /// Tell the perplexity on texts, with and without adapters
    Evaluate(EvaluateArgs),
    /// Answer a prompt, with each of the adapters in turn
    Generate(GenerateArgs),
    /// Write the model with adapters in its weights, as a Hugging Face directory or a GGUF file
    Merge(MergeArgs),
    /// Write adapters as a file for llama.cpp and Ollama, or as a directory for PEFT
    Export(ExportArgs),
    /// Answer over HTTP, in OpenAI's protocol, with many adapters at once
    Serve(ServeArgs),
}

/// The model that adapters are put on.
#[derive(Parser, Debug)]
pub struct BaseArgs {
    /// Directory with config.json, model.safetensors and tokenizer.json, or a GGUF file, whose 2 to 8 bits
    /// stay as they are; otherwise the Hugging Face cache, or a download of SmolLM2-135M-Instruct
    #[arg(long, value_name = "PATH")]
    pub model: Option<PathBuf>,
    /// Hold the linear layers in 16, 8 or 4 bits
    #[arg(long, alias = "quantise", value_name = "KIND")]
    pub quantize: Option<Kind>,
    /// Hold matrices that are bf16 or f16 in the file as they are, in half the memory of f32. A training with --quantize,
    /// or with products in bf16, does it anyway
    #[arg(long)]
    pub keep_16_bits: bool,
}

impl BaseArgs {
    /// What the linear layers are quantized to.
    pub fn quantization(&self) -> Option<Quantization> {
        self.quantize.map(Into::into)
    }
}

/// The length at which texts are cut off, in tokens.
pub const MAX_LENGTH: usize = 512;

/// The linear layers of each block.
const ALL_LINEAR: &str = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj";

#[derive(Parser, Debug)]
pub struct TrainArgs {
    #[command(flatten)]
    pub base: BaseArgs,
    /// Train a small model first, which knows some animals, and use that; it needs no files and no network
    #[arg(long, conflicts_with = "model")]
    pub generated: bool,
    /// Directory with train.jsonl and valid.jsonl, of lines with `messages`, or `prompt` and `completion`,
    /// or `text`; otherwise questions about animals, with polite answers
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Hold out this share of train.jsonl, drawn by a fixed seed, in the place of valid.jsonl
    #[arg(long, value_name = "SHARE", requires = "data", value_parser = share)]
    pub valid_share: Option<f64>,
    /// Directory with train.tsv, dev.tsv and test.tsv of SST-2, of which the model is asked: is this film
    /// review positive or negative?
    #[arg(long, value_name = "DIR", conflicts_with = "data")]
    pub sst2: Option<PathBuf>,
    /// Number of reviews of test.tsv to ask about, before and after the training; all by default
    #[arg(long, value_name = "N", requires = "sst2", value_parser = cli::positive)]
    pub questions: Option<usize>,
    /// Directory for the adapters, curves.svg, summary.json, the last two checkpoints, and what was
    /// generated
    #[arg(long, value_name = "DIR", default_value = "out/language_model")]
    pub out: PathBuf,
    /// Start from the adapters in this directory or GGUF file, with their ranks, alphas and layers
    #[arg(long, value_name = "PATH", conflicts_with_all = ["rank", "alpha", "targets", "relative", "full"])]
    pub adapter: Option<PathBuf>,
    /// Type of the numbers that are multiplied; sums, adapters and all that trains are f32. `auto` is bf16 for a model
    /// in bf16, if the processor has instructions that make it faster. A run that goes on keeps its type
    #[arg(long, value_name = "TYPE", default_value = "auto")]
    pub dtype: Dtype,
    /// Rank of the adapters
    #[arg(long, default_value = "8", value_parser = cli::positive)]
    pub rank: usize,
    /// Scale of the adapters: their update is multiplied by alpha/rank
    #[arg(long, default_value = "16", value_parser = cli::nonzero)]
    pub alpha: f64,
    /// Layers that get adapters; the default stands for all linear layers, whatever a model calls them
    #[arg(long, value_delimiter = ',', default_value = ALL_LINEAR)]
    pub targets: Vec<String>,
    /// Train with a relative of LoRA
    #[arg(long, value_name = "KIND")]
    pub relative: Option<Relative>,
    /// Train all weights instead of adapters, to compare; only curves and checkpoints are written
    #[arg(long, conflicts_with_all = ["relative", "quantize", "keep_16_bits"])]
    pub full: bool,
    /// Number of steps
    #[arg(long, default_value = "200", value_parser = cli::positive)]
    pub iters: usize,
    /// Number of texts of a batch
    #[arg(long, default_value = "4", value_parser = cli::positive)]
    pub batch: usize,
    /// Number of batches of a step
    #[arg(long, default_value = "1", value_parser = cli::positive)]
    pub accumulate: usize,
    /// Longer texts are cut off, in tokens; at most as many as the model can read. Those that then have nothing
    /// to learn are left out
    #[arg(long, value_name = "TOKENS", default_value_t = MAX_LENGTH, value_parser = cli::positive)]
    pub max_length: usize,
    /// Learning rate, which falls to zero along a cosine
    #[arg(long, value_name = "RATE", default_value = "0.0005", value_parser = cli::rate)]
    pub learning_rate: f64,
    /// Number of steps in which the learning rate grows to its full value
    #[arg(long, value_name = "STEPS", default_value = "10")]
    pub warmup: usize,
    /// Greatest norm of the gradient
    #[arg(long, value_name = "NORM", default_value = "1", value_parser = cli::nonzero)]
    pub clip: f64,
    /// Learn only the answers, not the prompts
    #[arg(long)]
    pub mask_prompt: bool,
    /// Put several short texts into one row, which do not see each other
    #[arg(long)]
    pub pack: bool,
    /// Compute each layer again in the backward pass: a tenth of the memory, for a third more time
    #[arg(long)]
    pub segments: bool,
    #[command(flatten)]
    pub workers: WorkersArg,
    #[command(flatten)]
    pub mpi: MpiArg,
    /// Number of steps between two evaluations
    #[arg(long, value_name = "STEPS", default_value = "50", value_parser = cli::positive)]
    pub eval_every: usize,
    /// Seed of the adapters and the order of the texts
    #[arg(long, default_value = "42")]
    pub seed: u64,
    /// Resume a run that was stopped, with the same arguments and the same --out; more --iters lengthen it
    #[arg(long)]
    pub resume: bool,
    /// Replace the result of an earlier run in --out
    #[arg(long, conflicts_with = "resume")]
    pub force: bool,
}

impl TrainArgs {
    /// The layers of this model that get adapters.
    pub fn targets_of<B: Backend>(&self, llama: &Llama<B>) -> Vec<String> {
        match self.targets.iter().eq(ALL_LINEAR.split(',')) {
            true => llama.linear_layers().into_iter().map(str::to_owned).collect(),
            false => self.targets.clone(),
        }
    }

    /// The fields of JSON that say what adapters are made: nothing of it, if there are some to start from.
    pub fn shape(&self) -> [(String, Value); 3] {
        let fields = [
            ("rank", json!(self.rank)),
            ("alpha", json!(self.alpha)),
            ("targets", json!(self.targets)),
        ];
        fields.map(|(name, value)| {
            (name.to_owned(), if self.adapter.is_some() { Value::Null } else { value })
        })
    }
}

#[derive(Parser, Debug)]
pub struct EvaluateArgs {
    #[command(flatten)]
    pub base: BaseArgs,
    /// Type of the numbers that are multiplied; bf16 is faster on some processors, and changes answers slightly
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    pub dtype: Dtype,
    /// File with a text, or a conversation, per line
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,
    /// Directory or GGUF file of adapters
    #[arg(long, value_name = "PATH")]
    pub adapter: Option<PathBuf>,
    /// Number of texts of a batch
    #[arg(long, default_value = "4", value_parser = cli::positive)]
    pub batch: usize,
    /// Longer texts are cut off, in tokens; at most as many as the model can read. By default as in the training of
    /// the adapters, and otherwise 512
    #[arg(long, value_name = "TOKENS", value_parser = cli::positive)]
    pub max_length: Option<usize>,
    /// Count only the answers, not the prompts; `--mask-prompt=false` counts both. By default as in the training of
    /// the adapters, and otherwise both
    #[arg(
        long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true"
    )]
    pub mask_prompt: Option<bool>,
    /// Also compute token by token, as answers are: what `generate` and `serve` do without --exact. Not on GPUs
    #[arg(long)]
    pub answers: bool,
}

#[derive(Parser, Debug)]
pub struct GenerateArgs {
    #[command(flatten)]
    pub base: BaseArgs,
    /// Type of the numbers that are multiplied; bf16 is faster on some processors, and changes answers slightly
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    pub dtype: Dtype,
    /// Directory or GGUF file of adapters; several are used one after the other
    #[arg(long, value_name = "PATH")]
    pub adapter: Vec<PathBuf>,
    /// What to answer
    #[arg(long)]
    pub prompt: String,
    /// Greatest number of tokens of the answer
    #[arg(long, value_name = "TOKENS", default_value = "200", value_parser = cli::positive)]
    pub max_tokens: usize,
    /// 0 takes the most probable token; higher values give others a greater chance
    #[arg(long, default_value = "0", value_parser = temperature)]
    pub temperature: f64,
    /// Take only the most probable tokens, as few as have this probability together
    #[arg(long, value_name = "P", default_value = "1", value_parser = cli::rate)]
    pub top_p: f64,
    /// Seed of the choices
    #[arg(long, default_value = "42")]
    pub seed: u64,
    #[command(flatten)]
    pub exact: ExactArgs,
}

/// How tokens of answers are multiplied.
#[derive(Parser, Debug)]
pub struct ExactArgs {
    /// Multiply in f32 with weights of 2 to 8 bits, and not in 8 bits, which is several times as fast and changes
    /// answers slightly. Other backends than flex and ndarray always do
    #[arg(long)]
    pub exact: bool,
}

#[derive(Parser, Debug)]
pub struct MergeArgs {
    #[command(flatten)]
    pub base: BaseArgs,
    /// Directory or GGUF file of adapters; otherwise the model is written as it is
    #[arg(long, value_name = "PATH")]
    pub adapter: Option<PathBuf>,
    /// Directory for the merged model, or a file whose name ends in .gguf, for llama.cpp and Ollama
    #[arg(long, value_name = "PATH")]
    pub out: PathBuf,
    /// Type of the merged weights in a directory; otherwise that of the base, and f16 for what has 2 to 8 bits there
    #[arg(long, value_name = "TYPE")]
    pub dtype: Option<Precision>,
    /// Type of the merged matrices in a GGUF file
    #[arg(long, value_name = "TYPE", default_value = "keep")]
    pub r#type: GgufKind,
    /// File with a text, or a conversation, per line, to tell the perplexity before and after weights are rounded
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// Overwrite a GGUF file, or a Modelfile, that this program has not written
    #[arg(long)]
    pub force: bool,
}

#[derive(Parser, Debug)]
pub struct ExportArgs {
    /// Directory or GGUF file of the model that the adapters are for; only the beginnings of its weights are read
    #[arg(long, value_name = "PATH")]
    pub model: Option<PathBuf>,
    /// Directory or GGUF file of adapters
    #[arg(long, value_name = "PATH")]
    pub adapter: PathBuf,
    /// File whose name ends in .gguf, for llama.cpp and Ollama, or a directory, for PEFT
    #[arg(long, value_name = "PATH")]
    pub out: PathBuf,
    /// Overwrite what is there, and was written by another program
    #[arg(long)]
    pub force: bool,
}

#[derive(Parser, Debug)]
pub struct ServeArgs {
    #[command(flatten)]
    pub base: BaseArgs,
    /// Type of the numbers that are multiplied; bf16 is faster on some processors, and changes answers slightly
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    pub dtype: Dtype,
    /// Directory with a directory of adapters for each name; they are loaded when they are asked for, and again
    /// when they change
    #[arg(long, value_name = "DIR")]
    pub adapters: Option<PathBuf>,
    /// Memory for adapters in MiB; those that were not asked for for the longest time go first
    #[arg(long, value_name = "MIB", default_value = "1024", value_parser = cli::positive)]
    pub adapter_memory: usize,
    /// Address to listen at; 0.0.0.0 lets other computers in
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub host: IpAddr,
    /// Port to listen at; 0 takes a free one
    #[arg(long, default_value = "8000")]
    pub port: u16,
    /// File with the token that clients must send; otherwise none is needed
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Greatest number of texts that are written at once
    #[arg(long, default_value = "32", value_parser = cli::positive)]
    pub batch: usize,
    /// Greatest number of requests that wait; more are refused
    #[arg(long, default_value = "256", value_parser = cli::positive)]
    pub queue: usize,
    /// Greatest number of tokens of an answer
    #[arg(long, value_name = "TOKENS", default_value = "1024", value_parser = cli::positive)]
    pub max_tokens: usize,
    /// Greatest number of tokens of a prompt and its answer; at most as many as the model can read
    #[arg(long, value_name = "TOKENS", default_value = "2048", value_parser = cli::positive)]
    pub max_length: usize,
    /// Memory in MiB for prompts that were read, so that others with the same adapters that begin like them need not be
    /// read from their beginning; those that were not used for the longest time go first
    #[arg(long, value_name = "MIB", default_value = "256")]
    pub prefix_memory: usize,
    #[command(flatten)]
    pub exact: ExactArgs,
}

/// Parses a share that leaves something.
fn share(text: &str) -> Result<f64> {
    match text.parse() {
        Ok(value) if value > 0.0 && value < 1.0 => Ok(value),
        _ => Err("a number between 0 and 1 is needed".to_owned()),
    }
}

/// Parses a temperature.
fn temperature(text: &str) -> Result<f64> {
    match text.parse() {
        Ok(value) if f64::is_finite(value) && value >= 0.0 => Ok(value),
        _ => Err("a finite number of at least 0 is needed".to_owned()),
    }
}
