//! The memory that training takes: what a layer holds for the backward pass, and what a step takes at
//! its peak. Prints tables in Markdown.
//!
//! ```text
//! cargo bench --bench memory --no-default-features --features flex
//! ```

// Only a main function.
#![allow(missing_docs)]

use std::process::ExitCode;

use burn::{
    module::AutodiffModule,
    nn::LinearConfig,
    tensor::{Distribution, Tensor},
};
use burn_lora::{Lora, LoraAdapters, LoraConfig, LoraLinear, LoraModule};
use burn_lora_llm::{loss::gradients, sizes::smollm2};
use common::{
    backend::{self, Plain, Train},
    benches::{
        layers,
        measure::{self, print_header, print_row},
        models::{Mlp, Single},
        text,
        train_step::step,
    },
};
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

fn main() -> ExitCode {
    if let Err(error) = backend::check() {
        eprintln!("error: {error}");
        return ExitCode::FAILURE;
    }
    println!("{}\n", measure::machine());
    held();
    peak();
    text();
    decoder();
    resident();
    other_layers();
    ExitCode::SUCCESS
}

/// What is held between the forward and the backward pass, beyond the output.
fn held() {
    let [tokens, width, rank] = [2048, 1024, 16];
    let device = Default::default();
    let base = LinearConfig::new(width, width).init::<Train>(&device);
    let config = LoraConfig::new(rank, 16.0);
    let lora: LoraLinear<Train> = config.init(base.clone());
    let dense =
        Lora::overlay(Single { fc: base.clone() }).attach(&config).expect("it can be attached");

    print_header(
        &format!(
            "Held for the backward pass by a layer: {tokens} tokens, width {width}, rank {rank}"
        ),
        &["method", "MB", "in inputs of the layer"],
    );
    let x = Tensor::<Train, 2>::random([tokens, width], Distribution::Default, &device);
    let bytes = |forward: &dyn Fn(Tensor<Train, 2>) -> Tensor<Train, 2>| {
        // Parameters are drawn when they are first used.
        forward(x.clone());
        let before = MEMORY.current_usage();
        // The layer's input is what another layer gave, and that nobody else holds.
        let y = forward(x.clone().require_grad().mul_scalar(2.0));
        let held = MEMORY.current_usage() - before - 4 * y.shape().num_elements();
        y.sum().backward();
        held
    };
    let input = 4 * tokens * width;
    for (method, held) in [
        ("full fine-tuning", bytes(&|x| base.forward(x))),
        ("LoRA", bytes(&|x| lora.forward(x))),
        ("dense `W + s·A·B`", bytes(&|x| dense.with_adapters(|single| single.fc.forward(x)))),
    ] {
        print_row(&[
            method.to_owned(),
            format!("{:.2}", held as f64 / 1e6),
            format!("{:.3}", held as f64 / input as f64),
        ]);
    }
    println!();
}

/// What training takes at its peak, model and optimizer included.
fn peak() {
    let device = Default::default();
    let config = LoraConfig::new(8, 16.0);
    let new = || Mlp::<Train>::new(4, 2048, &device);
    let peaks = [
        ("full fine-tuning", trained(new, |model| model)),
        ("LoRA", trained(|| new().attach(&config).expect("it can be attached"), |model| model)),
        ("last layer", trained(|| new().train_only(&["head"]).expect("it has one"), |model| model)),
    ];
    print_header(
        "Training at its peak, model and optimizer included: MLP of 4 layers, the head among them, 256 tokens, width 2048, rank 8",
        &["method", "MB", "of full fine-tuning"],
    );
    for (method, peak) in peaks {
        print_row(&[
            method.to_owned(),
            format!("{:.1}", peak as f64 / 1e6),
            format!("{:.2}", peak as f64 / peaks[0].1 as f64),
        ]);
    }
    println!();
}

/// The most bytes that were in use during training, beyond those before the model was made.
fn trained<M: AutodiffModule<Train>>(
    model: impl FnOnce() -> M,
    base: fn(&M) -> &Mlp<Train>,
) -> usize {
    let x = Tensor::<Train, 2>::random([256, 2048], Distribution::Default, &Default::default());
    let before = MEMORY.current_usage();
    peak_of(&mut *step(model(), move |model| base(model).forward(x.clone()))) - before
}

/// What training a text classifier takes at its peak, model and optimizer included.
fn text() {
    print_header(
        "Training at its peak, model and optimizer included: text classifier of MiniLM's size, 32 x 32 \
         tokens, rank 8",
        &["method", "MB", "of full fine-tuning"],
    );
    let mut full = None;
    for (method, step) in text::METHODS {
        let before = MEMORY.current_usage();
        let peak = (peak_of(&mut *step(text::base())) - before) as f64;
        let ratio = peak / *full.get_or_insert(peak);
        print_row(&[method.to_owned(), format!("{:.1}", peak / 1e6), format!("{ratio:.2}")]);
    }
    println!();
}

/// What a step of a language model takes beyond what is there before it.
fn decoder() {
    let base = smollm2::base::<Train>(&Default::default());
    let config = LoraConfig::peft(8, 16.0).with_targets(smollm2::LAYERS);
    let model = base.attach(&config).expect("it has these layers");
    let texts = smollm2::texts(4);
    let rows: Vec<_> = texts.iter().map(|text| vec![text]).collect();
    let peak = |segmented| {
        let step = || drop(gradients(&model, &rows, segmented));
        step();
        let before = MEMORY.current_usage();
        (peak_of(&mut { step }) - before) as f64
    };
    let plain = peak(false);
    print_header(
        "Peak of a forward and backward pass of a language model of SmolLM2-135M's size, LoRA of rank 8, 4 x \
         128 tokens, beyond the weights",
        &["method", "MB", "of the plain pass"],
    );
    for (method, peak) in [("plain", plain), ("segments", peak(true))] {
        let ratio = format!("{:.3}", peak / plain);
        print_row(&[method.to_owned(), format!("{:.1}", peak / 1e6), ratio]);
    }
    println!();
}

/// What sets of adapters take in memory, beside the bytes of their parameters.
fn resident() {
    const SETS: usize = 100;
    let device = Default::default();
    let dir = tempfile::tempdir().expect("there is room for a directory");
    let config = LoraConfig::peft(8, 16.0).with_targets(smollm2::LAYERS);
    let adapted = smollm2::base::<Train>(&device).attach(&config).expect("it has these layers");
    adapted.adapters().save(dir.path()).expect("there is room for a set");
    let load = || LoraAdapters::<Plain>::load(dir.path(), &device).expect("it was just saved");
    let bytes = SETS * load().num_bytes();
    let before = MEMORY.current_usage();
    let sets: Vec<_> = (0..SETS).map(|_| load()).collect();
    let held = MEMORY.current_usage() - before;
    print_header(
        "Adapters in memory, of all linear layers of SmolLM2-135M, rank 8",
        &["sets", "parameters, MB", "held, MB", "ratio"],
    );
    print_row(&[
        sets.len().to_string(),
        format!("{:.1}", bytes as f64 / 1e6),
        format!("{:.1}", held as f64 / 1e6),
        format!("{:.3}", held as f64 / bytes as f64),
    ]);
    println!();
}

/// What a step of other layers takes beyond what is there before it.
fn other_layers() {
    print_header(
        "Peak of a training step of other layers, rank 8, beyond model and optimizer",
        &["layer", "full, MB", "layer / full", "overlay / full"],
    );
    for (name, mut works) in layers::cases() {
        let peaks: Vec<_> = works
            .iter_mut()
            .map(|work| {
                work();
                let before = MEMORY.current_usage();
                (peak_of(&mut **work) - before) as f64
            })
            .collect();
        let ratio = |index| peaks.get(index).map(|peak: &f64| format!("{:.2}", peak / peaks[0]));
        print_row(&[
            name.to_owned(),
            format!("{:.1}", peaks[0] / 1e6),
            ratio(1).unwrap_or_default(),
            ratio(2).unwrap_or_default(),
        ]);
    }
    println!();
}

/// The most bytes that were in use during three calls.
fn peak_of(work: &mut dyn FnMut()) -> usize {
    MEMORY.reset_peak_usage();
    for _ in 0..3 {
        work();
    }
    MEMORY.peak_usage()
}
