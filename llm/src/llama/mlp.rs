//! The feed-forward network of a decoder.

use burn::{
    module::Module,
    tensor::{Tensor, backend::Backend},
};
use burn_lora::{
    LoraLinear,
    nn::{geglu, swiglu},
};

use super::init::Parts;
use crate::config::{Activation, Design, LlamaConfig};

/// A gated feed-forward network ([Shazeer 2020](https://arxiv.org/abs/2002.05202)).
#[derive(Module, Debug)]
pub(super) struct Mlp<B: Backend> {
    pub gate_proj: Option<LoraLinear<B>>,
    pub up_proj: Option<LoraLinear<B>>,
    /// Both in one, one after the other, as Phi-3 has them.
    pub gate_up_proj: Option<LoraLinear<B>>,
    pub down_proj: LoraLinear<B>,
}

impl<B: Backend> Mlp<B> {
    pub fn new(config: &LlamaConfig, design: &Design, parts: &Parts<B>) -> Self {
        let (width, inner, bias) =
            (config.hidden_size, config.intermediate_size, config.biases().mlp);
        let apart = || (!design.fused).then(|| parts.linear(width, inner, bias));
        Self {
            gate_proj: apart(),
            up_proj: apart(),
            gate_up_proj: design.fused.then(|| parts.linear(width, 2 * inner, bias)),
            down_proj: parts.linear(inner, width, bias),
        }
    }

    /// How many numbers are between both products.
    pub fn width(&self) -> usize {
        self.down_proj.weight_shape()[0]
    }

    pub fn forward(&self, x: Tensor<B, 3>, design: &Design) -> Tensor<B, 3> {
        let [gate, up] = match &self.gate_up_proj {
            Some(both) => {
                let (both, inner) = (both.forward(x), self.width());
                [0, inner].map(|start| both.clone().narrow(2, start, inner))
            }
            None => [&self.gate_proj, &self.up_proj]
                .map(|layer| layer.as_ref().expect("they are apart").forward(x.clone())),
        };
        self.down_proj.forward(match design.activation {
            Activation::Silu => swiglu(gate, up),
            Activation::GeluTanh => geglu(gate, up),
        })
    }
}
