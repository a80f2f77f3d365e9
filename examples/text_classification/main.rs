//! Adapts a pretrained transformer to classify texts as positive or negative, and compares four methods:
//! full fine-tuning, LoRA on all linear layers, LoRA on queries and values, and a head on top of the
//! frozen encoder.
//!
//! ```text
//! cargo run --release --example text_classification --no-default-features --features flex,text -- \
//!     --data sst2
//! cargo run --release --example text_classification --no-default-features --features flex,text -- \
//!     --generated
//! ```
//!
//! Start reading with [`bert`], which is the model.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use burn::{
    module::{AutodiffModule, Module},
    tensor::{Tensor, backend::Backend},
};
use burn_lora::{
    Lora, LoraConfig, LoraModule,
    quantize::{Quantization, QuantizationReport, QuantizeConfig},
    report::grouped,
};
use burn_lora_llm::bert::{
    Bert, BertConfig,
    classifier::{self, ALL_LINEAR, HEAD, QUERY_VALUE, Text, TextClassifier},
    pretrained,
};
use clap::Parser;
use common::{
    Context, Result,
    adaptation::{Job, Method, bits, draw_curves, largest_difference, results},
    backend::{self, Plain, Train},
    classifier::{Sample, Start, accuracy, logits},
    cli::{
        self, arguments, hub, live::during, quantize::Kind, relatives::Relative,
        workers::WorkersArg, write_summary,
    },
    grammar::{self, Language},
    text::{self, Texts},
};
use mimalloc::MiMalloc;
use serde::Serialize;
use serde_json::json;

/// Reuses the memory of large tensors: every training step allocates them again.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Adapt a pretrained transformer to classify texts as positive or negative, and compare full
/// fine-tuning, LoRA on all linear layers (targets query, key, value, output, expand, contract), LoRA on
/// query and value, and training only a head.
#[derive(Parser, Debug)]
struct Args {
    /// Directory with train.tsv, dev.tsv and test.tsv of SST-2; otherwise generated sentences
    #[arg(long, value_name = "DIR", conflicts_with = "generated")]
    data: Option<PathBuf>,
    /// Directory with config.json, tokenizer.json and model.safetensors of a BERT; otherwise the Hugging
    /// Face cache, or a download of all-MiniLM-L6-v2
    #[arg(long, value_name = "DIR", conflicts_with = "generated")]
    model: Option<PathBuf>,
    /// Pretrain a small encoder on generated sentences, which needs no files and no network
    #[arg(long)]
    generated: bool,
    /// Rank of the adapters
    #[arg(long, default_value = "8", value_parser = cli::positive)]
    rank: usize,
    /// Scale of the adapters: their update is multiplied by alpha/rank
    #[arg(long, default_value = "16", value_parser = cli::nonzero)]
    alpha: f64,
    /// Learning rate of full fine-tuning, which falls to zero along a cosine; 0.0001 by default, and 0.001
    /// with a generated encoder
    #[arg(long, value_name = "RATE", value_parser = cli::rate)]
    learning_rate: Option<f64>,
    /// Learning rate of LoRA; 0.001 by default, and 0.002 with a generated encoder
    #[arg(long, value_name = "RATE", value_parser = cli::rate)]
    lora_learning_rate: Option<f64>,
    /// Learning rate of the head alone
    #[arg(long, value_name = "RATE", default_value = "0.01", value_parser = cli::rate)]
    head_learning_rate: f64,
    /// Also train with LoRA+: the learning rate of B is this multiple of A's
    #[arg(long, value_name = "RATIO", value_parser = cli::at_least_one)]
    lora_plus: Option<f64>,
    /// Also train LoRA on an encoder whose linear layers are held in 8 or 4 bits; several kinds are separated
    /// by commas
    #[arg(long, alias = "quantise", value_name = "KINDS", value_delimiter = ',')]
    quantize: Vec<Kind>,
    /// Also train with relatives of LoRA on all linear layers; several are separated by commas
    #[arg(long, value_name = "KINDS", value_delimiter = ',')]
    relatives: Vec<Relative>,
    /// Passes over the texts, for each training; 2 by default, and 5 with a generated encoder
    #[arg(long, value_parser = cli::positive)]
    epochs: Option<usize>,
    /// Number of texts to train on
    #[arg(long, value_name = "N", default_value = "10000", value_parser = cli::positive)]
    train_size: usize,
    #[command(flatten)]
    workers: WorkersArg,
    /// Seed of the head, adapters, shuffling and generated texts
    #[arg(long, default_value = "42")]
    seed: u64,
    /// Resume an interrupted run with the same arguments and the same --out
    #[arg(long)]
    resume: bool,
    /// Directory for curves.svg, summary.json, the adapters, logs, and the last two checkpoints of each
    /// training
    #[arg(long, value_name = "DIR", default_value = "out/text_classification")]
    out: PathBuf,
}

const MINILM: hub::Model = hub::Model {
    name: "sentence-transformers/all-MiniLM-L6-v2",
    files: &["config.json", "tokenizer.json", "model.safetensors"],
};

/// The learning rates of full fine-tuning and of LoRA.
const PRETRAINED: [f64; 2] = [1e-4, 1e-3];
const GENERATED: [f64; 2] = [1e-3, 2e-3];

/// The learning rate at which the small encoder is pretrained.
const PRETRAINING: f64 = 2e-3;

/// The number of texts that EVA sees.
const SEEN: usize = 512;

/// The number of texts for the evaluation after each epoch.
const WATCHED: usize = 1000;

#[derive(Serialize)]
struct Summary {
    dataset: &'static str,
    backend: &'static str,
    rank: usize,
    alpha: f64,
    learning_rate: f64,
    lora_learning_rate: f64,
    head_learning_rate: f64,
    seed: u64,
    train_size: usize,
    epochs: usize,
    /// The accuracy on missing words, if the encoder was pretrained here.
    base_accuracy_old: Option<f64>,
    base_accuracy_new: f64,
    methods: Vec<Method>,
    max_abs_logit_diff_merged: f64,
    base_restored_exactly: bool,
    /// The size of the encoder's weights.
    model_bytes: usize,
}

fn main() -> ExitCode {
    common::main(run)
}

fn run(args: Args) -> Result<()> {
    // Reads all files first, so that a wrong one is reported before anything is replaced.
    let given = if args.generated { None } else { Some(read(&args)?) };
    let epochs = args.epochs.unwrap_or(if args.generated { 5 } else { 2 });
    let config =
        LoraConfig::peft(args.rank, args.alpha).with_modules_to_save([HEAD]).with_seed(args.seed);
    let job = Job {
        out: &args.out,
        epochs,
        seed: args.seed,
        lora_plus: 1.0,
        workers: args.workers.count(backend::cores()),
        start: Some(start(&args, epochs)?),
        names: classifier::names(),
        old_test: &[],
    };
    Plain::seed(&Default::default(), args.seed);

    // 1. Load or pretrain an encoder, and load the texts of the task.
    let device = Default::default();
    let [rate, lora_rate] = rates(&args);
    let Given { bert, sizes, mut texts, accuracy: base_accuracy_old } = match given {
        Some(given) => given,
        None => pretrain(&job)?,
    };
    texts.train.truncate(args.train_size);
    texts.dev.truncate(WATCHED);
    let Texts { name, train, dev, test } = &texts;
    println!(
        "Training on {} texts ({name}), testing on {}, with the {} backend\n",
        grouped(train.len()),
        grouped(test.len()),
        backend::NAME,
    );

    // 2. Add a head with random weights, and train with four methods.
    let base = TextClassifier::new(bert, &sizes, 2, &device);
    let base_accuracy_new = during("testing the base", || accuracy(logits(&base, test), test));
    let base_vectors = embeddings(&base, test);
    let fresh = || base.clone().train::<Train>();
    let attach = |model: TextClassifier<Train>, targets: &[&str]| {
        let config = config.clone().with_targets(targets.iter().copied());
        model.attach(&config).context("attaching adapters")
    };
    let all_linear = attach(fresh(), &ALL_LINEAR)?;
    println!("{}\n", all_linear.parameters());
    let adapt = |job: &Job<Text>, name, model, rate| job.adapt(name, model, rate, train, dev, test);
    let full = fresh().train_only(&[".*"]).context("full fine-tuning")?;
    let (full, _) = adapt(&job, "full fine-tuning", full, rate)?;
    let (all, adapted) = adapt(&job, "LoRA, all linear", all_linear.clone(), lora_rate)?;
    let query_value = attach(fresh(), &QUERY_VALUE)?;
    let (some, _) = adapt(&job, "LoRA, query and value", query_value, lora_rate)?;
    let head = fresh().train_only(&[HEAD]).context("freezing")?;
    let (head, _) = adapt(&job, "head", head, args.head_learning_rate)?;
    let mut methods = vec![full, all, some, head];
    if let Some(lora_plus) = args.lora_plus {
        // Keeps the geometric mean of both learning rates.
        let rate = lora_rate / lora_plus.sqrt();
        let plus = Job { lora_plus, names: job.names.clone(), ..job };
        methods.push(adapt(&plus, "LoRA+, all linear", all_linear, rate)?.0);
    }
    for &relative in &args.relatives {
        let config = config.clone().with_targets(ALL_LINEAR);
        // What is seen is computed without gradients.
        let see = |model: &TextClassifier<Plain>| {
            for texts in train[..train.len().min(SEEN)].chunks(Text::BATCH) {
                model.forward(&Text::stack(texts, &device));
            }
        };
        let model = relative.attach(&base, config, see).context("attaching adapters")?;
        let model = Lora::from_inner(model);
        methods.push(adapt(&job, relative.name(), model, lora_rate)?.0);
    }
    for &kind in &args.quantize {
        let (base, report) = quantize(&base, kind)?;
        println!("\n{report}\n");
        let model = attach(base.train::<Train>(), &ALL_LINEAR)?;
        let name = match kind {
            Kind::Int8 => "LoRA, all linear, int8",
            Kind::Nf4 => "LoRA, all linear, NF4",
        };
        methods.push(adapt(&job, name, model, lora_rate)?.0);
    }

    // 3. Merge the adapters: the outputs stay the same. Detach them: the encoder comes back, bit for bit.
    let merged = adapted.merge().context("merging")?;
    let max_abs_logit_diff_merged =
        largest_difference(logits(&merged, test), logits(&*adapted, test));
    let base_restored_exactly = bits(embeddings(&adapted.detach(), test)) == bits(base_vectors);
    let exactly = if base_restored_exactly { "exactly" } else { "NOT exactly" };
    println!(
        "\nMerging the adapters changes the logits by at most {max_abs_logit_diff_merged:.1e}."
    );
    println!("Without them, the model computes {exactly} the vectors of the encoder.\n");

    println!("{}\n", results(&methods));
    let curves = args.out.join("curves.svg");
    draw_curves(&curves, &methods, base_accuracy_new)?;
    write_vectors(&args.out.join("vectors.json"), &adapted, test)?;
    let summary = Summary {
        dataset: name,
        backend: backend::NAME,
        rank: args.rank,
        alpha: args.alpha,
        learning_rate: rate,
        lora_learning_rate: lora_rate,
        head_learning_rate: args.head_learning_rate,
        seed: args.seed,
        train_size: train.len(),
        epochs,
        base_accuracy_old,
        base_accuracy_new,
        methods,
        max_abs_logit_diff_merged,
        base_restored_exactly,
        model_bytes: size_of::<f32>() * base.bert.num_params(),
    };
    let path = write_summary(&args.out, &summary)?;
    let adapters = args.out.join("adapters");
    println!("Wrote {}, {} and {}", curves.display(), path.display(), adapters.display());
    Ok(())
}

/// The classifier with the encoder's linear layers in few bits.
fn quantize(
    base: &TextClassifier<Plain>,
    kind: Kind,
) -> Result<(TextClassifier<Plain>, QuantizationReport)> {
    let config = QuantizeConfig::from(Quantization::from(kind)).with_targets(ALL_LINEAR);
    base.clone().quantize(config).context("quantizing the encoder")
}

/// The learning rates of full fine-tuning and of LoRA.
fn rates(args: &Args) -> [f64; 2] {
    let [full, lora] = if args.generated { GENERATED } else { PRETRAINED };
    [args.learning_rate.unwrap_or(full), args.lora_learning_rate.unwrap_or(lora)]
}

/// Whether to start from the model or from checkpoints. Those must come from a run with the same
/// arguments.
fn start(args: &Args, epochs: usize) -> Result<Start> {
    let [rate, lora_rate] = rates(args);
    let kinds: Vec<_> = args.quantize.iter().map(|kind| format!("{kind:?}")).collect();
    let relatives: Vec<_> = args.relatives.iter().map(|it| it.name()).collect();
    let arguments = json!({
        "data": args.data, "model": args.model, "generated": args.generated, "rank": args.rank,
        "alpha": args.alpha, "epochs": epochs, "train_size": args.train_size,
        "lora_plus": args.lora_plus, "quantize": kinds, "relatives": relatives, "seed": args.seed, "backend": backend::NAME,
        "learning_rate": rate, "lora_learning_rate": lora_rate,
        "head_learning_rate": args.head_learning_rate, "workers": args.workers.count(backend::cores()),
    });
    if !args.resume {
        arguments::begin(&args.out, "logs", &arguments)?;
        return Ok(Start::Fresh);
    }
    arguments::resume(&args.out, &arguments)?;
    Ok(Start::Checkpoint)
}

/// An encoder and texts to start with.
struct Given {
    bert: Bert<Plain>,
    sizes: BertConfig,
    texts: Texts,
    /// The accuracy on missing words in percent, if the encoder was pretrained here.
    accuracy: Option<f64>,
}

/// Reads a pretrained encoder from files. Reads texts from files too, if `--data` is given.
fn read(args: &Args) -> Result<Given> {
    let dir = match &args.model {
        Some(dir) => dir.clone(),
        None => MINILM.find()?,
    };
    if let Some(file) = MINILM.files.iter().find(|file| !dir.join(file).is_file()) {
        return Err(format!("{}: there is no {file} in it", dir.display()));
    }
    let (bert, sizes) = pretrained::load::<Plain>(&dir, &Default::default())?;
    println!("Model: {}", dir.display());
    let tokenizer = text::read_tokenizer(&dir.join("tokenizer.json"), &sizes)?;
    let texts = match &args.data {
        Some(dir) => Texts::read(dir, &tokenizer)?,
        None => grammar::texts(&tokenizer, args.seed)?,
    };
    Ok(Given { bert, sizes, texts, accuracy: None })
}

/// Pretrains a small encoder to predict missing words of a generated language.
fn pretrain(job: &Job<Text>) -> Result<Given> {
    let Language { tokenizer, config: sizes, clozes, clozes_test: test } =
        grammar::language(job.seed)?;
    let (device, words) = (Default::default(), sizes.vocab_size);
    let model = TextClassifier::new(sizes.init::<Train>(&device), &sizes, words, &device);
    let model = model.train_only(&[".*"]).context("pretraining")?;
    let job = Job { epochs: 5, names: job.names.clone(), ..*job };
    let (model, _) = job.fit("base: missing words", model, PRETRAINING, &clozes, &test)?;
    let right = accuracy(logits(&*model, &test), &test);
    println!("\nThe encoder predicts {right:.1} % of missing words, out of {words} words.\n");
    let texts = grammar::texts(&tokenizer, job.seed)?;
    Ok(Given { bert: model.into_inner().bert, sizes, texts, accuracy: Some(right) })
}

/// The encoder's vectors of the first texts: `[16, hidden_size]`.
fn embeddings(model: &TextClassifier<Plain>, texts: &[Text]) -> Tensor<Plain, 2> {
    model.bert.embed(&Text::stack(first(texts), &Default::default()))
}

fn first(texts: &[Text]) -> &[Text] {
    &texts[..texts.len().min(16)]
}

/// Writes the adapted encoder's vectors of some texts. `tests/bert/check_saved.py` compares them with
/// those that Python computes.
fn write_vectors(path: &Path, model: &TextClassifier<Plain>, texts: &[Text]) -> Result<()> {
    let vectors = embeddings(model, texts);
    let width = vectors.dims()[1];
    let values: Vec<f32> = vectors.into_data().iter::<f32>().collect();
    let vectors: Vec<_> = values.chunks(width).collect();
    let ids: Vec<_> = first(texts).iter().map(|text| &text.ids).collect();
    let json = json!({ "ids": ids, "vectors": vectors });
    fs::write(path, json.to_string() + "\n").context(path.display())
}
