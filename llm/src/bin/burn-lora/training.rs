//! The command `train`.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use burn::module::AutodiffModule;
use burn_lora::{Lora, LoraAdapters, LoraConfig, LoraModule, nn::Precision, train::Replicas};
use burn_lora_llm::{
    Context, Result,
    chat::Chat,
    cli::{live::during, relatives::Relative, replicas::Counted},
    data::{Batch, Reading, pack},
    llama::Llama,
    pretrained::{self, Holding},
};
use serde_json::{Value, json};

use crate::{
    adapters,
    args::TrainArgs,
    backend::{self, Plain, Train},
    base::Base,
    dtype::Chosen,
    find, generated, load, quantized_bytes, read, reading,
    remembered::{self, Remembered},
    report::report,
    results::{self, Start},
    reviews,
    texts::{self, Material},
    train::{self, Keeping, Recipe},
};

/// The directory of the model that was generated, in that of the run.
const MODEL: &str = "model";

/// The number of texts that EVA sees.
const SEEN: usize = 512;

/// Reads what is trained and on what, trains, and reports.
///
/// # Errors
///
/// If a file cannot be read or written, if arguments do not fit each other, the files or an earlier run, or if the
/// replicas differ.
pub fn run(args: &TrainArgs, replicas: &Counted) -> Result<()> {
    let device = Default::default();
    let is_first = replicas.is_first();
    let mut arguments = arguments(args);
    let start = match (args.resume, args.force) {
        (true, _) => Start::Resume,
        (_, true) => Start::Force,
        _ => Start::New,
    };
    results::check(&args.out, start, &arguments)?;
    let dtype = results::dtype(&args.out, start, args.dtype)?;
    let reviews = match args.sst2 {
        Some(_) => results::reviews(&args.out, start, &mut arguments)?,
        None => 0,
    };
    texts::check(args)?;
    let stop = stopper()?;
    let path = replicas.first_then_others(|| match args.generated {
        true => small_model(args, is_first, &stop),
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
    let Chosen { precision, note } = dtype.choose(&path)?;
    arguments[results::DTYPE] = precision.to_string().into();
    // Processors may differ, and `auto` depends on them.
    replicas
        .agree(&format!("dtype: {precision}"))
        .context("the replicas multiply in other types; give all the same --dtype")?;
    let adapted = args.adapter.as_ref().map(|dir| match is_first {
        true => started(dir, args, &base, &chat),
        false => load(dir, &base),
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
    // Weights that train are held in full. Those that do not are in few bits if the linear layers are.
    let quantize = args.base.quantization();
    let trains_in_full = args.full || adapted.as_ref().is_some_and(has_more_than_adapters);
    let keeps = args.base.keep_16_bits || precision == Precision::Bf16 || quantize.is_some();
    let holding = Holding { quantize, keep_16_bits: keeps && !trains_in_full };
    let llama = match is_first {
        true => {
            note.into_iter().for_each(|note| println!("{note}"));
            read::<Train>(&path, holding, &device)?
        }
        false => pretrained::load_held(&path, holding, &device)?.llama,
    };
    let llama = llama.with_precision(precision);
    let targets = args.targets_of(&llama);
    let config = LoraConfig::peft(args.rank, args.alpha).with_targets(targets).with_seed(args.seed);
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
    let recipe = recipe(args, &reading);
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
        true => report(args, precision, &history, &accuracies, replicas.count()),
        false => Ok(()),
    }
}

/// Whether parameters of the base were trained with the adapters.
fn has_more_than_adapters(set: &LoraAdapters<Plain>) -> bool {
    set.num_params() > set.without_modules_to_save().num_params()
}

/// The arguments that a run is resumed with, but for those that depend on files or on the processor.
fn arguments(args: &TrainArgs) -> Value {
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
    arguments
}

/// How to train.
fn recipe(args: &TrainArgs, reading: &Reading) -> Recipe {
    Recipe {
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
fn small_model(args: &TrainArgs, is_first: bool, stop: &AtomicBool) -> Result<PathBuf> {
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
