//! Fine-tunes a language model with LoRA, evaluates it, lets it answer, and merges the adapters into its
//! weights.
//!
//! ```text
//! alias lm='cargo run --release --example language_model --no-default-features --features flex,text --'
//! lm train --model MODEL --data DATA --out out/language_model
//! lm evaluate --model MODEL --data DATA/test.jsonl --adapter out/language_model/adapter
//! lm generate --model MODEL --adapter out/language_model/adapter --prompt "What is LoRA?"
//! lm merge --model MODEL --adapter out/language_model/adapter --out merged
//! ```
//!
//! `MODEL` is a directory in Hugging Face's format of a model of the Llama family, or a GGUF file, and
//! `DATA` holds `train.jsonl` and `valid.jsonl`. Start reading with [`llama`], which is the model, and [`train`].

mod chat;
mod checkpoint;
#[path = "../common/mod.rs"]
mod common;
mod config;
mod data;
mod generate;
mod gguf;
mod gguf_model;
mod gguf_tokens;
mod llama;
mod loss;
mod merged;
mod pretrained;
mod reviews;
#[cfg(test)]
mod tests;
mod train;

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use burn::{module::AutodiffModule, tensor::backend::Backend};
use burn_lora::{LoraAdapters, LoraConfig, LoraModule};
use clap::{Parser, Subcommand};
use mimalloc::MiMalloc;
use plotters::chart::SeriesLabelPosition;
use rand::{SeedableRng, rngs::StdRng};
use serde_json::json;

use chat::Chat;
use common::{
    Context, Result, arguments,
    backend::{self, Plain, Train},
    download::write_atomically,
    live::during,
    plot::{Panel, draw},
};
use data::{Reading, Text};
use generate::{Sampling, generate};
use llama::Llama;
use train::{ADAPTER, CHECKPOINTS, History, Recipe};

/// Reuses the memory of large tensors: every training step allocates them again.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Fine-tune a language model of the Llama family with LoRA, evaluate it, let it answer, and merge the
/// adapters into its weights.
#[derive(Parser, Debug)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Train adapters
    Train(TrainArgs),
    /// Tell the perplexity on texts, with and without adapters
    Evaluate(EvaluateArgs),
    /// Answer a prompt, with each of the adapters in turn
    Generate(GenerateArgs),
    /// Write the model with adapters in its weights, as a Hugging Face directory
    Merge(MergeArgs),
}

/// The number of reviews to evaluate on during a training.
const WATCHED: usize = 64;

/// The linear layers of each block.
const ALL_LINEAR: &str = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj";

#[derive(Parser, Debug)]
struct TrainArgs {
    /// Directory with config.json, model.safetensors and tokenizer.json, or a GGUF file
    #[arg(long, value_name = "PATH")]
    model: PathBuf,
    /// Directory with train.jsonl and valid.jsonl, of lines with `messages`, or `prompt` and `completion`,
    /// or `text`
    #[arg(long, value_name = "DIR", required_unless_present = "sst2")]
    data: Option<PathBuf>,
    /// Directory with train.tsv, dev.tsv and test.tsv of SST-2, of which the model is asked: is this film
    /// review positive or negative?
    #[arg(long, value_name = "DIR", conflicts_with = "data")]
    sst2: Option<PathBuf>,
    /// Directory for the adapters, curves.svg, summary.json and the last two checkpoints
    #[arg(long, value_name = "DIR", default_value = "out/language_model")]
    out: PathBuf,
    /// Rank of the adapters
    #[arg(long, default_value = "8", value_parser = common::positive)]
    rank: usize,
    /// Scale of the adapters: their update is multiplied by alpha/rank
    #[arg(long, default_value = "16", value_parser = common::nonzero)]
    alpha: f64,
    /// Layers that get adapters
    #[arg(long, value_delimiter = ',', default_value = ALL_LINEAR)]
    targets: Vec<String>,
    /// Number of steps
    #[arg(long, default_value = "200", value_parser = common::positive)]
    iters: usize,
    /// Number of texts of a batch
    #[arg(long, default_value = "4", value_parser = common::positive)]
    batch: usize,
    /// Number of batches of a step
    #[arg(long, default_value = "1", value_parser = common::positive)]
    accumulate: usize,
    /// Longer texts are cut off, in tokens
    #[arg(long, value_name = "TOKENS", default_value = "512", value_parser = common::positive)]
    max_length: usize,
    /// Learning rate, which falls to zero along a cosine
    #[arg(long, value_name = "RATE", default_value = "0.0005", value_parser = common::rate)]
    learning_rate: f64,
    /// Number of steps in which the learning rate grows to its full value
    #[arg(long, value_name = "STEPS", default_value = "10")]
    warmup: usize,
    /// Greatest norm of the gradient
    #[arg(long, value_name = "NORM", default_value = "1", value_parser = common::nonzero)]
    clip: f64,
    /// Learn only the answers, not the prompts
    #[arg(long)]
    mask_prompt: bool,
    /// Put several short texts into one row, which do not see each other
    #[arg(long)]
    pack: bool,
    /// Number of steps between two evaluations
    #[arg(long, value_name = "STEPS", default_value = "50", value_parser = common::positive)]
    eval_every: usize,
    /// Seed of the adapters and the order of the texts
    #[arg(long, default_value = "42")]
    seed: u64,
    /// Resume a run that was stopped, with the same arguments and the same --out
    #[arg(long)]
    resume: bool,
}

#[derive(Parser, Debug)]
struct EvaluateArgs {
    /// Directory with config.json, model.safetensors and tokenizer.json, or a GGUF file
    #[arg(long, value_name = "PATH")]
    model: PathBuf,
    /// File with a text, or a conversation, per line
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Directory of adapters
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Number of texts of a batch
    #[arg(long, default_value = "4", value_parser = common::positive)]
    batch: usize,
    /// Longer texts are cut off, in tokens
    #[arg(long, value_name = "TOKENS", default_value = "512", value_parser = common::positive)]
    max_length: usize,
    /// Count only the answers, not the prompts
    #[arg(long)]
    mask_prompt: bool,
}

#[derive(Parser, Debug)]
struct GenerateArgs {
    /// Directory with config.json, model.safetensors and tokenizer.json, or a GGUF file
    #[arg(long, value_name = "PATH")]
    model: PathBuf,
    /// Directory of adapters; several are used one after the other
    #[arg(long, value_name = "DIR")]
    adapter: Vec<PathBuf>,
    /// What to answer
    #[arg(long)]
    prompt: String,
    /// Greatest number of tokens of the answer
    #[arg(long, value_name = "TOKENS", default_value = "200", value_parser = common::positive)]
    max_tokens: usize,
    /// 0 takes the most probable token; higher values give others a greater chance
    #[arg(long, default_value = "0", value_parser = temperature)]
    temperature: f64,
    /// Take only the most probable tokens, as few as have this probability together
    #[arg(long, value_name = "P", default_value = "1", value_parser = common::rate)]
    top_p: f64,
    /// Seed of the choices
    #[arg(long, default_value = "42")]
    seed: u64,
}

#[derive(Parser, Debug)]
struct MergeArgs {
    /// Directory with config.json, model.safetensors and tokenizer.json, or a GGUF file
    #[arg(long, value_name = "PATH")]
    model: PathBuf,
    /// Directory of adapters
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// Directory for the merged model
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

fn main() -> ExitCode {
    common::main(|args: Args| match args.command {
        Command::Train(args) => run_train(&args),
        Command::Evaluate(args) => run_evaluate(&args),
        Command::Generate(args) => run_generate(&args),
        Command::Merge(args) => run_merge(&args),
    })
}

/// Parses a temperature.
fn temperature(text: &str) -> Result<f64> {
    match text.parse() {
        Ok(value) if f64::is_finite(value) && value >= 0.0 => Ok(value),
        _ => Err("a finite number of at least 0 is needed".to_owned()),
    }
}

/// The model and its tokens.
fn read<B: Backend>(dir: &Path, device: &B::Device) -> Result<(Llama<B>, Chat)> {
    let start = Instant::now();
    let chat = Chat::read(dir)?;
    let doing = format!("reading {}", dir.display());
    let loaded = during(&doing, || pretrained::load::<B>(dir, device))?;
    if let Some(stored) = loaded.converted {
        println!("The weights are {stored} in the file, and F32 here.");
    }
    let size = loaded.llama.parameters().total;
    let millions = size as f64 / 1e6;
    println!("{millions:.1} million parameters, read in {:.1} s", start.elapsed().as_secs_f64());
    Ok((loaded.llama, chat))
}

fn adapters(dir: &Path) -> Result<LoraAdapters<Plain>> {
    LoraAdapters::load(dir, &Default::default()).map_err(|error| error.to_string())
}

fn run_train(args: &TrainArgs) -> Result<()> {
    let device = Default::default();
    let arguments = json!({
        "model": args.model, "data": args.data, "sst2": args.sst2, "rank": args.rank, "alpha": args.alpha,
        "targets": args.targets, "iters": args.iters, "batch": args.batch,
        "accumulate": args.accumulate, "max_length": args.max_length,
        "learning_rate": args.learning_rate, "warmup": args.warmup, "clip": args.clip,
        "mask_prompt": args.mask_prompt, "pack": args.pack, "eval_every": args.eval_every,
        "seed": args.seed, "backend": backend::NAME,
    });
    match args.resume {
        true => arguments::resume(&args.out, &arguments)?,
        false => arguments::begin(&args.out, CHECKPOINTS, &arguments)?,
    }
    let (llama, chat) = read::<Train>(&args.model, &device)?;
    let reading = Reading { max_length: args.max_length, mask_prompt: args.mask_prompt };
    let (texts, valid) = texts(args, &chat, &reading)?;
    let questions = match &args.sst2 {
        Some(dir) => reviews::questions(&dir.join("test.tsv"), &chat)?,
        None => Vec::new(),
    };
    let config =
        LoraConfig::peft(args.rank, args.alpha).with_targets(&args.targets).with_seed(args.seed);
    let model = llama.attach(&config).map_err(|error| error.to_string())?;
    let parameters = model.parameters();
    println!(
        "{} texts to learn, {} to evaluate; {} of {} parameters train ({:.2} %); {}",
        texts.len(),
        valid.len(),
        parameters.trainable,
        parameters.total,
        100.0 * parameters.trainable as f64 / parameters.total as f64,
        backend::NAME,
    );
    let recipe = Recipe {
        iters: args.iters,
        batch: args.batch,
        accumulate: args.accumulate,
        learning_rate: args.learning_rate,
        warmup: args.warmup.min(args.iters - 1),
        clip: args.clip,
        pack: args.pack.then_some(args.max_length),
        eval_every: args.eval_every,
        seed: args.seed,
    };
    let stop = Arc::new(AtomicBool::new(false));
    let stopper = stop.clone();
    let again = "a second Ctrl-C ends without a checkpoint";
    ctrlc::set_handler(move || {
        if stopper.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("The training stops after this step; {again}.");
    })
    .context("Ctrl-C")?;
    let ask = |llama: &Llama<Plain>| {
        let doing = format!("asking about {} reviews", questions.len());
        during(&doing, || reviews::accuracy(llama, &chat, &questions, &device))
    };
    let mut accuracies = Vec::new();
    if args.sst2.is_some() {
        accuracies.push(ask(&model.valid())?);
        println!("before the training, {:.1} % of the answers are right", accuracies[0]);
    }
    let (model, history) = train::train(model, &texts, &valid, &recipe, &args.out, &stop)?;
    if args.sst2.is_some() {
        accuracies.push(ask(&model.valid())?);
    }
    report(args, &history, &accuracies)
}

/// The texts to learn from, and those to evaluate on.
fn texts(args: &TrainArgs, chat: &Chat, reading: &Reading) -> Result<(Vec<Text>, Vec<Text>)> {
    if let Some(dir) = &args.sst2 {
        // As many as are learnt from, and some to watch.
        let count = args.iters * args.batch * args.accumulate;
        let train = reviews::texts(&dir.join("train.tsv"), count, chat, reading)?;
        return Ok((train, reviews::texts(&dir.join("dev.tsv"), WATCHED, chat, reading)?));
    }
    let dir = args.data.as_ref().expect("clap requires one of the two");
    let read = |name: &str| data::read(&dir.join(name), chat, reading);
    Ok((read("train.jsonl")?, read("valid.jsonl")?))
}

fn report(args: &TrainArgs, history: &History, accuracies: &[f64]) -> Result<()> {
    let adapter = args.out.join(ADAPTER);
    let steps = |losses: &[f64]| {
        losses.iter().enumerate().map(|(step, &loss)| ((step + 1) as f64, loss)).collect()
    };
    let valid = history.valid.iter().map(|&(step, loss)| (step as f64, loss)).collect();
    let panel = Panel {
        title: "loss per token",
        x: "step",
        y: "loss",
        curves: vec![("training", steps(&history.losses)), ("validation", valid)],
        marks: false,
        from_zero: false,
        legend: SeriesLabelPosition::UpperRight,
    };
    let curves = args.out.join("curves.svg");
    draw(&curves, &[panel])?;

    let (first, last) = (history.valid[0].1, history.valid[history.valid.len() - 1].1);
    let speed = history.tokens as f64 / history.seconds;
    let size = common::size_of_files(&adapter)?;
    println!();
    println!("perplexity before  {:10.2}", first.exp());
    println!("perplexity after   {:10.2}", last.exp());
    if let [before, after] = accuracies {
        println!("accuracy before    {before:10.2} %");
        println!("accuracy after     {after:10.2} %");
    }
    println!("tokens per second  {speed:10.0}");
    println!("adapter            {size:10} bytes");
    if let Some(bytes) = peak_memory() {
        println!("peak memory        {:10.0} MiB", bytes as f64 / f64::from(1 << 20));
    }
    if history.losses.len() < args.iters {
        println!("Stopped early. The same command with --resume goes on.");
    }
    println!("Adapters: {}. Curves: {}.", adapter.display(), curves.display());
    let summary = json!({
        "backend": backend::NAME,
        "rank": args.rank,
        "alpha": args.alpha,
        "targets": args.targets,
        "perplexity_before": first.exp(),
        "perplexity_after": last.exp(),
        "accuracies": accuracies,
        "tokens_per_second": speed,
        "peak_memory": peak_memory(),
        "history": history,
    });
    let path = args.out.join("summary.json");
    let summary = serde_json::to_vec_pretty(&summary).context(path.display())?;
    write_atomically(&path, &summary).context(path.display())
}

/// The most memory that the program had at once, in bytes, where the system tells it.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(1024 * kibibytes)
}

fn run_evaluate(args: &EvaluateArgs) -> Result<()> {
    let device = Default::default();
    let (llama, chat) = read::<Plain>(&args.model, &device)?;
    let reading = Reading { max_length: args.max_length, mask_prompt: args.mask_prompt };
    let texts = data::read(&args.data, &chat, &reading)?;
    let told = |name: &str, llama: &Llama<Plain>| {
        let doing = format!("evaluating {name} on {} texts", texts.len());
        let loss = during(&doing, || loss::evaluate(llama, &texts, args.batch, &device));
        println!("{name:<24} loss {loss:.4}  perplexity {:.3}", loss.exp());
    };
    told("base", &llama);
    if let Some(dir) = &args.adapter {
        let adapted = llama.switch(&adapters(dir)?).map_err(|error| error.to_string())?;
        told(&dir.display().to_string(), &adapted);
    }
    Ok(())
}

fn run_generate(args: &GenerateArgs) -> Result<()> {
    let device = Default::default();
    let sets = args.adapter.iter().map(|dir| adapters(dir)).collect::<Result<Vec<_>>>()?;
    let (llama, chat) = read::<Plain>(&args.model, &device)?;
    let prompt = chat.prompt(&args.prompt)?;
    let sampling = Sampling { temperature: args.temperature, top_p: args.top_p };
    let answer = |llama: &Llama<Plain>| {
        let mut rng = StdRng::seed_from_u64(args.seed);
        let start = Instant::now();
        let show = |text: &str| {
            print!("{text}");
            // Nothing can be done about a closed pipe.
            let _ = std::io::stdout().flush();
        };
        let new = generate(llama, &chat, &prompt, args.max_tokens, sampling, &mut rng, show)?;
        let speed = new.len() as f64 / start.elapsed().as_secs_f64();
        println!("\n[{} tokens, {speed:.1} per second]", new.len());
        Ok::<_, String>(())
    };
    if sets.is_empty() {
        return answer(&llama);
    }
    let mut adapted = llama.switch(&sets[0]).map_err(|error| error.to_string())?;
    for (dir, set) in args.adapter.iter().zip(&sets) {
        let start = Instant::now();
        adapted = adapted.switch(set).map_err(|error| error.to_string())?;
        let millis = 1000.0 * start.elapsed().as_secs_f64();
        println!("== {} (switched to in {millis:.2} ms)", dir.display());
        answer(&adapted)?;
    }
    Ok(())
}

fn run_merge(args: &MergeArgs) -> Result<()> {
    let set = adapters(&args.adapter)?;
    let (llama, chat) = read::<Plain>(&args.model, &Default::default())?;
    let adapted = llama.switch(&set).map_err(|error| error.to_string())?;
    let merged = adapted.merge().map_err(|error| error.to_string())?;
    merged::save(&merged, &chat, &args.model, &args.out)?;
    println!("The merged model is in {}.", args.out.display());
    Ok(())
}
