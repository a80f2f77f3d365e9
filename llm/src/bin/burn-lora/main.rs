//! Fine-tunes a language model with LoRA, evaluates it, lets it answer, merges the adapters into its
//! weights, and serves many of them at once.
//!
//! ```text
//! burn-lora train --model MODEL --data DATA --out out/language_model
//! burn-lora evaluate --model MODEL --data DATA/test.jsonl --adapter out/language_model/adapter
//! burn-lora generate --model MODEL --adapter out/language_model/adapter --prompt "What is LoRA?"
//! burn-lora merge --model MODEL --adapter out/language_model/adapter --out merged
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
mod checkpoint;
mod generated;
mod report;
mod reviews;
mod serve;
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
use burn_lora::{
    Lora, LoraAdapters, LoraConfig, LoraModule, quantize::Quantization, train::Replicas,
};
use burn_lora_llm::{
    Context, Result,
    chat::Chat,
    cli::{self, arguments, hub, live::during, relatives::Relative, replicas::Counted},
    data::{self, Batch, Reading, Text, pack},
    generate::{Sampling, generate},
    llama::Llama,
    loss, merged, pretrained,
};
use mimalloc::MiMalloc;
use rand::{SeedableRng, rngs::StdRng};
use serde_json::json;

use args::{Args, Command, EvaluateArgs, GenerateArgs, MergeArgs, ServeArgs, TrainArgs};
use backend::{Plain, Train};
use report::report;
use train::{CHECKPOINTS, Recipe};

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

/// Directories of what was generated, in that of the run.
const MODEL: &str = "model";
const DATA: &str = "data";

/// The number of reviews to evaluate on during a training.
const WATCHED: usize = 64;

/// The number of texts that EVA sees.
const SEEN: usize = 512;

fn main() -> ExitCode {
    cli::main(backend::NAME, backend::check, |args: Args| match args.command {
        Command::Train(args) => args.mpi.run(|replicas| run_train(&args, replicas)),
        Command::Evaluate(args) => run_evaluate(&args),
        Command::Generate(args) => run_generate(&args),
        Command::Merge(args) => run_merge(&args),
        Command::Serve(args) => run_serve(&args),
    })
}

/// The model that the user gave, or the usual one.
fn find(given: &Option<PathBuf>) -> Result<PathBuf> {
    given.clone().map_or_else(|| SMOLLM2.find(), Ok)
}

/// The model and its tokens.
fn read<B: Backend>(
    dir: &Path,
    quantize: Option<Quantization>,
    device: &B::Device,
) -> Result<(Llama<B>, Chat)> {
    let start = Instant::now();
    let doing = format!("reading {}", dir.display());
    let (llama, chat, stored) = during(&doing, || read_silently::<B>(dir, quantize, device))?;
    match quantized_bytes(&llama) {
        0 if stored == "F32" => {}
        0 => println!("The weights are {stored} in the file, and F32 here."),
        bytes => println!(
            "The weights are {stored} in the file; {:.1} MB are held in 4 or 8 bits here.",
            bytes as f64 / 1e6
        ),
    }
    let millions = llama.parameters().total as f64 / 1e6;
    println!("{millions:.1} million parameters, read in {:.1} s", start.elapsed().as_secs_f64());
    Ok((llama, chat))
}

/// The same without a word, and how the weights are stored.
fn read_silently<B: Backend>(
    dir: &Path,
    quantize: Option<Quantization>,
    device: &B::Device,
) -> Result<(Llama<B>, Chat, String)> {
    let chat = Chat::read(dir)?;
    let loaded = pretrained::load::<B>(dir, quantize, device)?;
    Ok((loaded.llama, chat, loaded.stored.unwrap_or("F32".to_owned())))
}

/// The bytes of the weights that are quantized.
fn quantized_bytes<B: Backend>(llama: &Llama<B>) -> usize {
    let report = llama.parameters();
    report.layers.iter().map(|it| it.quantized_bytes).sum()
}

/// How texts are read. None is longer than those that the model learned to read.
fn reading<B: Backend>(max_length: usize, mask_prompt: bool, llama: &Llama<B>) -> Reading {
    Reading { max_length: max_length.min(llama.max_positions), mask_prompt }
}

fn adapters(dir: &Path) -> Result<LoraAdapters<Plain>> {
    let set = LoraAdapters::load(dir, &Default::default()).map_err(|error| error.to_string())?;
    for key in set.unused() {
        eprintln!("{}: `{}` is not used, as in PEFT", dir.display(), key.escape_debug());
    }
    Ok(set)
}

fn run_train(args: &TrainArgs, replicas: &Counted) -> Result<()> {
    let device = Default::default();
    let is_first = replicas.is_first();
    let arguments = json!({
        "model": args.base.model, "quantize": args.base.quantize.map(|it| format!("{it:?}")),
        "generated": args.generated, "data": args.data, "sst2": args.sst2,
        "rank": args.rank, "alpha": args.alpha,
        "targets": args.targets, "relative": args.relative.map(Relative::name), "full": args.full,
        "iters": args.iters, "batch": args.batch,
        "accumulate": args.accumulate, "max_length": args.max_length,
        "learning_rate": args.learning_rate, "warmup": args.warmup, "clip": args.clip,
        "mask_prompt": args.mask_prompt, "pack": args.pack, "eval_every": args.eval_every,
        "segments": args.segments, "workers": args.workers.count(backend::cores()), "seed": args.seed,
        "backend": backend::NAME,
    });
    if args.resume {
        arguments::resume(&args.out, &arguments)?;
    }
    let stop = stopper()?;
    let model = replicas.first_then_others(|| match args.generated {
        true => generated(args, is_first, &stop),
        false => find(&args.base.model),
    })?;
    let quantize = args.base.quantization();
    let (llama, chat) = match is_first {
        true => read::<Train>(&model, quantize, &device)?,
        false => read_silently::<Train>(&model, quantize, &device).map(|it| (it.0, it.1))?,
    };
    let reading = reading(args.max_length, args.mask_prompt, &llama);
    let (texts, valid) = replicas.first_then_others(|| texts(args, is_first, &chat, &reading))?;
    let mut questions = match &args.sst2 {
        Some(dir) => reviews::questions(&dir.join("test.tsv"), &chat)?,
        None => Vec::new(),
    };
    questions.truncate(args.questions.unwrap_or(usize::MAX));
    let config =
        LoraConfig::peft(args.rank, args.alpha).with_targets(&args.targets).with_seed(args.seed);
    if args.full && quantized_bytes(&llama) > 0 {
        let path = model.display();
        return Err(format!("{path}: `--full` needs weights that are not quantized"));
    }
    let model = match args.relative {
        None if args.full => llama.train_only(&[".*"]),
        None => llama.attach(&config),
        Some(relative) => {
            // What is seen is computed without gradients.
            let see = |llama: &Llama<Plain>| {
                let seen: Vec<_> = texts.iter().take(SEEN).collect();
                // A row at a time, because what fills up shorter ones is not to be seen.
                for row in pack(&seen, reading.max_length) {
                    let Batch { ids, positions, .. } = Batch::new(llama, &[row], &device);
                    llama.logits(llama.hidden(ids, &positions));
                }
            };
            relative.attach(&llama.valid(), config, see).map(Lora::from_inner)
        }
    };
    let model = model.map_err(|error| error.to_string())?;
    let parameters = model.parameters();
    if is_first {
        println!(
            "{} texts to learn, {} to evaluate; {} of {} parameters train ({:.2} %); {}",
            texts.len(),
            valid.len(),
            parameters.trainable,
            parameters.total,
            100.0 * parameters.trainable as f64 / parameters.total as f64,
            backend::NAME,
        );
    }
    // Not before: a wrong path must not remove the checkpoints of an earlier run. Not after, for none of the
    // replicas may find these, in the same directory or in one of its own.
    replicas.first_then_others(|| match is_first {
        _ if args.resume => Ok(()),
        true => arguments::begin(&args.out, CHECKPOINTS, &arguments),
        false => arguments::forget(&args.out, CHECKPOINTS),
    })?;
    let recipe = Recipe {
        name: match args.relative {
            None if args.full => "full fine-tuning",
            relative => relative.map_or("LoRA", Relative::name),
        },
        iters: args.iters,
        batch: args.batch,
        accumulate: args.accumulate,
        learning_rate: args.learning_rate,
        warmup: args.warmup.min(args.iters - 1),
        clip: args.clip,
        pack: args.pack.then_some(reading.max_length),
        eval_every: args.eval_every,
        seed: args.seed,
        workers: args.workers.count(backend::cores()),
        segments: args.segments,
    };
    let ask = |llama: &Llama<Plain>| {
        let doing = format!("asking about {} reviews", questions.len());
        during(&doing, || reviews::accuracy(llama, &chat, &questions, &device))
    };
    let mut accuracies = Vec::new();
    let asks = is_first && args.sst2.is_some();
    if asks {
        accuracies.push(ask(&model.valid())?);
        println!("before the training, {:.1} % of the answers are right", accuracies[0]);
    }
    let out = Some(&*args.out);
    let (model, history) = train::train(model, &texts, &valid, &recipe, out, &stop, replicas)?;
    if asks {
        accuracies.push(ask(&model.valid())?);
    }
    match is_first {
        true => report(args, &history, &accuracies, replicas.count()),
        false => Ok(()),
    }
}

/// What becomes true when the user presses Ctrl-C.
fn stopper() -> Result<Arc<AtomicBool>> {
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
    Ok(stop)
}

/// The small model of this run or, if it is resumed, the one it began with.
fn generated(args: &TrainArgs, is_first: bool, stop: &AtomicBool) -> Result<PathBuf> {
    let dir = args.out.join(MODEL);
    if is_first && !args.resume {
        generated::write_model(&dir, args.seed, stop)?;
    }
    Ok(dir)
}

/// The texts to learn from, and those to evaluate on.
fn texts(
    args: &TrainArgs,
    is_first: bool,
    chat: &Chat,
    reading: &Reading,
) -> Result<(Vec<Text>, Vec<Text>)> {
    if let Some(dir) = &args.sst2 {
        // As many as are learned from, and some to watch.
        let count = args.iters * args.batch * args.accumulate;
        let train = reviews::texts(&dir.join("train.tsv"), count, chat, reading)?;
        return Ok((train, reviews::texts(&dir.join("dev.tsv"), WATCHED, chat, reading)?));
    }
    let dir = match &args.data {
        Some(dir) => dir.clone(),
        None => {
            let dir = args.out.join(DATA);
            if is_first {
                generated::write_texts(&dir)?;
            }
            dir
        }
    };
    let read = |name: &str| data::read(&dir.join(name), chat, reading);
    Ok((read("train.jsonl")?, read("valid.jsonl")?))
}

fn run_evaluate(args: &EvaluateArgs) -> Result<()> {
    let device = Default::default();
    let (llama, chat) = read::<Plain>(&find(&args.base.model)?, args.base.quantization(), &device)?;
    let reading = reading(args.max_length, args.mask_prompt, &llama);
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
    let (llama, chat) = read::<Plain>(&find(&args.base.model)?, args.base.quantization(), &device)?;
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
    let model = find(&args.base.model)?;
    let (llama, chat) = read::<Plain>(&model, args.base.quantization(), &Default::default())?;
    let adapted = llama.switch(&set).map_err(|error| error.to_string())?;
    let merged = adapted.merge().map_err(|error| error.to_string())?;
    merged::save(&merged.dequantize(), &chat, &model, &args.out)?;
    println!("The merged model is in {}.", args.out.display());
    Ok(())
}

fn run_serve(args: &ServeArgs) -> Result<()> {
    let model = find(&args.base.model)?;
    let (llama, chat) = read::<Plain>(&model, args.base.quantization(), &Default::default())?;
    serve::serve(args, llama, chat)
}
