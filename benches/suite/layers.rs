//! Training steps of attention and convolutions, in turn with full fine-tuning and the overlay.

use burn::{
    nn::{
        PaddingConfig2d,
        attention::{MhaInput, MultiHeadAttentionConfig},
        conv::Conv2dConfig,
    },
    tensor::{Distribution, Tensor},
};
use burn_lora::{Lora, LoraConfig, LoraConv2d, LoraMhaInput, LoraModule};

use crate::{
    backend::Train,
    measure::{Work, medians, print_header, print_row},
    train_step::step,
};

pub fn run() {
    print_header(
        "Training step of other layers, rank 8",
        &["layer", "full, ms", "layer / full", "overlay / full"],
    );
    attention();
    convolution(false);
    convolution(true);
    println!();
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
    let works: Vec<Work> = vec![
        step(base, |it| it.forward(MhaInput::self_attn(x())).context),
        step(layer, |it| it.forward(LoraMhaInput::self_attn(x())).context),
        step(overlay, |it| it.forward(|mha| mha.forward(MhaInput::self_attn(x())).context)),
    ];
    print("attention, 16 x 32 tokens, width 512, four projections", works);
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
    let works: Vec<Work> =
        vec![step(base, |it| it.forward(x())), step(layer, |it| it.forward(x()))];
    let place = if later { "later" } else { "first" };
    print(&format!("conv2d 64 to 64, 3 x 3, 32 images of 32 x 32, a {place} layer"), works);
}

fn print(name: &str, works: Vec<Work>) {
    let times = medians(works);
    let ratio = |index| times.get(index).map(|time: &f64| format!("{:.2}", time / times[0]));
    print_row(&[
        name.to_owned(),
        format!("{:.2}", times[0]),
        ratio(1).unwrap_or_default(),
        ratio(2).unwrap_or_default(),
    ]);
}
