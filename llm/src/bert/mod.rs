//! BERT ([Devlin et al. 2018](https://arxiv.org/abs/1810.04805)), an encoder of text, with layers that
//! can have adapters.
//!
//! ```text
//! ids ─► embeddings ─► block ─► … ─► block ─► a vector per token ─► mean ─► a vector per text
//!
//! block:  x ─┬─► attention ─► + ─► norm ─┬─► expand ─► GELU ─► contract ─► + ─► norm
//!            └────────────────┘          └─────────────────────────────────┘
//! ```

pub mod classifier;
pub mod pretrained;

use burn::{
    module::Module,
    nn::{
        Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, LinearConfig,
        attention::MultiHeadAttentionConfig,
    },
    tensor::{Bool, Int, Tensor, TensorData, backend::Backend},
};
use burn_lora::{
    LoraLinear,
    nn::{LoraEmbedding, LoraMhaInput, LoraMultiHeadAttention, gelu, layer_norm},
    peft::Renaming,
};
use serde::Deserialize;

/// The sizes of a BERT, named as in Hugging Face's `config.json`.
#[derive(Clone, Debug, Deserialize)]
pub struct BertConfig {
    /// The number of different tokens.
    pub vocab_size: usize,
    /// The size of the vector of a token.
    pub hidden_size: usize,
    /// The number of blocks.
    pub num_hidden_layers: usize,
    /// The number of heads of attention.
    pub num_attention_heads: usize,
    /// The size of the hidden layer of a feed-forward network.
    pub intermediate_size: usize,
    /// The length of the longest text, in tokens.
    pub max_position_embeddings: usize,
    /// The number of kinds of segments.
    pub type_vocab_size: usize,
    /// What is added to variances in layer norms.
    pub layer_norm_eps: f64,
}

/// The encoder.
#[derive(Module, Debug)]
pub struct Bert<B: Backend> {
    embeddings: Embeddings<B>,
    blocks: Vec<Block<B>>,
}

/// Turns each token into a vector: the sum of embeddings of the token, its position and its segment.
#[derive(Module, Debug)]
struct Embeddings<B: Backend> {
    words: LoraEmbedding<B>,
    positions: Embedding<B>,
    segments: Embedding<B>,
    norm: LayerNorm<B>,
}

/// A block: attention and a feed-forward network. The norms come after the residual sums.
#[derive(Module, Debug)]
struct Block<B: Backend> {
    attention: LoraMultiHeadAttention<B>,
    attention_norm: LayerNorm<B>,
    expand: LoraLinear<B>,
    contract: LoraLinear<B>,
    output_norm: LayerNorm<B>,
}

/// Texts as the encoder reads them, padded to the length of the longest.
#[derive(Clone, Debug)]
pub struct Tokens<B: Backend> {
    /// The ids of the tokens: `[batch, length]`.
    pub ids: Tensor<B, 2, Int>,
    /// Which of them are padding: `[batch, length]`.
    pub padding: Tensor<B, 2, Bool>,
}

impl BertConfig {
    /// The encoder with random weights. It has no dropout, which would also act in a frozen base.
    pub fn init<B: Backend>(&self, device: &B::Device) -> Bert<B> {
        let width = self.hidden_size;
        let table = |rows| EmbeddingConfig::new(rows, width).init(device);
        let norm = || LayerNormConfig::new(width).with_epsilon(self.layer_norm_eps).init(device);
        let linear = |from, to| LinearConfig::new(from, to).init(device);
        let attention = MultiHeadAttentionConfig::new(width, self.num_attention_heads);
        let attention = attention.with_dropout(0.0);
        let block = |_| Block {
            attention: attention.init(device).into(),
            attention_norm: norm(),
            expand: linear(width, self.intermediate_size).into(),
            contract: linear(self.intermediate_size, width).into(),
            output_norm: norm(),
        };
        Bert {
            embeddings: Embeddings {
                words: table(self.vocab_size).into(),
                positions: table(self.max_position_embeddings),
                segments: table(self.type_vocab_size),
                norm: norm(),
            },
            blocks: (0..self.num_hidden_layers).map(block).collect(),
        }
    }
}

impl<B: Backend> Bert<B> {
    /// One vector for each token: `[batch, length, hidden_size]`.
    pub fn forward(&self, tokens: &Tokens<B>) -> Tensor<B, 3> {
        (0..self.depth()).fold(self.begin(tokens), |x, index| self.block(index, x, tokens))
    }

    /// One vector for each text, the mean of its tokens' vectors: `[batch, hidden_size]`.
    pub fn embed(&self, tokens: &Tokens<B>) -> Tensor<B, 2> {
        tokens.mean(self.forward(tokens))
    }

    /// The number of blocks.
    pub fn depth(&self) -> usize {
        self.blocks.len()
    }

    /// What the first block reads: `[batch, length, hidden_size]`.
    pub fn begin(&self, tokens: &Tokens<B>) -> Tensor<B, 3> {
        self.embeddings.forward(tokens.ids.clone())
    }

    /// A block: `[batch, length, hidden_size]` to the same.
    pub fn block(&self, index: usize, x: Tensor<B, 3>, tokens: &Tokens<B>) -> Tensor<B, 3> {
        self.blocks[index].forward(x, tokens.padding.clone())
    }
}

impl<B: Backend> Tokens<B> {
    /// Texts given by the ids of their tokens. All are padded to the length of the longest.
    pub fn stack<'a>(texts: impl Iterator<Item = &'a [u32]> + Clone, device: &B::Device) -> Self {
        let (count, length) =
            texts.clone().fold((0, 0), |(count, most), text| (count + 1, most.max(text.len())));
        let filled = |value: fn(Option<&u32>) -> i32| {
            let rows = texts.clone().flat_map(|text| (0..length).map(|at| value(text.get(at))));
            let data = TensorData::new(rows.collect::<Vec<_>>(), [count, length]);
            Tensor::<B, 2, Int>::from_data(data, device)
        };
        Self {
            // The ids of padding do not matter: the mask hides them.
            ids: filled(|id| id.map_or(0, |&id| id as i32)),
            padding: filled(|id| i32::from(id.is_none())).bool(),
        }
    }

    /// The mean over the tokens of each text, from `[batch, length, size]` to `[batch, size]`.
    pub fn mean(&self, x: Tensor<B, 3>) -> Tensor<B, 2> {
        let kept = self.padding.clone().bool_not().float().unsqueeze_dim::<3>(2);
        let sum = (x * kept.clone()).sum_dim(1);
        (sum / kept.sum_dim(1)).squeeze_dim(1)
    }
}

impl<B: Backend> Embeddings<B> {
    fn forward(&self, ids: Tensor<B, 2, Int>) -> Tensor<B, 3> {
        let [_, length] = ids.dims();
        let positions = Tensor::arange(0..length as i64, &ids.device()).unsqueeze();
        // A text has one segment, the first.
        let segments = Tensor::zeros([1, length], &ids.device());
        let positions = self.positions.forward(positions) + self.segments.forward(segments);
        layer_norm(&self.norm, self.words.forward(ids) + positions)
    }
}

impl<B: Backend> Block<B> {
    fn forward(&self, x: Tensor<B, 3>, padding: Tensor<B, 2, Bool>) -> Tensor<B, 3> {
        let input = LoraMhaInput::self_attn(x.clone()).mask_pad(padding);
        let x = layer_norm(&self.attention_norm, x + self.attention.context(input));
        let inner = gelu(self.expand.forward(x.clone()));
        layer_norm(&self.output_norm, x + self.contract.forward(inner))
    }
}

/// This encoder's modules and their names at Hugging Face. Modules that contain others come last.
const NAMES: [(&str, &str); 14] = [
    ("embeddings.words", "embeddings.word_embeddings"),
    ("embeddings.positions", "embeddings.position_embeddings"),
    ("embeddings.segments", "embeddings.token_type_embeddings"),
    ("embeddings.norm", "embeddings.LayerNorm"),
    ("blocks.*.attention.query", "encoder.layer.*.attention.self.query"),
    ("blocks.*.attention.key", "encoder.layer.*.attention.self.key"),
    ("blocks.*.attention.value", "encoder.layer.*.attention.self.value"),
    ("blocks.*.attention.output", "encoder.layer.*.attention.output.dense"),
    ("blocks.*.attention_norm", "encoder.layer.*.attention.output.LayerNorm"),
    ("blocks.*.expand", "encoder.layer.*.intermediate.dense"),
    ("blocks.*.contract", "encoder.layer.*.output.dense"),
    ("blocks.*.output_norm", "encoder.layer.*.output.LayerNorm"),
    ("embeddings", "embeddings"),
    ("blocks", "encoder.layer"),
];

/// The renaming from the names at Hugging Face to the modules of an encoder at `path`. The path of the encoder
/// itself is empty.
pub fn names(path: &str) -> Renaming {
    let dot = if path.is_empty() { "" } else { "." };
    Renaming::new(NAMES.map(|(here, there)| (there, format!("{path}{dot}{here}")))).partial()
}
