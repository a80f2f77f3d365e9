//! How the programs are talked to.

use std::{env, io::stdin, time::Instant};

use burn_lora::nn::Precision;

/// As in the examples and benches of burn-lora.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What the command line asks for: `METHOD TOKENS WIDTH RANK`.
pub struct Task {
    /// `lora`, `full`, or `mlp`: LoRA on four layers, with ReLU between them.
    pub method: String,
    /// Rows of the input.
    pub tokens: usize,
    /// Inputs and outputs of the layer.
    pub width: usize,
    /// Rank of the adapters.
    pub rank: usize,
}

impl Task {
    /// Reads the command line.
    pub fn from_args() -> Self {
        let args: Vec<String> = env::args().skip(1).collect();
        let [method, tokens, width, rank] = &args[..] else {
            panic!("expected METHOD TOKENS WIDTH RANK, got {args:?}")
        };
        let [tokens, width, rank] =
            [tokens, width, rank].map(|it| it.parse().expect("sizes are whole numbers"));
        Self { method: method.clone(), tokens, width, rank }
    }
}

/// The precision of products that the variable `PRECISION` names: `f32`, which is the default, or `bf16`.
pub fn precision() -> Precision {
    match env::var("PRECISION").as_deref() {
        Ok("bf16") => Precision::Bf16,
        Ok("f32") | Err(_) => Precision::F32,
        Ok(other) => panic!("PRECISION is f32 or bf16, got {other}"),
    }
}

/// Warms up, says `ready`, and then answers each line that comes, a number of steps, with the seconds that each
/// of them took. The variable `WARM_UP` says how many steps come first, by default 3.
pub fn serve<L>(mut layer: L, mut step: impl FnMut(L) -> L) {
    let warm_up = env::var("WARM_UP").map_or(3, |it| it.parse().expect("a number of steps"));
    for _ in 0..warm_up {
        layer = step(layer);
    }
    println!("ready");
    for line in stdin().lines() {
        let steps: usize = line.expect("a line").trim().parse().expect("a number of steps");
        let mut times = Vec::new();
        for _ in 0..steps {
            let start = Instant::now();
            layer = step(layer);
            times.push(start.elapsed().as_secs_f64().to_string());
        }
        println!("{}", times.join(" "));
    }
}
