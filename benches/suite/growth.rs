//! How the time of a training step grows with rank, tokens and layers.

use std::path::Path;

use burn::tensor::{Distribution, Tensor};
use burn_lora::{LoraConfig, LoraModule};
use common::{
    backend::Train,
    benches::{
        measure::{Work, medians, print_header, print_row},
        models::Mlp,
        train_step::step,
    },
    cli::plot::{Panel, SeriesLabelPosition, draw},
};

const WIDTH: usize = 512;

/// What is varied, and where it starts.
#[derive(Clone, Copy)]
struct Size {
    rank: usize,
    tokens: usize,
    layers: usize,
}

const USUAL: Size = Size { rank: 8, tokens: 512, layers: 4 };

/// Measures, and draws the figure if it has a place to go.
pub fn run(plot: Option<&Path>) {
    print_header(
        &format!("Training step of an MLP of width {WIDTH}, by size"),
        &["rank", "tokens", "layers", "full, ms", "LoRA, ms"],
    );
    let ranks = [1, 8, 16, 32, 64, 128, 192, 256];
    let tokens = [64, 256, 512, 768, 1024, 1536, 2048];
    let layers = [2, 4, 6, 8, 12, 16];
    let panels = [
        ("rank", series(&ranks, |rank| Size { rank, ..USUAL })),
        ("tokens", series(&tokens, |tokens| Size { tokens, ..USUAL })),
        ("layers", series(&layers, |layers| Size { layers, ..USUAL })),
    ];
    println!();
    let Some(path) = plot else { return };
    let panels = panels.map(|(x, curves)| Panel {
        title: match x {
            "rank" => "512 tokens, 4 layers",
            "tokens" => "rank 8, 4 layers",
            _ => "rank 8, 512 tokens",
        },
        x,
        y: "training step, ms",
        curves,
        marks: true,
        from_zero: true,
        legend: SeriesLabelPosition::UpperLeft,
    });
    draw(path, &panels).unwrap_or_else(|error| panic!("{error}"));
    println!("Drawn to {}\n", path.display());
}

/// The times of full fine-tuning and of LoRA at each of the values.
fn series(values: &[usize], size: impl Fn(usize) -> Size) -> Vec<(&'static str, Vec<(f64, f64)>)> {
    let (mut full, mut lora) = (Vec::new(), Vec::new());
    for &value in values {
        let size = size(value);
        let times = measure(size);
        full.push((value as f64, times[0]));
        lora.push((value as f64, times[1]));
        print_row(&[
            size.rank.to_string(),
            size.tokens.to_string(),
            size.layers.to_string(),
            format!("{:.2}", times[0]),
            format!("{:.2}", times[1]),
        ]);
    }
    vec![("full fine-tuning", full), ("LoRA", lora)]
}

fn measure(Size { rank, tokens, layers }: Size) -> Vec<f64> {
    let device = Default::default();
    let x = Tensor::<Train, 2>::random([tokens, WIDTH], Distribution::Default, &device);
    let full = Mlp::new(layers, WIDTH, &device);
    let config = LoraConfig::new(rank, 16.0);
    let lora = full.attach(&config).expect("it can be attached");
    let by_lora = x.clone();
    let works: Vec<Work> = vec![
        step(full, move |model| model.forward(x.clone())),
        step(lora, move |model| model.forward(by_lora.clone())),
    ];
    medians(works)
}
