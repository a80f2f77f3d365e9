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
mod base;
mod checkpoint;
mod generated;
mod remembered;
mod report;
mod results;
mod reviews;
mod serve;
#[cfg(test)]
mod tests;
mod texts;
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
    cli::{self, hub, live::during, relatives::Relative, replicas::Counted},
    config::LlamaConfig,
    data::{self, Batch, Reading, pack},
    generate::{Sampling, generate},
    llama::Llama,
    loss,
    merged::{self, Precision},
    pretrained,
};
use mimalloc::MiMalloc;
use rand::{SeedableRng, rngs::StdRng};
use serde_json::json;

use args::{
    Args, Command, EvaluateArgs, GenerateArgs, MAX_LENGTH, MergeArgs, ServeArgs, TrainArgs,
};
use backend::{Plain, Train};
use base::Base;
use remembered::Remembered;
use report::report;
use results::Start;
use texts::Material;
use train::{Keeping, Recipe};

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

/// The directory of the model that was generated, in that of the run.
const MODEL: &str = "model";

/// What adapters of language models are for, in PEFT's files.
const TASK: &str = "CAUSAL_LM";

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

/// The model.
fn read<B: Backend>(
    path: &Path,
    quantize: Option<Quantization>,
    device: &B::Device,
) -> Result<Llama<B>> {
    let start = Instant::now();
    let doing = format!("reading {}", path.display());
    let loaded = during(&doing, || pretrained::load::<B>(path, quantize, device))?;
    let (llama, stored) = (loaded.llama, loaded.stored.unwrap_or("F32".to_owned()));
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
    Ok(llama)
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

fn load(dir: &Path) -> Result<LoraAdapters<Plain>> {
    let set = LoraAdapters::load(dir, &Default::default()).map_err(|error| error.to_string())?;
    for key in set.unused() {
        eprintln!("{}: `{}` is not used, as in PEFT", dir.display(), key.escape_debug());
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
    let (set, remembered) = (load(dir)?, Remembered::read(dir));
    let unreadable = remembered.as_ref().err().cloned();
    let remembered = remembered.ok().flatten();
    let other = base.other(dir, &set, remembered.as_ref());
    let template = remembered.as_ref().and_then(|it| it.other_template(dir, chat));
    for problem in unreadable.into_iter().chain(other).chain(template) {
        eprintln!("warning: {problem}");
    }
    Ok((set, remembered))
}

fn run_train(args: &TrainArgs, replicas: &Counted) -> Result<()> {
    let device = Default::default();
    let is_first = replicas.is_first();
    let mut arguments = json!({
        "model": args.base.model, "quantize": args.base.quantize.map(|it| format!("{it:?}")),
        "generated": args.generated, "data": args.data, "valid_share": args.valid_share, "sst2": args.sst2,
        "adapter": args.adapter, "relative": args.relative.map(Relative::name), "full": args.full,
        "iters": args.iters, "batch": args.batch,
        "accumulate": args.accumulate, "max_length": args.max_length,
        "learning_rate": args.learning_rate, "warmup": args.warmup, "clip": args.clip,
        "mask_prompt": args.mask_prompt, "pack": args.pack, "eval_every": args.eval_every,
        "segments": args.segments, "workers": args.workers.count(backend::cores()), "seed": args.seed,
        "backend": backend::NAME,
    });
    if let Some(fields) = arguments.as_object_mut() {
        fields.extend(args.shape());
    }
    let start = match (args.resume, args.force) {
        (true, _) => Start::Resume,
        (_, true) => Start::Force,
        _ => Start::New,
    };
    results::check(&args.out, start, &arguments)?;
    let reviews = match args.sst2 {
        Some(_) => results::reviews(&args.out, start, &mut arguments)?,
        None => 0,
    };
    texts::check(args)?;
    let stop = stopper()?;
    let path = replicas.first_then_others(|| match args.generated {
        true => generated(args, is_first, &stop),
        false => find(&args.base.model),
    })?;
    // What is read quickly is checked before the model is read.
    let (chat, base) = (Chat::read(&path)?, Base::of(&path)?);
    let config = pretrained::config(&path)?;
    // No parameter tells the constants of a model, such as RoPE's.
    replicas.agree(&config.to_lines()).context("the replicas' models differ")?;
    let reading = reading(args.max_length, args.mask_prompt, &config);
    let Material { texts, valid, files } =
        replicas.first_then_others(|| texts::read(args, reviews, is_first, &chat, &reading))?;
    let adapted = args.adapter.as_ref().map(|dir| match is_first {
        true => started(dir, args, &base, &chat),
        false => load(dir),
    });
    let adapted = adapted.transpose()?;
    let mut fingerprints: Vec<_> =
        files.into_iter().map(|(path, hash)| (path.display().to_string(), hash)).collect();
    fingerprints.extend(base.fingerprint.clone().map(|it| (path.display().to_string(), it)));
    if let (Some(dir), Some(set)) = (&args.adapter, &adapted) {
        fingerprints.push((dir.display().to_string(), set.fingerprint()));
    }
    if start == Start::Resume {
        results::check_files(&args.out, &fingerprints)?;
    }
    let mut questions = match &args.sst2 {
        Some(dir) => reviews::questions(&dir.join("test.tsv"), &chat)?,
        None => Vec::new(),
    };
    questions.truncate(args.questions.unwrap_or(usize::MAX));
    let quantize = args.base.quantization();
    let llama = match is_first {
        true => read::<Train>(&path, quantize, &device)?,
        false => pretrained::load(&path, quantize, &device)?.llama,
    };
    let config =
        LoraConfig::peft(args.rank, args.alpha).with_targets(&args.targets).with_seed(args.seed);
    if args.full && quantized_bytes(&llama) > 0 {
        let path = path.display();
        return Err(format!("{path}: `--full` needs weights that are not quantized"));
    }
    let model = match (&adapted, args.relative) {
        (Some(set), _) => llama.valid().switch(set).map(Lora::from_inner),
        (None, None) if args.full => llama.train_only(&[".*"]),
        (None, None) => llama.attach(&config),
        (None, Some(relative)) => {
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
        for warning in parameters.warnings() {
            println!("warning: {warning}");
        }
    }
    // Not before: a wrong path must not remove the checkpoints of an earlier run. Not after, for none of the
    // replicas may find these, in the same directory or in one of its own.
    replicas.first_then_others(|| match is_first {
        true => results::begin(&args.out, start, &arguments, &fingerprints),
        false if start == Start::Resume => Ok(()),
        false => results::forget(&args.out),
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
    let keeping = Keeping {
        out: &args.out,
        base: &base.name,
        remembered: Remembered {
            base: base.fingerprint.clone(),
            template: remembered::template(&chat),
            mask_prompt: args.mask_prompt,
            max_length: reading.max_length,
        },
    };
    let (model, history) =
        train::train(model, &texts, &valid, &recipe, Some(&keeping), &stop, replicas)?;
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

/// The adapters that the training starts from.
fn started(dir: &Path, args: &TrainArgs, base: &Base, chat: &Chat) -> Result<LoraAdapters<Plain>> {
    let out = args.out.canonicalize();
    if out.is_ok_and(|out| dir.canonicalize().is_ok_and(|dir| dir.starts_with(out))) {
        let (dir, out) = (dir.display(), args.out.display());
        return Err(format!(
            "{dir}: it is in {out}, where the new adapters go; write to another --out"
        ));
    }
    let (set, _) = adapters(dir, base, chat)?;
    println!("Starts from the {} adapters in {}", set.len(), dir.display());
    Ok(set)
}

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
    let llama = read::<Plain>(&path, args.base.quantization(), &device)?;
    let told = |name: &str, llama: &Llama<Plain>| {
        let doing = format!("evaluating {name} on {} texts", texts.len());
        let loss = during(&doing, || loss::evaluate(llama, &texts, args.batch, &device));
        println!("{name:<24} loss {loss:.4}  perplexity {:.3}", loss.exp());
    };
    told("base", &llama);
    if let Some((dir, (set, _))) = &adapter {
        let adapted = llama.switch(set).map_err(|error| error.to_string())?;
        told(&dir.display().to_string(), &adapted);
    }
    Ok(())
}

fn run_generate(args: &GenerateArgs) -> Result<()> {
    let device = Default::default();
    let path = find(&args.base.model)?;
    let (chat, base) = (Chat::read(&path)?, Base::of(&path)?);
    let prompt = chat.prompt(&args.prompt)?;
    let room = room(&prompt, &pretrained::config(&path)?)?;
    let sets = args.adapter.iter().map(|dir| Ok(adapters(dir, &base, &chat)?.0));
    let sets = sets.collect::<Result<Vec<_>>>()?;
    let llama = read::<Plain>(&path, args.base.quantization(), &device)?;
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
        let new = generate(llama, &chat, &prompt, limit, sampling, &mut rng, show)?;
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

fn run_merge(args: &MergeArgs) -> Result<()> {
    let path = find(&args.base.model)?;
    let (chat, base) = (Chat::read(&path)?, Base::of(&path)?);
    let (set, _) = adapters(&args.adapter, &base, &chat)?;
    let llama = read::<Plain>(&path, args.base.quantization(), &Default::default())?;
    let adapted = llama.switch(&set).map_err(|error| error.to_string())?;
    let merged = adapted.merge().map_err(|error| error.to_string())?;
    let saved = merged::save(&merged.dequantize(), &chat, &path, &args.out, args.dtype)?;
    let types: Vec<_> = saved.precisions.iter().map(Precision::to_string).collect();
    println!(
        "The merged model is in {}: {:.1} MB in {}; `--dtype` chooses another type.",
        args.out.display(),
        saved.bytes as f64 / 1e6,
        types.join(" and "),
    );
    Ok(())
}

fn run_serve(args: &ServeArgs) -> Result<()> {
    args.adapters.as_deref().map_or(Ok(()), serve::check)?;
    let path = find(&args.base.model)?;
    let (chat, base) = (Chat::read(&path)?, Base::of(&path)?);
    let llama = read::<Plain>(&path, args.base.quantization(), &Default::default())?;
    serve::serve(args, llama, chat, base)
}
