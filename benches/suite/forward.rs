//! Inference: a plain layer, the layer with an adapter, and the layer that it is merged into.

use burn::{
    nn::LinearConfig,
    tensor::{Distribution, Tensor},
};
use burn_lora::{Init, Lora, LoraConfig, LoraLinear};
use common::{
    backend::Plain,
    benches::{
        measure::{Work, medians, print_header, print_row},
        models::Single,
        train_step::SHAPES,
    },
};

pub fn run() {
    print_header(
        "Forward pass, without gradients",
        &["tokens, width, rank", "`Linear`, ms", "with an adapter", "merged"],
    );
    for [tokens, width, rank] in SHAPES {
        let device = Default::default();
        let x = Tensor::<Plain, 2>::random([tokens, width], Distribution::Default, &device);
        let base = LinearConfig::new(width, width).init::<Plain>(&device);
        let config = LoraConfig::new(rank, 16.0).with_init(Init::RandomBoth);
        let layer: LoraLinear<Plain> = config.init(base.clone());
        let merged = Lora::new(layer.clone()).merge().expect("it is finite");
        let works: Vec<Work> = vec![
            Box::new(|| drop(base.forward(x.clone()))),
            Box::new(|| drop(layer.forward(x.clone()))),
            Box::new(|| drop(merged.forward(x.clone()))),
        ];
        let times = medians(works);
        print_row(&[
            format!("{tokens}, {width}, {rank}"),
            format!("{:.2}", times[0]),
            format!("{:.2}", times[1] / times[0]),
            format!("{:.2}", times[2] / times[0]),
        ]);
    }
    println!();
    overlay();
}

/// What the overlay takes to infer: it composes the weights in its first pass, and keeps them.
fn overlay() {
    let device = Default::default();
    let x = Tensor::<Plain, 2>::random([1, 1024], Distribution::Default, &device);
    let base = Single { fc: LinearConfig::new(1024, 1024).init::<Plain>(&device) };
    let config = LoraConfig::new(8, 16.0).with_init(Init::RandomBoth);
    let fresh = Lora::overlay(base).attach(&config).expect("it can be attached");
    let merged: Single<Plain> = fresh.merge().expect("it is finite");
    let (first, later) = (fresh.clone(), fresh);
    later.with_adapters(|single| single.fc.forward(x.clone()));
    let works: Vec<Work> = vec![
        Box::new(|| drop(merged.fc.forward(x.clone()))),
        Box::new(|| drop(first.clone().with_adapters(|single| single.fc.forward(x.clone())))),
        Box::new(|| drop(later.with_adapters(|single| single.fc.forward(x.clone())))),
    ];
    let times = medians(works);
    print_header(
        "Inference with the overlay, one row, width 1024, rank 8",
        &["merged, ms", "first pass / merged", "later pass / merged"],
    );
    print_row(&[
        format!("{:.3}", times[0]),
        format!("{:.1}", times[1] / times[0]),
        format!("{:.2}", times[2] / times[0]),
    ]);
    println!();
}
