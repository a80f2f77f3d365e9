//! A base in 4 and 8 bits beside one in full: training steps, and a token at a time.

use burn::{
    nn::LinearConfig,
    tensor::{Distribution, Tensor, backend::Backend},
};
use burn_lora::{Init, LoraConfig, LoraLinear, LoraModule, quantize::Quantization};
use common::{
    backend::{Plain, Train},
    benches::{
        measure::{Work, medians, print_header, print_row},
        train_step::step,
    },
};

const DEPTH: usize = 8;

pub fn run() {
    let device = Default::default();
    print_header(
        "Base of 8 linear layers in 4 and 8 bits, LoRA of rank 8 on all",
        &["rows, width", "what", "f32, ms", "int8 / f32", "NF4 / f32"],
    );
    let config = LoraConfig::new(8, 16.0).with_init(Init::RandomBoth);
    for [rows, width] in [[512, 1024], [1024, 576]] {
        let x = Tensor::<Train, 2>::random([rows, width], Distribution::Default, &device);
        let steps = bases::<Train>(width).map(|base| {
            let x = x.clone();
            let adapted = base.attach(&config).expect("it can be attached");
            step(adapted, move |layers| forward(layers, x.clone()))
        });
        print(&format!("{rows}, {width}"), "training step", steps);
    }
    for width in [1024, 2048] {
        let x = Tensor::<Plain, 2>::random([1, width], Distribution::Default, &device);
        let passes = bases::<Plain>(width).map(|base| {
            let x = x.clone();
            let adapted = base.attach(&config).expect("it can be attached");
            Box::new(move || drop(forward(&adapted, x.clone()))) as Work
        });
        print(&format!("1, {width}"), "forward pass", passes);
    }
    println!();
}

fn print(size: &str, what: &str, works: [Work; 3]) {
    let times = medians(works.into());
    print_row(&[
        size.to_owned(),
        what.to_owned(),
        format!("{:.2}", times[0]),
        format!("{:.2}", times[1] / times[0]),
        format!("{:.2}", times[2] / times[0]),
    ]);
}

/// The same layers in full, in 8 and in 4 bits.
fn bases<B: Backend>(width: usize) -> [Vec<LoraLinear<B>>; 3] {
    let device = Default::default();
    let layer = || LinearConfig::new(width, width).init::<B>(&device).into();
    let base: Vec<LoraLinear<B>> = (0..DEPTH).map(|_| layer()).collect();
    let [int8, nf4] = [Quantization::Int8, Quantization::Nf4]
        .map(|to| base.quantize(to).expect("the weights are finite").0);
    [base, int8, nf4]
}

fn forward<B: Backend>(layers: &[LoraLinear<B>], x: Tensor<B, 2>) -> Tensor<B, 2> {
    layers.iter().fold(x, |x, layer| layer.forward(x))
}
