//! A decoder with weights of its own.

use burn::{
    module::{Initializer, Param},
    nn::{Embedding, Linear, RmsNorm, RmsNormConfig},
    tensor::{Tensor, backend::Backend},
};
use burn_lora::LoraLinear;

use super::{Decoder, Llama, layer::Layer};
use crate::config::LlamaConfig;

/// Makes the parts of a decoder.
pub(super) struct Parts<'a, B: Backend> {
    draw: &'a Initializer,
    epsilon: f64,
    norms_add_one: bool,
    device: &'a B::Device,
}

impl<B: Backend> Parts<'_, B> {
    pub fn linear(&self, from: usize, to: usize, bias: bool) -> LoraLinear<B> {
        let bias = bias.then(|| self.draw.init_with([to], Some(from), Some(to), self.device));
        Linear { weight: self.matrix([from, to]), bias }.into()
    }

    pub fn matrix(&self, shape: [usize; 2]) -> Param<Tensor<B, 2>> {
        match self.draw {
            // All of them are one number in memory. Others take their place, and matrices of zeros would be the most of a
            // decoder whose weights are read in few bits.
            Initializer::Zeros => {
                Param::from_tensor(Tensor::<B, 2>::zeros([1, 1], self.device).expand(shape))
            }
            draw => draw.init_with(shape, Some(shape[0]), Some(shape[1]), self.device),
        }
    }

    /// A norm that multiplies by 1.
    pub fn norm(&self, size: usize) -> RmsNorm<B> {
        let mut norm: RmsNorm<B> =
            RmsNormConfig::new(size).with_epsilon(self.epsilon).init(self.device);
        if self.norms_add_one {
            norm.gamma = norm.gamma.map(|it: Tensor<B, 1>| it.zeros_like());
        }
        norm
    }
}

impl LlamaConfig {
    /// The decoder with weights of its own: zeros, if they are then read from files.
    pub fn init<B: Backend>(&self, draw: &Initializer, device: &B::Device) -> Llama<B> {
        let (width, design) = (self.hidden_size, self.design());
        let (epsilon, norms_add_one) = (self.rms_norm_eps, design.norms_add_one);
        let parts = Parts { draw, epsilon, norms_add_one, device };
        let table = Embedding { weight: parts.matrix([self.vocab_size, width]) };
        Llama {
            model: Decoder {
                embed_tokens: table.into(),
                layers: design.layers.iter().map(|_| Layer::new(self, &design, &parts)).collect(),
                norm: parts.norm(width),
            },
            lm_head: (!self.tie_word_embeddings)
                .then(|| parts.linear(width, self.vocab_size, false)),
            design,
            max_positions: self.max_position_embeddings,
        }
    }
}
