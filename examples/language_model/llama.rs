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
//! Llama 2 and 3, TinyLlama, SmolLM2, Mistral, Qwen2 and Qwen3 are such decoders. They differ in sizes, in
//! biases, and in norms of the queries and keys. The fields have Hugging Face's names, so that a target
//! such as `q_proj` means what it means in PEFT.

use burn::{
    module::{Initializer, Module},
    nn::{EmbeddingConfig, LinearConfig, RmsNorm, RmsNormConfig},
    tensor::{
        Int, Tensor, TensorData,
        activation::{silu, softmax},
        backend::Backend,
    },
};
use burn_lora::{LoraEmbedding, LoraLinear};

use super::config::{LlamaConfig, Rope};

/// The decoder and its head.
#[derive(Module, Debug)]
pub struct Llama<B: Backend> {
    model: Decoder<B>,
    /// Scores the next tokens. Without it, the table of embeddings does that.
    lm_head: Option<LoraLinear<B>>,
    #[module(skip)]
    rope: Rope,
}

#[derive(Module, Debug)]
struct Decoder<B: Backend> {
    embed_tokens: LoraEmbedding<B>,
    layers: Vec<Layer<B>>,
    norm: RmsNorm<B>,
}

#[derive(Module, Debug)]
struct Layer<B: Backend> {
    input_layernorm: RmsNorm<B>,
    self_attn: Attention<B>,
    post_attention_layernorm: RmsNorm<B>,
    mlp: Mlp<B>,
}

/// Attention in which groups of query heads share one head of keys and values
/// ([Ainslie et al. 2023](https://arxiv.org/abs/2305.13245)).
#[derive(Module, Debug)]
struct Attention<B: Backend> {
    q_proj: LoraLinear<B>,
    k_proj: LoraLinear<B>,
    v_proj: LoraLinear<B>,
    o_proj: LoraLinear<B>,
    /// Only Qwen3 has these.
    q_norm: Option<RmsNorm<B>>,
    k_norm: Option<RmsNorm<B>>,
    /// The size of one head.
    head_dim: usize,
}

/// A gated feed-forward network, SwiGLU ([Shazeer 2020](https://arxiv.org/abs/2002.05202)).
#[derive(Module, Debug)]
struct Mlp<B: Backend> {
    gate_proj: LoraLinear<B>,
    up_proj: LoraLinear<B>,
    down_proj: LoraLinear<B>,
}

/// Where the tokens of a batch are, and which others each of them sees.
#[derive(Clone, Debug)]
pub struct Places<B: Backend> {
    /// The rotation of each token: `[batch or 1, 1, length, head_dim / 2]`.
    cos: Tensor<B, 4>,
    sin: Tensor<B, 4>,
    /// What is added to the scores, 0 or nearly minus infinity: `[batch or 1, 1, 1, length, past + length]`.
    mask: Tensor<B, 5>,
}

/// The keys and values of the tokens that were read, so that they are not computed again for the next.
#[derive(Clone, Debug)]
pub struct Cache<B: Backend> {
    /// For each layer, the keys and the values: `[batch, key_value_heads, length, head_dim]`.
    layers: Vec<Option<[Tensor<B, 4>; 2]>>,
    length: usize,
}

impl LlamaConfig {
    /// The decoder with zeros in place of the weights, which are then read from files.
    pub fn init<B: Backend>(&self, device: &B::Device) -> Llama<B> {
        let draw = Initializer::Zeros;
        let width = self.hidden_size;
        let norm = |size| RmsNormConfig::new(size).with_epsilon(self.rms_norm_eps).init(device);
        let linear = |from, to, bias| -> LoraLinear<B> {
            let config = LinearConfig::new(from, to).with_bias(bias);
            config.with_initializer(draw.clone()).init(device).into()
        };
        let head_dim = self.head_dim();
        let [queries, keys] =
            [self.num_attention_heads, self.key_value_heads()].map(|it| it * head_dim);
        let biases = self.biases();
        let layer = |_| Layer {
            input_layernorm: norm(width),
            self_attn: Attention {
                q_proj: linear(width, queries, biases.queries_keys_values),
                k_proj: linear(width, keys, biases.queries_keys_values),
                v_proj: linear(width, keys, biases.queries_keys_values),
                o_proj: linear(queries, width, biases.output),
                q_norm: self.norms_queries_and_keys().then(|| norm(head_dim)),
                k_norm: self.norms_queries_and_keys().then(|| norm(head_dim)),
                head_dim,
            },
            post_attention_layernorm: norm(width),
            mlp: Mlp {
                gate_proj: linear(width, self.intermediate_size, biases.mlp),
                up_proj: linear(width, self.intermediate_size, biases.mlp),
                down_proj: linear(self.intermediate_size, width, biases.mlp),
            },
        };
        let table = EmbeddingConfig::new(self.vocab_size, width).with_initializer(draw.clone());
        Llama {
            model: Decoder {
                embed_tokens: table.init(device).into(),
                layers: (0..self.num_hidden_layers).map(layer).collect(),
                norm: norm(width),
            },
            lm_head: (!self.tie_word_embeddings).then(|| linear(width, self.vocab_size, false)),
            rope: self.rope(),
        }
    }
}

impl<B: Backend> Llama<B> {
    /// The vectors of the tokens: `[batch, length]` to `[batch, length, hidden_size]`.
    pub fn embed(&self, ids: Tensor<B, 2, Int>) -> Tensor<B, 3> {
        self.model.embed_tokens.forward(ids)
    }

    /// The number of layers.
    pub fn depth(&self) -> usize {
        self.model.layers.len()
    }

    /// One layer: `[batch, length, hidden_size]` to the same.
    pub fn layer(&self, index: usize, x: Tensor<B, 3>, places: &Places<B>) -> Tensor<B, 3> {
        self.model.layers[index].forward(x, places, &mut None)
    }

    /// The output of the last layer: `[batch, length]` to `[batch, length, hidden_size]`.
    pub fn hidden(&self, ids: Tensor<B, 2, Int>, places: &Places<B>) -> Tensor<B, 3> {
        (0..self.depth()).fold(self.embed(ids), |x, index| self.layer(index, x, places))
    }

    /// The scores of all possible next tokens: `[batch, length, hidden_size]` to
    /// `[batch, length, vocab_size]`.
    pub fn logits(&self, hidden: Tensor<B, 3>) -> Tensor<B, 3> {
        let normed = self.model.norm.forward(hidden);
        match &self.lm_head {
            Some(head) => head.forward(normed),
            None => self.model.embed_tokens.project(normed),
        }
    }

    /// An empty cache.
    pub fn cache(&self) -> Cache<B> {
        Cache { layers: vec![None; self.depth()], length: 0 }
    }

    /// Reads on after the tokens in the cache: `[batch, length]` to the scores of the token after the
    /// last, `[batch, vocab_size]`.
    pub fn read(&self, ids: Tensor<B, 2, Int>, cache: &mut Cache<B>) -> Tensor<B, 2> {
        let [_, length] = ids.dims();
        let places = self.places(cache.length, length, &ids.device());
        let mut x = self.embed(ids);
        for (layer, cached) in self.model.layers.iter().zip(&mut cache.layers) {
            x = layer.forward(x, &places, &mut Some(cached));
        }
        cache.length += length;
        let last = x.narrow(1, length - 1, 1);
        self.logits(last).squeeze_dim(1)
    }

    /// Texts of `length` tokens that follow `past` others. Each token sees itself and those before it. What
    /// fills up a text at its end is seen by no token of the text.
    pub fn places(&self, past: usize, length: usize, device: &B::Device) -> Places<B> {
        let positions: Vec<_> = (past..past + length).collect();
        let sees = |row: usize, col: usize| col <= past + row;
        self.placed(&[positions], past + length, |_, row, col| sees(row, col), device)
    }

    /// Rows that hold several texts each, one after the other: `[batch, length]`, where `texts` has the
    /// lengths of the texts of each row. Each text starts at position 0, and sees nothing of the others.
    ///
    /// # Panics
    ///
    /// If the rows have different lengths.
    pub fn packed(&self, texts: &[Vec<usize>], device: &B::Device) -> Places<B> {
        let positions: Vec<Vec<usize>> =
            texts.iter().map(|row| row.iter().flat_map(|&length| 0..length).collect()).collect();
        let length = positions[0].len();
        assert!(positions.iter().all(|row| row.len() == length), "rows of one length expected");
        // The token at position p of its text sees the p tokens before it.
        let sees =
            |text: usize, row: usize, col: usize| col <= row && row - col <= positions[text][row];
        self.placed(&positions, length, sees, device)
    }

    fn placed(
        &self,
        positions: &[Vec<usize>],
        total: usize,
        sees: impl Fn(usize, usize, usize) -> bool,
        device: &B::Device,
    ) -> Places<B> {
        let (batch, length) = (positions.len(), positions[0].len());
        let angles = || {
            let positions = positions.iter().flatten();
            positions.flat_map(|&at| self.rope.frequencies.iter().map(move |it| at as f64 * it))
        };
        let table = |of: fn(f64) -> f64| {
            let values: Vec<_> = angles().map(|angle| of(angle) as f32).collect();
            let shape = [batch, 1, length, self.rope.frequencies.len()];
            Tensor::from_data(TensorData::new(values, shape), device)
        };
        let mut mask = Vec::with_capacity(batch * length * total);
        for text in 0..batch {
            for row in 0..length {
                // Finite, because the difference of two infinities is not a number.
                mask.extend(
                    (0..total).map(|col| if sees(text, row, col) { 0.0 } else { -1e9_f32 }),
                );
            }
        }
        let mask = TensorData::new(mask, [batch, 1, 1, length, total]);
        Places { cos: table(f64::cos), sin: table(f64::sin), mask: Tensor::from_data(mask, device) }
    }
}

/// A layer's part of a cache, if there is one.
type Cached<'a, B> = Option<&'a mut Option<[Tensor<B, 4>; 2]>>;

impl<B: Backend> Layer<B> {
    fn forward(&self, x: Tensor<B, 3>, places: &Places<B>, cached: &mut Cached<B>) -> Tensor<B, 3> {
        let normed = self.input_layernorm.forward(x.clone());
        let x = x + self.self_attn.forward(normed, places, cached);
        let normed = self.post_attention_layernorm.forward(x.clone());
        x + self.mlp.forward(normed)
    }
}

impl<B: Backend> Attention<B> {
    fn forward(&self, x: Tensor<B, 3>, places: &Places<B>, cached: &mut Cached<B>) -> Tensor<B, 3> {
        let [batch, length, _] = x.dims();
        // The heads of each token: `[batch, heads, length, head_dim]`.
        let heads = |x: Tensor<B, 3>| {
            let heads = x.dims()[2] / self.head_dim;
            x.reshape([batch, length, heads, self.head_dim]).swap_dims(1, 2)
        };
        let normed = |x: Tensor<B, 4>, norm: &Option<RmsNorm<B>>| match norm {
            Some(norm) => norm.forward(x),
            None => x,
        };
        let q = places.rotate(normed(heads(self.q_proj.forward(x.clone())), &self.q_norm));
        let k = places.rotate(normed(heads(self.k_proj.forward(x.clone())), &self.k_norm));
        let v = heads(self.v_proj.forward(x));
        let [k, v] = match cached {
            None => [k, v],
            Some(cached) => {
                let all = match cached.take() {
                    None => [k, v],
                    Some([past_k, past_v]) => {
                        [Tensor::cat(vec![past_k, k], 2), Tensor::cat(vec![past_v, v], 2)]
                    }
                };
                **cached = Some(all.clone());
                all
            }
        };

        // The queries of a group go through one product with the keys they share.
        let ([_, all, ..], [_, shared, total, _]) = (q.dims(), k.dims());
        let group = all / shared;
        let q = q.reshape([batch, shared, group * length, self.head_dim]);
        let scores = q.matmul(k.swap_dims(2, 3)) / (self.head_dim as f64).sqrt();
        let scores = scores.reshape([batch, shared, group, length, total]);
        let weights = softmax(scores + places.mask.clone(), 4);
        let y = weights.reshape([batch, shared, group * length, total]).matmul(v);
        let y = y.reshape([batch, all, length, self.head_dim]).swap_dims(1, 2);
        self.o_proj.forward(y.reshape([batch, length, all * self.head_dim]))
    }
}

impl<B: Backend> Mlp<B> {
    fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let gate = silu(self.gate_proj.forward(x.clone()));
        self.down_proj.forward(gate * self.up_proj.forward(x))
    }
}

impl<B: Backend> Places<B> {
    /// Rotates the pairs of elements i and i + head_dim / 2 of each head by an angle that grows with the
    /// position ([Su et al. 2021](https://arxiv.org/abs/2104.09864)), so that a product of a query and a
    /// key depends on the distance of their tokens.
    fn rotate(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let half = x.dims()[3] / 2;
        let (first, second) = (x.clone().narrow(3, 0, half), x.narrow(3, half, half));
        let (cos, sin) = (self.cos.clone(), self.sin.clone());
        let turned = [
            first.clone() * cos.clone() - second.clone() * sin.clone(),
            second * cos + first * sin,
        ];
        // Burn may lose gradients through `cat`, if what it is given is held by nobody.
        Tensor::cat(turned.to_vec(), 3)
    }
}
