//! A training step with burn-lora.

use burn::{
    backend::Autodiff,
    nn::LinearConfig,
    optim::{AdamWConfig, GradientsParams, Optimizer},
    tensor::{Distribution, Tensor, activation::relu},
};
use burn_lora::{LoraConfig, LoraLinear, LoraModule, nn::Precision, quantize::Quantization};
use burn_lora_peers::{Task, precision, serve};

#[cfg(feature = "ndarray")]
type Plain = burn::backend::NdArray;
#[cfg(not(feature = "ndarray"))]
type Plain = burn::backend::Flex;

type Train = Autodiff<Plain>;

fn main() {
    let Task { method, tokens, width, rank } = Task::from_args();
    let device = Default::default();
    let config = LoraConfig::peft(rank, 16.0);
    let layer = |_| -> LoraLinear<Train> {
        let base = LinearConfig::new(width, width).init::<Train>(&device);
        let mut layer: LoraLinear<Train> =
            if method == "full" { base.into() } else { config.init(base) };
        layer.set_precision(precision());
        // As a file in bf16 is held.
        match precision() {
            Precision::Bf16 if method != "full" => {
                layer.quantize(Quantization::Bf16).expect("a linear layer").0
            }
            _ => layer,
        }
    };
    let layers: Vec<_> = (0..if method == "mlp" { 4 } else { 1 }).map(layer).collect();
    let mut optimizer = AdamWConfig::new().init();
    let data = Tensor::<Train, 2>::random([tokens, width], Distribution::Default, &device);
    serve(layers, |layers| {
        // As in the middle of a model, where gradients go on to what is below.
        let x = layers[0].forward(data.clone().require_grad());
        let y = layers[1..].iter().fold(x, |x, layer| layer.forward(relu(x)));
        let grads = GradientsParams::from_grads(y.square().mean().backward(), &layers);
        optimizer.step(1e-3, layers, grads)
    });
}
