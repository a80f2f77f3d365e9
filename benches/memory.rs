//! The memory that training takes: what a layer holds for the backward pass, and what a step takes at
//! its peak. Prints tables in Markdown.
//!
//! ```text
//! cargo bench --bench memory --no-default-features --features flex
//! ```

// Only a main function.
#![allow(missing_docs)]

#[path = "../examples/common/backend.rs"]
mod backend;
#[path = "suite/measure.rs"]
mod measure;
#[path = "suite/models.rs"]
mod models;

use std::process::ExitCode;

use burn::{
    nn::LinearConfig,
    optim::{AdamWConfig, GradientsParams, Optimizer},
    tensor::{Distribution, Tensor},
};
use burn_lora::{Lora, LoraConfig, LoraLinear, LoraModule};
use peak_alloc::PeakAlloc;

use backend::Train;
use measure::{print_header, print_row};
use models::{Mlp, Single};

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
    ExitCode::SUCCESS
}

/// What is held between the forward and the backward pass, beyond the output.
fn held() {
    let [tokens, width, rank] = [2048, 1024, 16];
    let device = Default::default();
    let base = LinearConfig::new(width, width).init::<Train>(&device);
    let config = LoraConfig::new(rank, 16.0);
    let lora: LoraLinear<Train> = config.init(base.clone());
    let dense = Lora::new(Single { fc: base.clone() }).attach(&config).expect("it can be attached");

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
        ("dense `W + s·A·B`", bytes(&|x| dense.forward(|single| single.fc.forward(x)))),
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
    let x = Tensor::<Train, 2>::random([256, 2048], Distribution::Default, &device);
    let config = LoraConfig::new(8, 16.0);
    let adapted = |model: Mlp<Train>| model.attach(&config).expect("it can be attached");
    let full = trained(|| Mlp::new(4, 2048, &device), &x);
    let lora = trained(|| adapted(Mlp::new(4, 2048, &device)), &x);
    let last = trained(|| Mlp::new(4, 2048, &device).only_head(), &x);
    print_header(
        "Training at its peak, model and optimizer included: 4-layer MLP, 256 tokens, width 2048, rank 8",
        &["method", "MB", "of full fine-tuning"],
    );
    for (method, peak) in [("full fine-tuning", full), ("LoRA", lora), ("last layer", last)] {
        print_row(&[
            method.to_owned(),
            format!("{:.1}", peak as f64 / 1e6),
            format!("{:.2}", peak as f64 / full as f64),
        ]);
    }
    println!();
}

/// The most bytes that were in use during three steps with AdamW.
fn trained(model: impl FnOnce() -> Mlp<Train>, x: &Tensor<Train, 2>) -> usize {
    let before = MEMORY.current_usage();
    let mut model = model();
    let mut optimizer = AdamWConfig::new().init();
    MEMORY.reset_peak_usage();
    for _ in 0..3 {
        let loss = model.forward(x.clone()).square().mean();
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(1e-3, model, grads);
    }
    MEMORY.peak_usage() - before
}
