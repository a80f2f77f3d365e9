//! A training step with burn-lora.

use burn::{
    backend::Autodiff,
    nn::LinearConfig,
    optim::{AdamWConfig, GradientsParams, Optimizer},
    tensor::{Distribution, Tensor},
};
use burn_lora::{LoraConfig, LoraLinear};
use burn_lora_peers::{Task, serve};

#[cfg(feature = "ndarray")]
type Plain = burn::backend::NdArray;
#[cfg(not(feature = "ndarray"))]
type Plain = burn::backend::Flex;

type Train = Autodiff<Plain>;

fn main() {
    let Task { method, tokens, width, rank } = Task::from_args();
    let device = Default::default();
    let base = LinearConfig::new(width, width).init::<Train>(&device);
    let config = LoraConfig::peft(rank, 16.0);
    let layer: LoraLinear<Train> = match method.as_str() {
        "lora" => config.init(base),
        _ => base.into(),
    };
    let mut optimizer = AdamWConfig::new().init();
    let data = Tensor::<Train, 2>::random([tokens, width], Distribution::Default, &device);
    serve(layer, |layer| {
        // As in the middle of a model, where gradients go on to what is below.
        let x = data.clone().require_grad();
        let loss = layer.forward(x).square().mean();
        let grads = GradientsParams::from_grads(loss.backward(), &layer);
        optimizer.step(1e-3, layer, grads)
    });
}
