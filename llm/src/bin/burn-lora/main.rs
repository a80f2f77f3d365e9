//! Fine-tunes a language model with LoRA, evaluates it, lets it answer, merges the adapters into its
//! weights, and serves many of them at once.
//!
//! ```text
//! burn-lora train --model MODEL --data DATA --out out/language_model
//! burn-lora evaluate --model MODEL --data DATA/test.jsonl --adapter out/language_model/adapter
//! burn-lora generate --model MODEL --adapter out/language_model/adapter --prompt "What is LoRA?"
//! burn-lora merge --model MODEL --adapter out/language_model/adapter --out merged
//! burn-lora export --model MODEL --adapter out/language_model/adapter --out adapter.gguf # for llama.cpp
//! burn-lora serve --model MODEL --adapters out/language_model # the model `adapter`
//! ```
//!
//! Without files and network, `train --generated` makes a small model for itself, in
//! `out/language_model/model`.
//!
//! `MODEL` is a directory in Hugging Face's format of a model of the Llama family, or a GGUF file, and
//! `DATA` holds `train.jsonl` and `valid.jsonl`. Start reading with [`burn_lora_llm::llama`], which is the
//! model, and [`train`].

mod args;
mod backend;
mod base;
mod checkpoint;
mod dtype;
mod export;
mod generated;
mod memory;
mod merge;
mod modelfile;
mod remembered;
mod report;
mod results;
mod reviews;
mod serve;
mod target;
#[cfg(test)]
mod tests;
mod texts;
mod train;
mod training;
mod version;

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use burn::tensor::backend::Backend;
use burn_lora::{LoraAdapters, LoraModule, nn::Precision};
use burn_lora_llm::{
    Result,
    chat::Chat,
    cli::{self, hub, live::during},
    config::LlamaConfig,
    data::{self, Reading},
    files::is_gguf,
    generate::{Options, Sampling, generate},
    llama::Llama,
    loss,
    pretrained::{self, Holding},
};
use mimalloc::MiMalloc;
use rand::{SeedableRng, rngs::StdRng};

use args::{Args, BaseArgs, Command, EvaluateArgs, GenerateArgs, MAX_LENGTH, ServeArgs};
use backend::Plain;
use base::Base;
use dtype::{Chosen, Dtype};
use remembered::Remembered;

/// Reuses the memory of large tensors: every training step allocates them again.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// The model that is used when none is given.
const SMOLLM2: hub::Model = hub::Model {
    name: "HuggingFaceTB/SmolLM2-135M-Instruct",
    files: &[
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
    ],
};

/// What adapters of language models are for, in PEFT's files.
const TASK: &str = "CAUSAL_LM";

fn main() -> ExitCode {
    // The version is told without a driver.
    cli::main(backend::NAME, || Ok(()), run)
}

fn run(args: Args) -> Result<()> {
    let Some(command) = args.command else { return version::print(args.verbose) };
    backend::check()?;
    match command {
        Command::Train(args) => args.mpi.run(|replicas| training::run(&args, replicas)),
        Command::Evaluate(args) => run_evaluate(&args),
        Command::Generate(args) => run_generate(&args),
        Command::Merge(args) => merge::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Serve(args) => run_serve(&args),
    }
}

/// The model that the user gave, or the usual one.
fn find(given: &Option<PathBuf>) -> Result<PathBuf> {
    given.clone().map_or_else(|| SMOLLM2.find(), Ok)
}

/// The model, with its weights held so.
fn read<B: Backend>(path: &Path, holding: Holding, device: &B::Device) -> Result<Llama<B>> {
    let start = Instant::now();
    let doing = format!("reading {}", path.display());
    let loaded = during(&doing, || pretrained::load_held::<B>(path, holding, device))?;
    let (llama, stored) = (loaded.llama, loaded.stored.unwrap_or("F32".to_owned()));
    let few_bits = quantized_bytes(&llama) - loaded.bytes_in_16_bits;
    let [few_bits, halves] = [few_bits, loaded.bytes_in_16_bits]
        .map(|bytes| (bytes > 0).then(|| format!("{:.1} MB", bytes as f64 / 1e6)));
    let held = match (few_bits, halves) {
        (None, None) if stored == "F32" => None,
        (None, None) => Some(", and F32 here".to_owned()),
        (Some(few), None) => Some(format!("; {few} are held in 2 to 8 bits here")),
        (None, Some(halves)) => Some(format!("; {halves} are held in 16 bits here")),
        (Some(few), Some(halves)) => {
            Some(format!("; {few} are held in 2 to 8 bits here, and {halves} in 16"))
        }
    };
    held.into_iter().for_each(|held| println!("The weights are {stored} in the file{held}."));
    let millions = llama.parameters().total as f64 / 1e6;
    println!("{millions:.1} million parameters, read in {:.1} s", start.elapsed().as_secs_f64());
    Ok(llama)
}

/// The model to answer with, which multiplies in this type.
fn read_to_use(path: &Path, base: &BaseArgs, dtype: Dtype) -> Result<Llama<Plain>> {
    let Chosen { precision, note } = dtype.choose(path)?;
    note.into_iter().for_each(|note| println!("{note}"));
    let keep_16_bits = base.keep_16_bits || precision == Precision::Bf16;
    let holding = Holding { quantize: base.quantization(), keep_16_bits };
    Ok(read(path, holding, &Default::default())?.with_precision(precision))
}

/// The bytes of the weights that are quantized.
fn quantized_bytes<B: Backend>(llama: &Llama<B>) -> usize {
    let report = llama.parameters();
    report.layers.iter().map(|it| it.quantized_bytes).sum()
}

/// How texts are read. None is longer than those that the model learned to read.
fn reading(max_length: usize, mask_prompt: bool, config: &LlamaConfig) -> Reading {
    Reading { max_length: max_length.min(config.max_position_embeddings), mask_prompt }
}

/// Hexadecimal digits that distinguish what was hashed from others.
fn hex(hash: &[u8]) -> String {
    hash.iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// Adapters of a directory, or of a file of llama.cpp's.
fn load(path: &Path, base: &Base) -> Result<LoraAdapters<Plain>> {
    let device = Default::default();
    let (set, program) = match path.is_file() && is_gguf(path) {
        true => (LoraAdapters::load_gguf(path, &base.family()?, &device), "llama.cpp"),
        false => (LoraAdapters::load(path, &device), "PEFT"),
    };
    let set = set.map_err(|error| error.to_string())?;
    for key in set.unused() {
        eprintln!("{}: `{}` is not used, as in {program}", path.display(), key.escape_debug());
    }
    Ok(set)
}

/// Adapters, and what is remembered of their training. If they are those of another base, or of another way to write
/// conversations, a warning is printed.
fn adapters(
    dir: &Path,
    base: &Base,
    chat: &Chat,
) -> Result<(LoraAdapters<Plain>, Option<Remembered>)> {
    // Adapters can be used without it, as those of PEFT are.
    let (set, remembered) = (load(dir, base)?, Remembered::read(dir));
    let unreadable = remembered.as_ref().err().cloned();
    let remembered = remembered.ok().flatten();
    let other = base.other(dir, &set, remembered.as_ref());
    let template = remembered.as_ref().and_then(|it| it.other_template(dir, chat));
    for problem in unreadable.into_iter().chain(other).chain(template) {
        eprintln!("warning: {problem}");
    }
    Ok((set, remembered))
}

/// The texts that are computed at once as answers are.
const ANSWERS: usize = 16;

fn run_evaluate(args: &EvaluateArgs) -> Result<()> {
    let device = Default::default();
    let path = find(&args.base.model)?;
    let (chat, base) = (Chat::read(&path)?, Base::of(&path)?);
    let adapter =
        args.adapter.as_ref().map(|dir| Ok::<_, String>((dir, adapters(dir, &base, &chat)?)));
    let adapter = adapter.transpose()?;
    let remembered = adapter.as_ref().and_then(|(_, (_, remembered))| remembered.as_ref());
    let max_length = args.max_length.or(remembered.map(|it| it.max_length)).unwrap_or(MAX_LENGTH);
    let mask_prompt = args.mask_prompt.or(remembered.map(|it| it.mask_prompt)).unwrap_or_default();
    let reading = reading(max_length, mask_prompt, &pretrained::config(&path)?);
    if let (Some((dir, _)), Some(_)) = (&adapter, remembered) {
        let mut as_there = Vec::new();
        if args.mask_prompt.is_none() {
            as_there.push(format!("--mask-prompt={mask_prompt}"));
        }
        if args.max_length.is_none() {
            as_there.push(format!("--max-length {max_length}"));
        }
        if !as_there.is_empty() {
            println!("As in the training of {}: {}", dir.display(), as_there.join(" "));
        }
    }
    let read_texts = data::read(&args.data, &chat, &reading)?;
    texts::tell(&args.data, &read_texts, max_length, &reading);
    let texts = read_texts.texts;
    let llama = read_to_use(&path, &args.base, args.dtype)?;
    let told = |name: &str, llama: &Llama<Plain>| {
        let doing = format!("evaluating {name} on {} texts", texts.len());
        let loss = during(&doing, || loss::evaluate(llama, &texts, args.batch, &device));
        println!("{name:<24} loss {loss:.4}  perplexity {:.3}", loss.exp());
        if !args.answers {
            return Ok(());
        }
        let compute = || loss::evaluate_answers(llama, &texts, ANSWERS, false);
        let none = || "--answers: this backend computes answers as `evaluate` does".to_owned();
        let loss = during(&format!("{doing}, as it answers"), compute).ok_or_else(none)?;
        println!("{:<24} loss {loss:.4}  perplexity {:.3}", "  as it answers", loss.exp());
        Ok::<_, String>(())
    };
    told("base", &llama)?;
    if let Some((dir, (set, _))) = &adapter {
        let adapted = llama.switch(set).map_err(|error| error.to_string())?;
        told(&dir.display().to_string(), &adapted)?;
    }
    Ok(())
}

fn run_generate(args: &GenerateArgs) -> Result<()> {
    let path = find(&args.base.model)?;
    let (chat, base) = (Chat::read(&path)?, Base::of(&path)?);
    let prompt = chat.prompt(&args.prompt)?;
    let room = room(&prompt, &pretrained::config(&path)?)?;
    let sets = args.adapter.iter().map(|dir| Ok(adapters(dir, &base, &chat)?.0));
    let sets = sets.collect::<Result<Vec<_>>>()?;
    let llama = read_to_use(&path, &args.base, args.dtype)?;
    let sampling = Sampling { temperature: args.temperature, top_p: args.top_p };
    let answer = |llama: &Llama<Plain>| {
        let mut rng = StdRng::seed_from_u64(args.seed);
        let start = Instant::now();
        let show = |text: &str| {
            print!("{text}");
            // Nothing can be done about a closed pipe.
            let _ = std::io::stdout().flush();
        };
        let limit = args.max_tokens.min(room);
        let options = Options { limit, sampling, exact: args.exact.exact };
        let new = generate(llama, &chat, &prompt, options, &mut rng, show)?;
        let speed = new.len() as f64 / start.elapsed().as_secs_f64();
        let end = match new.len() == room {
            true => format!("; the context of {} is full", room + prompt.len()),
            false => String::new(),
        };
        println!("\n[{} tokens, {speed:.1} per second{end}]", new.len());
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

/// How many tokens fit after the prompt into what the model can read.
fn room(prompt: &[u32], config: &LlamaConfig) -> Result<usize> {
    let (length, most) = (prompt.len(), config.max_position_embeddings);
    match most.saturating_sub(length) {
        0 => Err(format!(
            "the prompt has {length} tokens, and with its answer it may have at most {most}, which is what the \
             model can read"
        )),
        room => Ok(room),
    }
}

fn run_serve(args: &ServeArgs) -> Result<()> {
    args.adapters.as_deref().map_or(Ok(()), serve::check)?;
    let path = find(&args.base.model)?;
    let (chat, base) = (Chat::read(&path)?, Base::of(&path)?);
    let llama = read_to_use(&path, &args.base, args.dtype)?;
    serve::serve(args, llama, chat, base)
}
