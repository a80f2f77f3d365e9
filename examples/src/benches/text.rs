//! A classifier of texts on an encoder of the size of MiniLM (6 layers, width 384), 32 texts of 32
//! tokens.

use burn::{
    module::AutodiffModule,
    tensor::{Distribution, Tensor},
};
use burn_lora::{LoraConfig, LoraModule};
use burn_lora_llm::{
    bert::{
        Tokens,
        classifier::{ALL_LINEAR, HEAD, QUERY_VALUE, TextClassifier},
    },
    sizes::minilm,
};

use super::{
    measure::{Work, medians, print_header, print_row},
    train_step::step,
};
use crate::backend::Train;

pub fn run() {
    print_header(
        "Training step of a text classifier of MiniLM's size, 32 x 32 tokens, rank 8",
        &["method", "ms", "of full fine-tuning"],
    );
    let base = base();
    let times = medians(METHODS.map(|(_, step)| step(base.clone())).into());
    for ((method, _), time) in METHODS.iter().zip(&times) {
        let ratio = time / times[0];
        print_row(&[(*method).to_owned(), format!("{time:.0}"), format!("{ratio:.2}")]);
    }
    println!();
}

type Model = TextClassifier<Train>;

/// A way to train the model: its name, and a step of it.
type Method = (&'static str, fn(Model) -> Work<'static>);

pub const METHODS: [Method; 4] = [
    ("full fine-tuning", |base| work(base, |model| model)),
    ("LoRA, all linear layers", |base| with_adapters(base, &ALL_LINEAR)),
    ("LoRA, query and value", |base| with_adapters(base, &QUERY_VALUE)),
    ("head", |base| work(base.train_only(&[HEAD]).expect("there is a head"), |model| model)),
];

fn with_adapters(base: Model, targets: &[&str]) -> Work<'static> {
    let config = LoraConfig::new(8, 16.0).with_targets(targets.iter().copied());
    let model = base.attach(&config.with_modules_to_save([HEAD])).expect("it can be attached");
    work(model, |model| model)
}

pub fn base() -> Model {
    minilm::base(&Default::default())
}

/// A training step of a model, or of one with adapters.
pub fn work<M: AutodiffModule<Train> + 'static>(model: M, base: fn(&M) -> &Model) -> Work<'static> {
    let ids = Tensor::<Train, 2>::random([32, 32], Distribution::Default, &Default::default());
    let ids = (ids * 30_522.0).int();
    let padding = ids.zeros_like().bool();
    let tokens = Tokens { ids, padding };
    step(model, move |model| base(model).forward(&tokens))
}
