//! The model of the examples with digits: a multilayer perceptron. Each layer can have an adapter.

use burn::{
    module::Module,
    nn::LinearConfig,
    tensor::{Tensor, activation::relu, backend::Backend},
};
use burn_lora::LoraLinear;

use super::{
    classifier::Classifier,
    digits::{Digit, PIXELS},
};

/// A perceptron that classifies digits: 784 pixels, hidden layers of 512 and 256 units, and 10 classes.
#[derive(Module, Debug)]
pub struct Mlp<B: Backend> {
    fc1: LoraLinear<B>,
    fc2: LoraLinear<B>,
    head: LoraLinear<B>,
}

impl<B: Backend> Mlp<B> {
    pub fn new(device: &B::Device) -> Self {
        let layer = |d_input, d_output| LinearConfig::new(d_input, d_output).init(device).into();
        Self { fc1: layer(PIXELS, 512), fc2: layer(512, 256), head: layer(256, 10) }
    }
}

impl<B: Backend> Classifier<B> for Mlp<B> {
    type Sample = Digit;

    fn logits(&self, pixels: Tensor<B, 2>) -> Tensor<B, 2> {
        let x = relu(self.fc1.forward(pixels));
        let x = relu(self.fc2.forward(x));
        self.head.forward(x)
    }
}
