//! Attention of a decoder.

use burn::{
    module::Module,
    nn::RmsNorm,
    tensor::{Tensor, backend::Backend},
};
use burn_lora::{
    LoraLinear,
    nn::{AttentionOptions, attention, rotate},
};

use super::{Positions, cache::Cached, init::Parts, norm::norm};
use crate::config::{Design, LayerDesign, LlamaConfig, Span};

/// Attention in which groups of query heads share one head of keys and values
/// ([Ainslie et al. 2023](https://arxiv.org/abs/2305.13245)).
#[derive(Module, Debug)]
pub(super) struct Attention<B: Backend> {
    pub q_proj: Option<LoraLinear<B>>,
    pub k_proj: Option<LoraLinear<B>>,
    pub v_proj: Option<LoraLinear<B>>,
    /// All three in one, one after the other, as Phi-3 has them.
    pub qkv_proj: Option<LoraLinear<B>>,
    pub o_proj: LoraLinear<B>,
    pub q_norm: Option<RmsNorm<B>>,
    pub k_norm: Option<RmsNorm<B>>,
    /// The size of one head.
    pub head_dim: usize,
}

impl<B: Backend> Attention<B> {
    pub fn new(config: &LlamaConfig, design: &Design, parts: &Parts<B>) -> Self {
        let (width, head_dim) = (config.hidden_size, config.head_dim());
        let [queries, keys] =
            [config.num_attention_heads, config.key_value_heads()].map(|it| it * head_dim);
        let biases = config.biases();
        let linear = |to| parts.linear(width, to, biases.queries_keys_values);
        let apart = |to| (!design.fused).then(|| linear(to));
        let normed = |width| {
            design.queries_and_keys.map(|span| match span {
                Span::Head => parts.norm(head_dim),
                Span::Token => parts.norm(width),
            })
        };
        Self {
            q_proj: apart(queries),
            k_proj: apart(keys),
            v_proj: apart(keys),
            qkv_proj: design.fused.then(|| linear(queries + 2 * keys)),
            o_proj: parts.linear(queries, width, biases.output),
            q_norm: normed(queries),
            k_norm: normed(keys),
            head_dim,
        }
    }

    /// How many numbers the queries of a token have, and its keys.
    pub fn widths(&self) -> [usize; 2] {
        let [queries, _] = self.o_proj.weight_shape();
        let outputs = |layer: &LoraLinear<B>| layer.weight_shape()[1];
        let keys = match (&self.qkv_proj, &self.k_proj) {
            (Some(all), _) => (outputs(all) - queries) / 2,
            (None, keys) => keys.as_ref().map_or(0, outputs),
        };
        [queries, keys]
    }

    /// The queries, keys and values: `[batch, length, numbers]` each.
    fn projected(&self, x: Tensor<B, 3>) -> [Tensor<B, 3>; 3] {
        match &self.qkv_proj {
            Some(all) => {
                let (all, [queries, keys]) = (all.forward(x), self.widths());
                let places = [(0, queries), (queries, keys), (queries + keys, keys)];
                places.map(|(start, count)| all.clone().narrow(2, start, count))
            }
            None => [&self.q_proj, &self.k_proj, &self.v_proj]
                .map(|layer| layer.as_ref().expect("they are apart").forward(x.clone())),
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
        let heads = |x: Tensor<B, 3>| {
            let [batch, length, width] = x.dims();
            x.reshape([batch, length, width / self.head_dim, self.head_dim])
        };
        let (mask, turns) = positions.of(layer);
        let rotated = |x: Tensor<B, 3>, weight: &Option<RmsNorm<B>>| {
            let x = match (weight, design.queries_and_keys) {
                (Some(weight), Some(Span::Token)) => heads(norm(weight, design, x)),
                (Some(weight), _) => norm(weight, design, heads(x)),
                (None, _) => heads(x),
            };
            match turns {
                Some([cos, sin]) => rotate(x, cos.clone(), sin.clone()),
                None => x,
            }
        };
        let [q, k, v] = self.projected(x);
        let (q, k) = (rotated(q, &self.q_norm), rotated(k, &self.k_norm));
        let [k, v] = match cached {
            None => [k, heads(v)],
            Some(cached) => {
                let k = k.flatten(2, 3);
                let all = match cached.take() {
                    None => [k, v],
                    Some([past_k, past_v]) => {
                        [Tensor::cat(vec![past_k, k], 1), Tensor::cat(vec![past_v, v], 1)]
                    }
                };
                **cached = Some(all.clone());
                all.map(heads)
            }
        };
        let options = AttentionOptions {
            scale: Some(design.score_scale),
            soft_cap: design.score_cap,
            precision: self.o_proj.precision(),
            ..Default::default()
        };
        self.o_proj.forward(attention(q, k, v, mask, &options).flatten(2, 3))
    }
}
