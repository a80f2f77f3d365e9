//! The task of the example `mnist`: a base for upright digits is adapted to rotated ones.

use burn::{module::Module, tensor::backend::Backend};
use burn_lora::LoraModule;
use common::{
    Context, Result,
    backend::{Plain, Train},
    classifier::{Recipe, fit},
    digits::{Digits, rotate},
    mlp::Mlp,
};

use crate::{Args, task::Task};

const DEGREES: f64 = 60.0;

/// The number of images that the base is trained on, at most. More would only take longer.
const BASE_SIZE: usize = 12_000;
const BASE_EPOCHS: usize = 3;

const BASE_LEARNING_RATE: f64 = 1e-3;

/// About the best rates for these few steps: of full fine-tuning, and of LoRA at rank 8 and alpha 16.
pub const RATES: [&str; 2] = ["0.004", "0.01"];

/// Sets of layers. An adapter of rank 1 has 1296 parameters on `fc1`, 768 on `fc2` and 266 on `head`.
const SETS: &[(&str, &[&str])] = &[
    ("all", &["fc1", "fc2", "head"]),
    ("fc1", &["fc1"]),
    ("fc2", &["fc2"]),
    ("head", &["head"]),
    ("fc1, fc2", &["fc1", "fc2"]),
];

pub fn task(args: &Args) -> Result<Task<Mlp<Train>>> {
    let options = &args.options;
    let mut digits = Digits::load(args.data.as_deref(), args.generated, options.seed)?;
    digits.train.truncate(BASE_SIZE);
    Plain::seed(&Default::default(), options.seed);
    let base = Mlp::<Train>::new(&Default::default());
    let base = base.train_only(&[".*"]).context("training the base")?;
    let recipe = Recipe {
        epochs: BASE_EPOCHS,
        ..options.recipe("base: upright digits", BASE_LEARNING_RATE)
    };
    let (base, _) = fit(&recipe, base, &digits.train, &digits.test)?;
    let old_test = digits.test.clone();
    digits.train.truncate(args.train_size);
    let rotated = digits.map(|image| rotate(image, DEGREES));
    Ok(Task {
        dataset: digits.name,
        base: base.into_inner().train::<Train>(),
        train: rotated.train,
        test: rotated.test,
        old_test,
        modules_to_save: &[],
        targets: &[],
        sets: SETS,
        learning_rate: options.learning_rate,
        lora_learning_rate: options.lora_learning_rate,
        epochs: options.epochs,
    })
}
