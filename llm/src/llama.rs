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
use burn_lora::{
    LoraLinear,
    nn::{LoraEmbedding, swap_heads},
};

use super::config::{LlamaConfig, Rope};

/// The decoder and its head.
#[derive(Module, Debug)]
pub struct Llama<B: Backend> {
    model: Decoder<B>,
    /// Scores the next tokens. Without it, the table of embeddings does that.
    lm_head: Option<LoraLinear<B>>,
    #[module(skip)]
    rope: Rope,
    /// The length of the longest text that it learned to read, in tokens.
    pub max_positions: usize,
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
pub struct Positions<B: Backend> {
    queries: Rotation<B>,
    keys: Rotation<B>,
    /// What is added to the scores, 0 or nearly minus infinity: `[1, length · (past + length)]`, or
    /// `[batch · heads, length · (past + length)]`.
    mask: Tensor<B, 2>,
}

/// Rotates pairs of elements of each head by an angle that grows with the position of the token
/// ([Su et al. 2021](https://arxiv.org/abs/2104.09864)), so that the product of a query and a key depends on
/// the distance of their tokens. Element i of a head is paired with i + head_dim / 2.
#[derive(Clone, Debug)]
struct Rotation<B: Backend> {
    /// Of the angle of each element: `[batch or 1, length · heads · head_dim]`.
    cos: Tensor<B, 2>,
    sin: Tensor<B, 2>,
    /// Turns pairs by a right angle, (a, b) to (-b, a): `[head_dim, head_dim]`.
    turn: Tensor<B, 2>,
}

/// The keys and values of the tokens that were read, so that they are not computed again for the next.
#[derive(Clone, Debug)]
pub struct Cache<B: Backend> {
    /// For each layer, the keys and the values: `[batch, length, key_value_heads · head_dim]`. Shorter texts
    /// are filled up at their beginning, so that all go on at the same place.
    layers: Vec<Option<[Tensor<B, 3>; 2]>>,
    /// The length of each text.
    lengths: Vec<usize>,
}

impl<B: Backend> Cache<B> {
    /// The texts of all caches in one, in their order. Panics if one is empty.
    pub fn join(caches: &[Self]) -> Self {
        let lengths: Vec<_> = caches.iter().flat_map(|it| it.lengths.clone()).collect();
        let total = caches.iter().map(Self::length).max().unwrap_or(0);
        let filled = |cache: &Self, layer: usize, part: usize| {
            let part = cache.layers[layer].as_ref().expect("texts were read")[part].clone();
            let [batch, length, width] = part.dims();
            match total - length {
                0 => part,
                missing => {
                    let blank = Tensor::zeros([batch, missing, width], &part.device());
                    Tensor::cat(vec![blank, part], 1)
                }
            }
        };
        let joined = |layer| {
            let parts = |part| caches.iter().map(|it| filled(it, layer, part)).collect();
            Some([0, 1].map(|part| Tensor::cat(parts(part), 0)))
        };
        let depth = caches.first().map_or(0, |it| it.layers.len());
        Self { layers: (0..depth).map(joined).collect(), lengths }
    }

    /// The cache of these texts alone, in this order.
    pub fn select(self, texts: &[usize]) -> Self {
        let lengths: Vec<_> = texts.iter().map(|&text| self.lengths[text]).collect();
        let (total, needed) = (self.length(), lengths.iter().copied().max().unwrap_or(0));
        let indices: Vec<_> = texts.iter().map(|&text| text as i32).collect();
        let layers = self.layers.into_iter().map(|layer| {
            let chosen = |part: Tensor<B, 3>| {
                let indices = Tensor::<B, 1, Int>::from_ints(&*indices, &part.device());
                part.select(0, indices).narrow(1, total - needed, needed)
            };
            layer.map(|parts| parts.map(chosen))
        });
        Self { layers: layers.collect(), lengths }
    }

    /// The length of the longest text.
    fn length(&self) -> usize {
        self.lengths.iter().copied().max().unwrap_or(0)
    }
}

impl LlamaConfig {
    /// The decoder with weights of its own: zeros, if they are then read from files.
    pub fn init<B: Backend>(&self, draw: &Initializer, device: &B::Device) -> Llama<B> {
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
            max_positions: self.max_position_embeddings,
        }
    }
}

impl<B: Backend> Llama<B> {
    /// The vectors of the tokens: `[batch, length]` to `[batch, length, hidden_size]`.
    pub fn embed(&self, ids: Tensor<B, 2, Int>) -> Tensor<B, 3> {
        self.model.embed_tokens.forward(ids)
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
        self.model.layers[index].forward(x, positions, &mut None)
    }

    /// The output of the last layer: `[batch, length]` to `[batch, length, hidden_size]`.
    pub fn hidden(&self, ids: Tensor<B, 2, Int>, positions: &Positions<B>) -> Tensor<B, 3> {
        (0..self.depth()).fold(self.embed(ids), |x, index| self.layer(index, x, positions))
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
        Cache { layers: vec![None; self.depth()], lengths: Vec::new() }
    }

    /// Reads on after the texts in the cache: `[batch, length]` to the scores of the token after the last of
    /// each, `[batch, vocab_size]`.
    pub fn read(&self, ids: Tensor<B, 2, Int>, cache: &mut Cache<B>) -> Tensor<B, 2> {
        let [batch, length] = ids.dims();
        let past = cache.length();
        cache.lengths.resize(batch, 0);
        let positions = cache.lengths.iter().map(|&read| (read..read + length).collect());
        let positions: Vec<Vec<_>> = positions.collect();
        // Only what fills up a text at its beginning is not seen, and what comes later.
        let blank: Vec<_> = cache.lengths.iter().map(|read| past - read).collect();
        let sees = |text: usize, row: usize, col: usize| col >= blank[text] && col <= past + row;
        let positions = self.placed(&positions, past + length, sees, &ids.device());
        let mut x = self.embed(ids);
        for (layer, cached) in self.model.layers.iter().zip(&mut cache.layers) {
            x = layer.forward(x, &positions, &mut Some(cached));
        }
        cache.lengths.iter_mut().for_each(|read| *read += length);
        let last = x.narrow(1, length - 1, 1);
        self.logits(last).squeeze_dim(1)
    }

    /// Texts of `length` tokens that follow `past` others. Each token sees itself and those before it. What
    /// fills up a text at its end is seen by no token of the text.
    pub fn positions(&self, past: usize, length: usize, device: &B::Device) -> Positions<B> {
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
    pub fn packed(&self, texts: &[Vec<usize>], device: &B::Device) -> Positions<B> {
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
    ) -> Positions<B> {
        let (batch, length) = (positions.len(), positions[0].len());
        let attention = &self.model.layers[0].self_attn;
        let heads = |layer: &LoraLinear<B>| layer.weight_shape()[1] / attention.head_dim;
        let [all, shared] = [&attention.q_proj, &attention.k_proj].map(heads);
        // The same for each head and, in texts of their own, for each text: broadcasting does that.
        let repeats = if batch > 1 { all } else { 1 };
        let mut mask = Vec::new();
        for text in 0..batch {
            let start = mask.len();
            for row in 0..length {
                // Finite, because the difference of two infinities is not a number.
                mask.extend(
                    (0..total).map(|col| if sees(text, row, col) { 0.0 } else { -1e9_f32 }),
                );
            }
            for _ in 1..repeats {
                mask.extend_from_within(start..start + length * total);
            }
        }
        let mask = TensorData::new(mask, [batch * repeats, length * total]);
        let rotation = |heads| self.rope.rotation(positions, heads, device);
        Positions {
            queries: rotation(all),
            keys: rotation(shared),
            mask: Tensor::from_data(mask, device),
        }
    }
}

impl Rope {
    /// The rotation of `heads` heads of each token.
    fn rotation<B: Backend>(
        &self,
        positions: &[Vec<usize>],
        heads: usize,
        device: &B::Device,
    ) -> Rotation<B> {
        let half = self.frequencies.len();
        let shape = [positions.len(), positions[0].len() * heads * 2 * half];
        let table = |of: fn(f64) -> f64| {
            let mut values = Vec::with_capacity(shape.iter().product());
            for &position in positions.iter().flatten() {
                let angles = self.frequencies.iter().map(|it| of(position as f64 * it) as f32);
                let angles: Vec<_> = angles.collect();
                values.extend(angles.repeat(2 * heads));
            }
            Tensor::from_data(TensorData::new(values, shape), device)
        };
        let mut turn = vec![0.0_f32; 4 * half * half];
        for i in 0..half {
            turn[i * 2 * half + i + half] = 1.0;
            turn[(i + half) * 2 * half + i] = -1.0;
        }
        let turn = Tensor::from_data(TensorData::new(turn, [2 * half, 2 * half]), device);
        Rotation { cos: table(f64::cos), sin: table(f64::sin), turn }
    }
}

/// A layer's part of a cache, if there is one.
type Cached<'a, B> = Option<&'a mut Option<[Tensor<B, 3>; 2]>>;

impl<B: Backend> Layer<B> {
    fn forward(
        &self,
        x: Tensor<B, 3>,
        positions: &Positions<B>,
        cached: &mut Cached<B>,
    ) -> Tensor<B, 3> {
        let normed = self.input_layernorm.forward(x.clone());
        let x = x + self.self_attn.forward(normed, positions, cached);
        let normed = self.post_attention_layernorm.forward(x.clone());
        x + self.mlp.forward(normed)
    }
}

impl<B: Backend> Attention<B> {
    fn forward(
        &self,
        x: Tensor<B, 3>,
        positions: &Positions<B>,
        cached: &mut Cached<B>,
    ) -> Tensor<B, 3> {
        let size = self.head_dim;
        let normed = |x: Tensor<B, 3>, norm: &Option<RmsNorm<B>>| match norm {
            Some(norm) => {
                let [batch, length, width] = x.dims();
                let heads = x.reshape([batch, length, width / size, size]);
                norm.forward(heads).reshape([batch, length, width])
            }
            None => x,
        };
        let q = positions.queries.rotate(normed(self.q_proj.forward(x.clone()), &self.q_norm));
        let k = positions.keys.rotate(normed(self.k_proj.forward(x.clone()), &self.k_norm));
        let v = self.v_proj.forward(x);
        let [k, v] = match cached {
            None => [k, v],
            Some(cached) => {
                let all = match cached.take() {
                    None => [k, v],
                    Some([past_k, past_v]) => {
                        [Tensor::cat(vec![past_k, k], 1), Tensor::cat(vec![past_v, v], 1)]
                    }
                };
                **cached = Some(all.clone());
                all
            }
        };

        // The heads of the queries that share a head of keys go through one product with it.
        let ([batch, length, width], [_, total, shared]) = (q.dims(), k.dims());
        let (shared, group) = (shared / size, width / shared);
        let heads = |x: Tensor<B, 3>| {
            let [_, length, width] = x.dims();
            swap_heads(x.reshape([batch, length, width / size, size]))
        };
        let [q, k, v] = [q / (size as f64).sqrt(), k, v].map(heads);
        let scores = q.reshape([batch, shared, group * length, size]).matmul(k.swap_dims(2, 3));
        let scores =
            scores.reshape([batch * shared * group, length * total]) + positions.mask.clone();
        let weights = softmax(scores.reshape([batch, shared, group * length, total]), 3);
        let y = weights.matmul(v).reshape([batch, shared * group, length, size]);
        self.o_proj.forward(swap_heads(y).reshape([batch, length, width]))
    }
}

impl<B: Backend> Mlp<B> {
    fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let gate = silu(self.gate_proj.forward(x.clone()));
        self.down_proj.forward(gate * self.up_proj.forward(x))
    }
}

impl<B: Backend> Rotation<B> {
    /// `[batch, length, heads · head_dim]` to the same.
    fn rotate(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let [batch, length, width] = x.dims();
        let size = self.turn.dims()[0];
        // In rows as long as possible: CPU backends are fast at what is the same for all rows.
        let texts = [batch, length * width];
        let pairs = x.clone().reshape([batch * length * width / size, size]);
        let turned = pairs.matmul(self.turn.clone()).reshape(texts);
        let rotated = x.reshape(texts) * self.cos.clone() + turned * self.sin.clone();
        rotated.reshape([batch, length, width])
    }
}
