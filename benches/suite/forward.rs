//! Inference: a plain layer, the layer with an adapter, and the layer that it is merged into.

use burn::{
    nn::LinearConfig,
    tensor::{Distribution, Tensor},
};
use burn_lora::{Init, Lora, LoraConfig, LoraLinear};

use crate::{
    backend::Plain,
    measure::{Work, medians, print_header, print_row},
    train_step::SHAPES,
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
}
