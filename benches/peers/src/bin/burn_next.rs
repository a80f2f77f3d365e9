//! A training step with the LoRA that Burn 0.22 has built in.

use burn_lora_peers::{Task, serve};
use burn_next::{
    module::{Lora, Module},
    nn::LinearConfig,
    optim::{AdamWConfig, GradientsParams},
    tensor::{Device, Distribution, Tensor},
};

fn main() {
    let Task { method, tokens, width, rank } = Task::from_args();
    #[cfg(feature = "ndarray")]
    let device = Device::ndarray().autodiff();
    #[cfg(not(feature = "ndarray"))]
    let device = Device::flex().autodiff();
    let base = LinearConfig::new(width, width).init(&device);
    let layer = match method.as_str() {
        "lora" => base.apply_lora(Lora::new(rank, 16.0)),
        _ => base,
    };
    let mut optimizer = AdamWConfig::new().init();
    let data = Tensor::<2>::random([tokens, width], Distribution::Default, &device);
    serve(layer, |layer| {
        let x = data.clone().require_grad();
        let loss = layer.forward(x).square().mean();
        let grads = GradientsParams::from_grads(loss.backward(), &layer);
        optimizer.step(1e-3, layer, grads)
    });
}
