//! What the relatives of LoRA cost beside it: steps, and initial values.

use std::time::Instant;

use burn::{
    nn::LinearConfig,
    tensor::{Distribution, Tensor},
};
use burn_lora::{Init, LoraConfig, LoraLinear, LoraModule};
use burn_lora_llm::{
    bert::{
        Tokens,
        classifier::{ALL_LINEAR, HEAD},
    },
    sizes::minilm,
};
use common::{
    backend::{Plain, Train},
    benches::{
        measure::{Work, medians, print_header, print_row},
        text,
        train_step::{SHAPES, step},
    },
};

/// What is compared with plain LoRA.
fn methods(rank: usize) -> [(&'static str, LoraConfig); 4] {
    let config = LoraConfig::new(rank, 16.0);
    [
        ("LoRA", config.clone()),
        ("DoRA", config.clone().with_dora(true)),
        ("PiSSA", config.clone().with_init(Init::PissaRandomized { iterations: 16 })),
        ("LoRA-FA", config.with_freeze_a(true)),
    ]
}

pub fn run() {
    steps();
    initial_values();
}

fn steps() {
    let columns = ["step", "LoRA, ms", "DoRA / LoRA", "PiSSA / LoRA", "LoRA-FA / LoRA"];
    print_header("Training steps of the relatives of LoRA", &columns);
    let print = |name: String, works: Vec<Work>| {
        let times = medians(works);
        let ratios = times[1..].iter().map(|time| format!("{:.2}", time / times[0]));
        let cells: Vec<_> = [name, format!("{:.2}", times[0])].into_iter().chain(ratios).collect();
        print_row(&cells);
    };
    for [tokens, width, rank] in SHAPES {
        let device = Default::default();
        let x = Tensor::<Train, 2>::random([tokens, width], Distribution::Default, &device);
        let base = LinearConfig::new(width, width).init::<Train>(&device);
        let works = methods(rank).map(|(_, config)| {
            let (layer, x): (LoraLinear<Train>, _) = (config.init(base.clone()), x.clone());
            step(layer, move |layer| layer.forward(x.clone().require_grad()))
        });
        print(format!("linear layer, {tokens}, {width}, {rank}"), works.into());
    }
    let base = text::base();
    let works = methods(8).map(|(_, config)| {
        let config = config.with_targets(ALL_LINEAR).with_modules_to_save([HEAD]);
        text::work(base.attach(&config).expect("it can be attached"), |model| model)
    });
    print("text classifier of MiniLM's size, all linear layers, rank 8".to_owned(), works.into());
    println!();
}

/// Once each: they take from a second to half a minute.
fn initial_values() {
    let columns = ["initial values", "seconds"];
    print_header("Adapters of rank 8 on all linear layers of MiniLM's size", &columns);
    let base = minilm::base::<Plain>(&Default::default());
    let config = |init| LoraConfig::peft(8, 16.0).with_targets(ALL_LINEAR).with_init(init);
    let row = |name: &str, attach: &dyn Fn()| {
        let start = Instant::now();
        attach();
        print_row(&[name.to_owned(), format!("{:.2}", start.elapsed().as_secs_f64())]);
    };
    for (name, init) in [
        ("Kaiming", Init::KaimingUniform),
        ("orthogonal", Init::Orthogonal),
        ("OLoRA", Init::Olora),
        ("PiSSA, 16 iterations", Init::PissaRandomized { iterations: 16 }),
        ("PiSSA, all singular values", Init::Pissa),
    ] {
        row(name, &|| drop(base.attach(&config(init)).expect("it can be attached")));
    }
    let tokens = || {
        let ids = Tensor::<Plain, 2>::random([32, 32], Distribution::Default, &Default::default());
        let ids = (ids * minilm::VOCAB_SIZE as f32).int();
        Tokens { padding: ids.zeros_like().bool(), ids }
    };
    row("EVA, one pass over 512 texts of 32 tokens", &|| {
        let attached = base.attach_eva(&config(Init::KaimingUniform), 2.0, |model| {
            for _ in 0..512 / 32 {
                model.forward(&tokens());
            }
        });
        drop(attached.expect("it can be attached"));
    });
    println!();
}
