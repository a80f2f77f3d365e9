//! Training steps with AdamW: full fine-tuning, LoRA, and LoRA by the dense `W + s·A·B`.

use burn::{
    module::AutodiffModule,
    nn::LinearConfig,
    optim::{AdamWConfig, GradientsParams, Optimizer},
    tensor::{Distribution, Tensor},
};
use burn_lora::{Lora, LoraConfig, LoraLinear, LoraModule};

use super::{
    measure::{Work, medians, print_header, print_row},
    models::{Block, Mlp, Single},
};
use crate::backend::{Plain, Train};

/// Tokens, width and rank.
pub const SHAPES: [[usize; 3]; 5] =
    [[64, 784, 8], [256, 1024, 8], [512, 768, 8], [512, 4096, 8], [2048, 1024, 16]];

pub fn run() {
    layers(true);
    layers(false);
    models();
}

/// A layer by itself, at the bottom of a model or further up, where it passes gradients on.
fn layers(later: bool) {
    print_header(
        match later {
            true => "Training step of a later layer, which passes gradients on",
            false => "Training step of a first layer",
        },
        &[
            "tokens, width, rank",
            "full, ms",
            "LoRA, ms",
            "LoRA / full",
            "dense / full",
            "LoRA / its own arithmetic",
        ],
    );
    for [tokens, width, rank] in SHAPES {
        let times = medians(single_layer([tokens, width, rank], later));
        let [product, full, lora, dense] = times[..] else { unreachable!("four are measured") };
        let (large, skinny) = if later { (2, 6) } else { (1, 5) };
        let arithmetic = product * (large as f64 + (skinny * rank) as f64 / width as f64);
        print_row(&[
            format!("{tokens}, {width}, {rank}"),
            format!("{full:.2}"),
            format!("{lora:.2}"),
            format!("{:.2}", lora / full),
            format!("{:.2}", dense / full),
            format!("{:.2}", lora / arithmetic),
        ]);
    }
    println!();
}

/// One product of tokens and weight, and the steps.
fn single_layer([tokens, width, rank]: [usize; 3], later: bool) -> Vec<Work<'static>> {
    let device = Default::default();
    let x = Tensor::<Train, 2>::random([tokens, width], Distribution::Default, &device);
    let plain = x.clone().inner();
    let x = move || if later { x.clone().require_grad() } else { x.clone() };
    let base = LinearConfig::new(width, width).init::<Train>(&device);
    let weight = base.weight.val().inner();
    let config = LoraConfig::new(rank, 16.0);
    let lora: LoraLinear<Train> = config.init(base.clone());
    let dense =
        Lora::overlay(Single { fc: base.clone() }).attach(&config).expect("it can be attached");
    vec![
        Box::new(move || drop::<Tensor<Plain, 2>>(plain.clone().matmul(weight.clone()))),
        step(base, {
            let x = x.clone();
            move |it| it.forward(x())
        }),
        step(lora, {
            let x = x.clone();
            move |it| it.forward(x())
        }),
        step(dense, move |it| it.with_adapters(|single| single.fc.forward(x()))),
    ]
}

fn models() {
    let device = Default::default();
    print_header(
        "Training step of a model",
        &["model", "full, ms", "LoRA / full", "last layer / full"],
    );
    let mlp = Mlp::new(4, 2048, &device);
    let x = Tensor::<Train, 2>::random([256, 2048], Distribution::Default, &device);
    let config = LoraConfig::new(8, 16.0);
    let x = || x.clone();
    let adapted = mlp.attach(&config).expect("it can be attached");
    let head = mlp.train_only(&["head"]).expect("there is a head");
    let works = [
        step(mlp, |it| it.forward(x())),
        step(adapted, |it| it.forward(x())),
        step(head, |it| it.forward(x())),
    ];
    print_model("MLP of 4 layers, the head among them, 256 tokens, width 2048, rank 8", works);

    let block = Block::new(512, 8, &device);
    let x = Tensor::<Train, 3>::random([16, 64, 512], Distribution::Default, &device);
    let x = || x.clone();
    let adapted = block.attach(&config).expect("it can be attached");
    let head = block.train_only(&["head"]).expect("there is a head");
    let works = [
        step(block, |it| it.forward(x())),
        step(adapted, |it| it.forward(x())),
        step(head, |it| it.forward(x())),
    ];
    print_model("transformer block, 16 x 64 tokens, width 512, rank 8", works);
    println!();
}

fn print_model(name: &str, works: [Work; 3]) {
    let times = medians(works.into());
    print_row(&[
        name.to_owned(),
        format!("{:.2}", times[0]),
        format!("{:.2}", times[1] / times[0]),
        format!("{:.2}", times[2] / times[0]),
    ]);
}

/// A training step of the module, with AdamW.
pub fn step<'a, M: AutodiffModule<Train> + 'a, const D: usize>(
    module: M,
    forward: impl Fn(&M) -> Tensor<Train, D> + 'a,
) -> Work<'a> {
    let mut optimizer = AdamWConfig::new().init::<Train, M>();
    let mut module = Some(module);
    Box::new(move || {
        let current = module.take().expect("it is always put back");
        let loss = forward(&current).square().mean();
        let grads = GradientsParams::from_grads(loss.backward(), &current);
        module = Some(optimizer.step(1e-3, current, grads));
    })
}
