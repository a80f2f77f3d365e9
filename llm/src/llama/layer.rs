//! A block of a decoder.

use burn::{
    module::Module,
    nn::RmsNorm,
    tensor::{Tensor, backend::Backend},
};

use super::{Positions, attention::Attention, cache::Cached, init::Parts, mlp::Mlp, norm::norm};
use crate::config::{Design, LayerDesign, LlamaConfig, Norms};

/// The norms have Hugging Face's names, which do not always say where they are.
#[derive(Module, Debug)]
pub(super) struct Layer<B: Backend> {
    pub input_layernorm: Option<RmsNorm<B>>,
    pub self_attn: Attention<B>,
    /// Where there are norms only before: that before the feed-forward network. Otherwise that after attention.
    pub post_attention_layernorm: RmsNorm<B>,
    pub pre_feedforward_layernorm: Option<RmsNorm<B>>,
    pub mlp: Mlp<B>,
    pub post_feedforward_layernorm: Option<RmsNorm<B>>,
}

impl<B: Backend> Layer<B> {
    pub fn new(config: &LlamaConfig, design: &Design, parts: &Parts<B>) -> Self {
        let norm_if = |is_there: bool| is_there.then(|| parts.norm(config.hidden_size));
        Self {
            input_layernorm: norm_if(design.norms != Norms::After),
            self_attn: Attention::new(config, design, parts),
            post_attention_layernorm: parts.norm(config.hidden_size),
            pre_feedforward_layernorm: norm_if(design.norms == Norms::Both),
            mlp: Mlp::new(config, design, parts),
            post_feedforward_layernorm: norm_if(design.norms != Norms::Before),
        }
    }

    pub fn forward(
        &self,
        x: Tensor<B, 3>,
        design: &Design,
        layer: LayerDesign,
        positions: &Positions<B>,
        cached: &mut Cached<B>,
    ) -> Tensor<B, 3> {
        let normed = |weight: Option<&RmsNorm<B>>, x| match weight {
            Some(weight) => norm(weight, design, x),
            None => x,
        };
        let added = |x: Tensor<B, 3>, y: Tensor<B, 3>| match design.residual_scale {
            1.0 => x + y,
            scale => x + y * scale,
        };
        let attended = Some(&self.post_attention_layernorm);
        let (after_attention, before_mlp) = match design.norms {
            Norms::Before => (None, attended),
            Norms::After | Norms::Both => (attended, self.pre_feedforward_layernorm.as_ref()),
        };
        let y = normed(self.input_layernorm.as_ref(), x.clone());
        let y = self.self_attn.forward(y, design, layer, positions, cached);
        let x = added(x, normed(after_attention, y));
        let y = self.mlp.forward(normed(before_mlp, x.clone()), design);
        added(x, normed(self.post_feedforward_layernorm.as_ref(), y))
    }
}
