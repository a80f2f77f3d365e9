//! Training steps of attention and convolutions, in turn with full fine-tuning and the overlay.

use burn::{
    nn::{
        PaddingConfig2d,
        attention::{MhaInput, MultiHeadAttentionConfig},
        conv::Conv2dConfig,
    },
    tensor::{Distribution, Tensor},
};
use burn_lora::{
    Lora, LoraConfig,
    nn::{LoraConv2d, LoraMhaInput},
};

use super::{
    measure::{Work, medians, print_header, print_row},
    train_step::step,
};
use crate::backend::Train;

/// What is measured: full fine-tuning, the layer with an adapter, and the overlay, if it is measured.
pub type Case = (&'static str, Vec<Work<'static>>);

pub fn run() {
    print_header(
        "Training step of other layers, rank 8",
        &["layer", "full, ms", "layer / full", "overlay / full"],
    );
    for (name, works) in cases() {
        let times = medians(works);
        let ratio = |index| times.get(index).map(|time| format!("{:.2}", time / times[0]));
        print_row(&[
            name.to_owned(),
            format!("{:.2}", times[0]),
            ratio(1).unwrap_or_default(),
            ratio(2).unwrap_or_default(),
        ]);
    }
    println!();
}

pub fn cases() -> [Case; 3] {
    [attention(), convolution(false), convolution(true)]
}

/// 16 sequences of 32 tokens, width 512, adapters of rank 8 on all four projections.
fn attention() -> Case {
    let device = Default::default();
    let base = MultiHeadAttentionConfig::new(512, 8).with_dropout(0.0).init::<Train>(&device);
    let config = LoraConfig::new(8, 16.0).with_targets(["query", "key", "value", "output"]);
    let overlay = Lora::overlay(base.clone()).attach(&config).expect("the targets are there");
    let layer = config.init_attention(base.clone());
    let x = Tensor::<Train, 3>::random([16, 32, 512], Distribution::Default, &device);
    // As in the middle of a model, where gradients go on to what is below.
    let x = move || x.clone().require_grad();
    let [x1, x2, x3] = [x.clone(), x.clone(), x];
    let works = vec![
        step(base, move |it| it.forward(MhaInput::self_attn(x1())).context),
        step(layer, move |it| it.forward(LoraMhaInput::self_attn(x2())).context),
        step(overlay, move |it| {
            it.with_adapters(|mha| mha.forward(MhaInput::self_attn(x3())).context)
        }),
    ];
    ("attention, 16 x 32 tokens, width 512, four projections", works)
}

/// 32 images of 32 x 32, 64 channels to 64, kernel 3 x 3, rank 8; as a model's first layer, or as a
/// later one, which passes gradients on.
fn convolution(later: bool) -> Case {
    let device = Default::default();
    let base = Conv2dConfig::new([64, 64], [3, 3])
        .with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1))
        .init::<Train>(&device);
    let layer: LoraConv2d<Train> = LoraConfig::new(8, 16.0).init(base.clone());
    let x = Tensor::<Train, 4>::random([32, 64, 32, 32], Distribution::Default, &device);
    let x = move || if later { x.clone().require_grad() } else { x.clone() };
    let works = vec![
        step(base, {
            let x = x.clone();
            move |it| it.forward(x())
        }),
        step(layer, move |it| it.forward(x())),
    ];
    let name = match later {
        true => "conv2d 64 to 64, 3 x 3, 32 images of 32 x 32, a later layer",
        false => "conv2d 64 to 64, 3 x 3, 32 images of 32 x 32, a first layer",
    };
    (name, works)
}
