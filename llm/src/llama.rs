//! A decoder of the Llama family ([Touvron et al. 2023](https://arxiv.org/abs/2307.09288)): it reads the
//! tokens of a text, and tells at each of them what the next one may be.
//!
//! ```text
//! ids ─► embed_tokens ─► layer ─► … ─► layer ─► norm ─► lm_head ─► a score for each possible next token
//!
//! layer:  x ─┬─► norm ─► self_attn ─► + ─┬─► norm ─► mlp ─► + ─►
//!            └────────────────────────┘  └───────────────┘
//! ```
//!
//! Llama 2 and 3, TinyLlama, SmolLM 2 and 3, Mistral, Qwen2 and Qwen3, Gemma 2 and 3, Phi-3 and 4-mini, OLMo 2 and
//! Granite 3 are such decoders. They differ in sizes, and in what a [`Design`] says: where norms are, which activation
//! there is, how far each token sees, and so on. The fields have Hugging Face's names, so that a target such as `q_proj`
//! means what it means in PEFT.

mod attention;
mod cache;
mod host;
mod init;
mod layer;
mod matrices;
mod mlp;
mod norm;
mod positions;
mod read;

use burn::{
    module::Module,
    nn::RmsNorm,
    tensor::{Int, Tensor, backend::Backend},
};
use burn_lora::{
    LoraLinear,
    nn::{LoraEmbedding, soft_cap},
};

use super::config::Design;
use layer::Layer;
use norm::norm;

pub use cache::Cache;
pub use host::{HostLlama, HostSet, Step, Text};
pub(crate) use matrices::LINEAR;
pub use positions::Positions;

/// The decoder and its head.
#[derive(Module, Debug)]
pub struct Llama<B: Backend> {
    model: Decoder<B>,
    /// Scores the next tokens. Without it, the table of embeddings does that.
    lm_head: Option<LoraLinear<B>>,
    #[module(skip)]
    design: Design,
    /// The length of the longest text that it learned to read, in tokens.
    pub max_positions: usize,
}

#[derive(Module, Debug)]
struct Decoder<B: Backend> {
    embed_tokens: LoraEmbedding<B>,
    layers: Vec<Layer<B>>,
    norm: RmsNorm<B>,
}

impl<B: Backend> Llama<B> {
    /// The vectors of the tokens: `[batch, length]` to `[batch, length, hidden_size]`.
    pub fn embed(&self, ids: Tensor<B, 2, Int>) -> Tensor<B, 3> {
        let vectors = self.model.embed_tokens.forward(ids);
        match self.design.embedding_scale {
            1.0 => vectors,
            scale => vectors * scale,
        }
    }

    /// The number of tokens that it knows.
    pub fn vocab_size(&self) -> usize {
        self.model.embed_tokens.weight_shape()[0]
    }

    /// Whether the table of embeddings is also the head.
    pub fn is_tied(&self) -> bool {
        self.lm_head.is_none()
    }

    /// The number of layers.
    pub fn depth(&self) -> usize {
        self.model.layers.len()
    }

    /// One layer: `[batch, length, hidden_size]` to the same.
    pub fn layer(&self, index: usize, x: Tensor<B, 3>, positions: &Positions<B>) -> Tensor<B, 3> {
        let (design, layer) = (&self.design, self.design.layers[index]);
        self.model.layers[index].forward(x, design, layer, positions, &mut None)
    }

    /// The output of the last layer: `[batch, length]` to `[batch, length, hidden_size]`.
    pub fn hidden(&self, ids: Tensor<B, 2, Int>, positions: &Positions<B>) -> Tensor<B, 3> {
        (0..self.depth()).fold(self.embed(ids), |x, index| self.layer(index, x, positions))
    }

    /// The scores of all possible next tokens: `[batch, length, hidden_size]` to
    /// `[batch, length, vocab_size]`.
    pub fn logits(&self, hidden: Tensor<B, 3>) -> Tensor<B, 3> {
        let normed = self.normed(hidden);
        let scores = match &self.lm_head {
            Some(head) => head.forward(normed),
            None => self.model.embed_tokens.project(normed),
        };
        match self.design.logit_cap {
            Some(cap) => soft_cap(scores, cap),
            None => scores,
        }
    }

    /// The cross-entropy of these next tokens, `[count]`, summed: from outputs of the last layer, `[count,
    /// hidden_size]`, to `[1]`.
    pub fn cross_entropy(&self, hidden: Tensor<B, 2>, targets: Tensor<B, 1, Int>) -> Tensor<B, 1> {
        let normed = self.normed(hidden);
        let cap = self.design.logit_cap;
        match &self.lm_head {
            Some(head) => head.capped_cross_entropy(normed, targets, cap),
            None => self.model.embed_tokens.capped_cross_entropy(normed, targets, cap),
        }
    }

    /// What the head reads. It has no bias, so that its scores are scaled with its input, which is smaller.
    fn normed<const D: usize>(&self, hidden: Tensor<B, D>) -> Tensor<B, D> {
        let normed = norm(&self.model.norm, &self.design, hidden);
        match self.design.logit_scale {
            1.0 => normed,
            scale => normed * scale,
        }
    }

    /// About how many bytes a training step holds for the backward pass, for rows with so many tokens in all, what
    /// fills up short ones among them. The weights, and what was there before, are not counted. `segmented` as in
    /// [`gradients`](crate::loss::gradients).
    ///
    /// On backends whose attention is not one operation, the scores come on top, which grow with the square of the
    /// length.
    pub fn activations(&self, tokens: usize, segmented: bool) -> usize {
        let Layer { self_attn, mlp, .. } = &self.model.layers[0];
        let ([queries, keys], inner) = (self_attn.widths(), mlp.width());
        let [_, width] = self_attn.o_proj.weight_shape();
        // What a layer reads, the inputs of its parts, queries and keys before and after they are rotated, values, the
        // output of attention, and both halves of the feed-forward network and their product.
        let of_layer = 4 * width + 2 * (queries + keys) + keys + queries + 3 * inner;
        let numbers = match segmented {
            // One layer and its gradients, and what each layer reads.
            true => self.depth() * width + 2 * of_layer,
            false => self.depth() * of_layer,
        };
        4 * tokens * numbers
    }
}
