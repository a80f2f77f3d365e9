//! Adapts a pretrained transformer to classify texts as positive or negative, and compares four methods:
//! full fine-tuning, LoRA on all linear layers, LoRA on queries and values, and a head on top of the
//! frozen encoder.
//!
//! ```text
//! cargo run --release --example text_classification --no-default-features --features flex -- \
//!     --data sst2
//! cargo run --release --example text_classification --no-default-features --features flex -- \
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
    Lora, LoraModule,
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
    backend::{self, Plain, Train},
    classifier::{Recipe, Sample, Start, accuracy, fit, logits},
    cli::{self, arguments, hub, live::during, quantize::Kind, relatives::Relative},
    experiment::{
        Ending, Experiment, Options, Results, Samples, default, default_if, draw_curves, help,
    },
    grammar::{self, Language},
    tensors::bits,
    text::{self, Texts},
};
use mimalloc::MiMalloc;
use serde_json::json;

/// Reuses the memory of large tensors: every training step allocates them again.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Adapt a pretrained transformer to classify texts as positive or negative, and compare full
/// fine-tuning, LoRA on all linear layers (targets query, key, value, output, expand, contract), LoRA on
/// query and value, and training only a head.
#[derive(Parser, Debug)]
#[command(
    mut_arg("learning_rate", default_if("generated", "true", "0.001", "0.0001")),
    mut_arg("learning_rate", help(LEARNING_RATE)),
    mut_arg("lora_learning_rate", default_if("generated", "true", "0.002", "0.001")),
    mut_arg("lora_learning_rate", help(LORA_LEARNING_RATE)),
    mut_arg("epochs", default_if("generated", "true", "5", "2")),
    mut_arg("epochs", help(EPOCHS)),
    mut_arg("seed", help("Seed of the head, adapters, shuffling and generated texts")),
    mut_arg("out", default("out/text_classification")),
    mut_arg("out", help(OUT))
)]
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
    /// Learning rate of the head alone
    #[arg(long, value_name = "RATE", default_value = "0.01", value_parser = cli::rate)]
    head_learning_rate: f64,
    /// Also train with LoRA+: the learning rate of B is this multiple of A's
    #[arg(long, value_name = "RATIO", value_parser = cli::at_least_one)]
    lora_plus: Option<f64>,
    /// Also train LoRA on an encoder whose linear layers are held in 16, 8 or 4 bits; several kinds are
    /// separated by commas
    #[arg(long, alias = "quantise", value_name = "KINDS", value_delimiter = ',')]
    quantize: Vec<Kind>,
    /// Also train with relatives of LoRA on all linear layers; several are separated by commas
    #[arg(long, value_name = "KINDS", value_delimiter = ',')]
    relatives: Vec<Relative>,
    /// Number of texts to train on
    #[arg(long, value_name = "N", default_value = "10000", value_parser = cli::positive)]
    train_size: usize,
    /// Resume an interrupted run with the same arguments and the same --out
    #[arg(long)]
    resume: bool,
    #[command(flatten)]
    options: Options,
}

const LEARNING_RATE: &str = "Learning rate of full fine-tuning, which falls to zero along a cosine; 0.0001 by \
                             default, and 0.001 with a generated encoder";
const LORA_LEARNING_RATE: &str =
    "Learning rate of LoRA; 0.001 by default, and 0.002 with a generated encoder";
const EPOCHS: &str =
    "Passes over the texts, for each training; 2 by default, and 5 with a generated encoder";
const OUT: &str = "Directory for curves.svg, summary.json, the adapters, logs, and the last two checkpoints of \
                   each training";

const MINILM: hub::Model = hub::Model {
    name: "sentence-transformers/all-MiniLM-L6-v2",
    files: &["config.json", "tokenizer.json", "model.safetensors"],
};

/// The learning rate at which the small encoder is pretrained.
const PRETRAINING: f64 = 2e-3;

/// The number of texts that EVA sees.
const SEEN: usize = 512;

/// The number of texts for the evaluation after each epoch.
const WATCHED: usize = 1000;

fn main() -> ExitCode {
    common::main(run)
}

fn run(args: Args) -> Result<()> {
    // Reads all files first, so that a wrong one is reported before anything is replaced.
    let given = if args.generated { None } else { Some(read(&args)?) };
    let options = &args.options;
    options.create_out()?;
    let start = Some(start(&args)?);
    let recipe = |name, learning_rate| Recipe { start, ..options.recipe(name, learning_rate) };
    Plain::seed(&Default::default(), options.seed);

    // 1. Load or pretrain an encoder, and load the texts of the task.
    let device = Default::default();
    let Given { bert, sizes, mut texts, accuracy: base_accuracy_old } = match given {
        Some(given) => given,
        None => pretrain(recipe("base: missing words", PRETRAINING))?,
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
    let experiment = Experiment {
        options,
        config: options.config().with_modules_to_save([HEAD]),
        old: Samples::none(),
        new: Samples { train, watched: dev, test },
        names: classifier::names(),
    };
    let config = |targets: &[&str]| experiment.config.clone().with_targets(targets.iter().copied());
    let attach = |model: TextClassifier<Train>, targets: &[&str]| {
        model.attach(&config(targets)).context("attaching adapters")
    };
    let all_linear = attach(fresh(), &ALL_LINEAR)?;
    println!("{}\n", all_linear.parameters());
    let adapt = |recipe, model| experiment.adapt(&recipe, model, &experiment.new);
    let [rate, lora_rate] = [options.learning_rate, options.lora_learning_rate];
    let full = fresh().train_only(&[".*"]).context("full fine-tuning")?;
    let (full, _) = adapt(recipe("full fine-tuning", rate), full)?;
    let (all, adapted) = adapt(recipe("LoRA, all linear", lora_rate), all_linear.clone())?;
    let query_value = attach(fresh(), &QUERY_VALUE)?;
    let (some, _) = adapt(recipe("LoRA, query and value", lora_rate), query_value)?;
    let head = fresh().train_only(&[HEAD]).context("freezing")?;
    let (head, _) = adapt(recipe("head", args.head_learning_rate), head)?;
    let mut methods = vec![full, all, some, head];
    if let Some(lora_plus) = args.lora_plus {
        // Keeps the geometric mean of both learning rates.
        let plus = recipe("LoRA+, all linear", lora_rate / lora_plus.sqrt());
        methods.push(adapt(Recipe { lora_plus, ..plus }, all_linear)?.0);
    }
    for &relative in &args.relatives {
        // Runs the model on some texts, without gradients.
        let see = |model: &TextClassifier<Plain>| {
            for texts in train[..train.len().min(SEEN)].chunks(Text::BATCH) {
                model.forward(&Text::stack(texts, &device));
            }
        };
        let model =
            relative.attach(&base, config(&ALL_LINEAR), see).context("attaching adapters")?;
        let model = Lora::from_inner(model);
        methods.push(adapt(recipe(relative.name(), lora_rate), model)?.0);
    }
    for &kind in &args.quantize {
        let (base, report) = quantize(&base, kind)?;
        println!("\n{report}\n");
        let model = attach(base.train::<Train>(), &ALL_LINEAR)?;
        let name = match kind {
            Kind::Int8 => "LoRA, all linear, int8",
            Kind::Nf4 => "LoRA, all linear, NF4",
            Kind::Bf16 => "LoRA, all linear, bf16",
        };
        methods.push(adapt(recipe(name, lora_rate), model)?.0);
    }

    // 3. Merge the adapters: the outputs stay the same. Detach them: the encoder comes back, bit for bit.
    let ending = Ending {
        max_abs_logit_diff_merged: experiment.merge(&adapted)?,
        base_restored_exactly: bits(embeddings(&adapted.detach(), test)) == bits(base_vectors),
    };
    println!("Without them, the model computes {} the vectors of the encoder.\n", ending.exactly());

    draw_curves(&options.curves(), &methods, base_accuracy_new)?;
    write_vectors(&options.out.join("vectors.json"), &adapted, test)?;
    let results = Results { base_accuracy_old, base_accuracy_new, methods, ending };
    results.report(
        options,
        &json!({
            "dataset": name,
            "head_learning_rate": args.head_learning_rate,
            "train_size": train.len(),
            "model_bytes": size_of::<f32>() * base.bert.num_params(),
        }),
    )
}

/// The classifier with the encoder's linear layers in 16, 8 or 4 bits.
fn quantize(
    base: &TextClassifier<Plain>,
    kind: Kind,
) -> Result<(TextClassifier<Plain>, QuantizationReport)> {
    let config = QuantizeConfig::from(Quantization::from(kind)).with_targets(ALL_LINEAR);
    base.clone().quantize(config).context("quantizing the encoder")
}

/// Whether to start from the model or from checkpoints. Those must come from a run with the same
/// arguments.
fn start(args: &Args) -> Result<Start> {
    let options = &args.options;
    let kinds: Vec<_> = args.quantize.iter().map(|kind| format!("{kind:?}")).collect();
    let relatives: Vec<_> = args.relatives.iter().map(|it| it.name()).collect();
    let arguments = json!({
        "data": args.data,
        "model": args.model,
        "generated": args.generated,
        "rank": options.rank,
        "alpha": options.alpha,
        "epochs": options.epochs,
        "train_size": args.train_size,
        "lora_plus": args.lora_plus,
        "quantize": kinds,
        "relatives": relatives,
        "seed": options.seed,
        "backend": backend::NAME,
        "learning_rate": options.learning_rate,
        "lora_learning_rate": options.lora_learning_rate,
        "head_learning_rate": args.head_learning_rate,
        "workers": options.workers(),
        "dtype": options.precision().to_string(),
    });
    if !args.resume {
        arguments::begin(&options.out, "logs", &arguments)?;
        return Ok(Start::Fresh);
    }
    arguments::resume(&options.out, &arguments, &[])?;
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
        None => grammar::texts(&tokenizer, args.options.seed)?,
    };
    Ok(Given { bert, sizes, texts, accuracy: None })
}

/// Pretrains a small encoder to predict missing words of a generated language.
fn pretrain(recipe: Recipe) -> Result<Given> {
    let Language { tokenizer, config: sizes, clozes, clozes_test: test } =
        grammar::language(recipe.seed)?;
    let (device, vocab_size) = (Default::default(), sizes.vocab_size);
    let model = TextClassifier::new(sizes.init::<Train>(&device), &sizes, vocab_size, &device);
    let model = model.train_only(&[".*"]).context("pretraining")?;
    let recipe = Recipe { epochs: 5, ..recipe };
    let (model, _) = fit(&recipe, model, &clozes, &test)?;
    let right = accuracy(logits(&*model, &test), &test);
    println!("\nThe encoder predicts {right:.1} % of missing words, out of {vocab_size} words.\n");
    let texts = grammar::texts(&tokenizer, recipe.seed)?;
    Ok(Given { bert: model.into_inner().bert, sizes, texts, accuracy: Some(right) })
}

/// The encoder's vectors of the first texts: `[16, hidden_size]`.
fn embeddings(model: &TextClassifier<Plain>, texts: &[Text]) -> Tensor<Plain, 2> {
    model.bert.embed(&Text::stack(first(texts), &Default::default()))
}

fn first(texts: &[Text]) -> &[Text] {
    &texts[..texts.len().min(16)]
}

/// Writes the adapted encoder's vectors of some texts. `llm/tests/bert/check_saved.py` compares them with
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
