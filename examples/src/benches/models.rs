//! The models that are measured. Without adapters they are plain Burn models, to be trained in full.

use burn::{
    module::Module,
    nn::{LayerNorm, LayerNormConfig, Linear, LinearConfig, attention::MultiHeadAttentionConfig},
    tensor::{
        Tensor,
        activation::{gelu, relu},
        backend::Backend,
    },
};
use burn_lora::{
    LoraLinear,
    nn::{LoraMhaInput, LoraMultiHeadAttention},
};

/// A stock layer, for the overlay.
#[derive(Module, Debug)]
pub struct Single<B: Backend> {
    pub fc: Linear<B>,
}

/// Layers of one width with ReLU between them, and a head of 10 outputs.
#[derive(Module, Debug)]
pub struct Mlp<B: Backend> {
    layers: Vec<LoraLinear<B>>,
    head: LoraLinear<B>,
}

impl<B: Backend> Mlp<B> {
    /// With `depth` layers, the head among them.
    pub fn new(depth: usize, width: usize, device: &B::Device) -> Self {
        let layer = |outputs| LinearConfig::new(width, outputs).init(device).into();
        Self { layers: (1..depth).map(|_| layer(width)).collect(), head: layer(10) }
    }

    pub fn forward(&self, mut x: Tensor<B, 2>) -> Tensor<B, 2> {
        for layer in &self.layers {
            x = relu(layer.forward(x));
        }
        self.head.forward(x)
    }
}

/// A block of a transformer, with the norms first, and a head on top of it.
#[derive(Module, Debug)]
pub struct Block<B: Backend> {
    attention: LoraMultiHeadAttention<B>,
    inner: LoraLinear<B>,
    outer: LoraLinear<B>,
    norms: [LayerNorm<B>; 2],
    head: LoraLinear<B>,
}

impl<B: Backend> Block<B> {
    pub fn new(width: usize, heads: usize, device: &B::Device) -> Self {
        let attention = MultiHeadAttentionConfig::new(width, heads).with_dropout(0.0);
        let norm = || LayerNormConfig::new(width).init(device);
        Self {
            attention: attention.init(device).into(),
            inner: LinearConfig::new(width, 4 * width).init(device).into(),
            outer: LinearConfig::new(4 * width, width).init(device).into(),
            norms: [norm(), norm()],
            head: LinearConfig::new(width, 10).init(device).into(),
        }
    }

    pub fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let normed = self.norms[0].forward(x.clone());
        let x = x + self.attention.forward(LoraMhaInput::self_attn(normed)).context;
        let normed = self.norms[1].forward(x.clone());
        let x = x + self.outer.forward(gelu(self.inner.forward(normed)));
        self.head.forward(x)
    }
}
