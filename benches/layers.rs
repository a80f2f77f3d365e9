//! Training steps of layers with adapters, in turns with full fine-tuning of the same layers and with
//! the overlay: medians of the times, the memory that a step takes at its peak, and ratios.
//!
//! ```text
//! cargo bench --bench layers --no-default-features --features flex
//! ```

// Only a main function.
#![allow(missing_docs)]

#[path = "../examples/common/backend.rs"]
mod backend;

use std::time::Instant;

use burn::{
    module::AutodiffModule,
    nn::{
        PaddingConfig2d,
        attention::{MhaInput, MultiHeadAttentionConfig},
        conv::Conv2dConfig,
    },
    optim::{AdamWConfig, GradientsParams, Optimizer},
    tensor::{Distribution, Tensor},
};
use burn_lora::{Lora, LoraConfig, LoraConv2d, LoraMhaInput, LoraModule};
use peak_alloc::PeakAlloc;

use backend::Train;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

const ROUNDS: usize = 9;

fn main() {
    println!("backend {}, medians of {ROUNDS} in turn\n", backend::NAME);
    attention();
    convolution(false);
    convolution(true);
}

/// 16 sequences of 32 tokens, width 512, adapters of rank 8 on all four projections.
fn attention() {
    let device = Default::default();
    let base = MultiHeadAttentionConfig::new(512, 8).with_dropout(0.0).init::<Train>(&device);
    let config = LoraConfig::new(8, 16.0).with_targets(["query", "key", "value", "output"]);
    let overlay = Lora::new(base.clone()).attach(&config).expect("the targets are there");
    let layer = config.init_attention(base.clone());
    let x = Tensor::<Train, 3>::random([16, 32, 512], Distribution::Default, &device);
    // As in the middle of a model, where gradients go on to what is below.
    let x = || x.clone().require_grad();
    compare(
        "attention, 16 x 32 tokens, width 512, rank 8",
        vec![
            ("full fine-tuning", step(base, |it| it.forward(MhaInput::self_attn(x())).context)),
            (
                "overlay",
                step(overlay, |it| it.forward(|mha| mha.forward(MhaInput::self_attn(x())).context)),
            ),
            ("layer", step(layer, |it| it.forward(LoraMhaInput::self_attn(x())).context)),
        ],
    );
}

/// 32 images of 32 x 32, 64 channels to 64, kernel 3 x 3, rank 8; as a model's first layer, or as a
/// later one, which passes gradients on.
fn convolution(later: bool) {
    let device = Default::default();
    let base = Conv2dConfig::new([64, 64], [3, 3])
        .with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1))
        .init::<Train>(&device);
    let layer: LoraConv2d<Train> = LoraConfig::new(8, 16.0).init(base.clone());
    let x = Tensor::<Train, 4>::random([32, 64, 32, 32], Distribution::Default, &device);
    let x = || if later { x.clone().require_grad() } else { x.clone() };
    compare(
        if later { "conv2d 64 to 64, a later layer" } else { "conv2d 64 to 64, a first layer" },
        vec![
            ("full fine-tuning", step(base, |it| it.forward(x()))),
            ("layer", step(layer, |it| it.forward(x()))),
        ],
    );
}

/// Something to be timed.
type Step<'a> = Box<dyn FnMut() + 'a>;

/// A training step of the module, with AdamW.
fn step<'a, M: AutodiffModule<Train> + 'a, const D: usize>(
    module: M,
    forward: impl Fn(&M) -> Tensor<Train, D> + 'a,
) -> Step<'a> {
    let mut optimizer = AdamWConfig::new().init::<Train, M>();
    let mut module = Some(module);
    Box::new(move || {
        let current = module.take().expect("it is always put back");
        let loss = forward(&current).square().mean();
        let grads = GradientsParams::from_grads(loss.backward(), &current);
        module = Some(optimizer.step(1e-3, current, grads));
        // To read the loss is to wait for the device.
        loss.into_data();
    })
}

fn compare(title: &str, mut steps: Vec<(&str, Step)>) {
    let mut times = vec![Vec::new(); steps.len()];
    let mut peaks = vec![0.0f32; steps.len()];
    for round in 0..=ROUNDS {
        for (index, (_, step)) in steps.iter_mut().enumerate() {
            let held = MEMORY.current_usage_as_mb();
            MEMORY.reset_peak_usage();
            let start = Instant::now();
            step();
            // The first round warms up.
            if round > 0 {
                times[index].push(start.elapsed().as_secs_f64());
                peaks[index] = peaks[index].max(MEMORY.peak_usage_as_mb() - held);
            }
        }
    }
    let medians: Vec<_> = times
        .into_iter()
        .map(|mut times| {
            times.sort_by(f64::total_cmp);
            times[ROUNDS / 2]
        })
        .collect();
    println!("{title}");
    for (index, (name, _)) in steps.iter().enumerate() {
        println!(
            "  {name:<18}{:8.1} ms  {:5.2} of full   peak {:7.1} MB  {:5.2} of full",
            1e3 * medians[index],
            medians[index] / medians[0],
            peaks[index],
            peaks[index] / peaks[0],
        );
    }
}
