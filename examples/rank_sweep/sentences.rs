//! The generated task of the example `text_classification`: an encoder that predicts missing words is
//! adapted to tell positive sentences from negative ones.

use burn::{
    module::{AutodiffModule, Module},
    tensor::backend::Backend,
};
use burn_lora::LoraModule;
use burn_lora_llm::bert::classifier::{ALL_LINEAR, HEAD, QUERY_VALUE, TextClassifier};
use common::{
    Context, Result,
    backend::{Plain, Train},
    classifier::{Recipe, fit},
    grammar::{self, Language},
};

use crate::{Args, task::Task};

const BASE_EPOCHS: usize = 5;
const BASE_LEARNING_RATE: f64 = 2e-3;

/// The learning rates of full fine-tuning and of LoRA.
pub const RATES: [&str; 2] = ["0.001", "0.002"];

/// Sets of layers: those of attention, and those of the feed-forward networks.
const SETS: &[(&str, &[&str])] = &[
    ("all linear", &ALL_LINEAR),
    ("query, value", &QUERY_VALUE),
    ("attention", &["query", "key", "value", "output"]),
    ("feed-forward", &["expand", "contract"]),
];

pub fn task(args: &Args) -> Result<Task<TextClassifier<Train>>> {
    let options = &args.options;
    if let Some(dir) = &args.data {
        return Err(format!("{}: the task text has generated sentences only", dir.display()));
    }
    let Language { tokenizer, config: sizes, clozes, clozes_test } =
        grammar::language(options.seed)?;
    let device = Default::default();
    Plain::seed(&device, options.seed);
    let base = TextClassifier::new(sizes.init::<Train>(&device), &sizes, sizes.vocab_size, &device);
    let base = base.train_only(&[".*"]).context("pretraining")?;
    let recipe =
        Recipe { epochs: BASE_EPOCHS, ..options.recipe("base: missing words", BASE_LEARNING_RATE) };
    let (base, _) = fit(&recipe, base, &clozes, &clozes_test)?;
    let base = TextClassifier::new(base.into_inner().bert, &sizes, 2, &device);
    // Draws the values of the new head, so that all trainings begin with the same.
    let base = base.train::<Train>().valid().train::<Train>();
    let texts = grammar::texts(&tokenizer, options.seed)?;
    Ok(Task {
        dataset: "generated",
        base,
        train: texts.train.into_iter().take(args.train_size).collect(),
        test: texts.test,
        old_test: vec![],
        modules_to_save: &[HEAD],
        targets: &ALL_LINEAR,
        sets: SETS,
        learning_rate: options.learning_rate,
        lora_learning_rate: options.lora_learning_rate,
        epochs: options.epochs,
    })
}
