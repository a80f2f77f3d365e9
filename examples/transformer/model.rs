//! One transformer, written twice: with Burn's layers, and with layers that can have adapters.

use burn::{
    module::Module,
    nn::{
        Embedding, EmbeddingConfig, LayerNorm, Linear, LinearConfig,
        transformer::{
            PositionWiseFeedForward, TransformerEncoder, TransformerEncoderConfig,
            TransformerEncoderInput, TransformerEncoderLayer,
        },
    },
    tensor::{Int, Tensor, backend::Backend},
};
use burn_lora::nn::{LoraMhaInput, LoraMultiHeadAttention};

/// The size of the vocabulary, and the length of a sequence.
pub const VOCAB_SIZE: usize = 12;
pub const LENGTH: usize = 16;

const D_MODEL: usize = 128;

/// The model with Burn's own layers only.
#[derive(Module, Debug)]
pub struct Stock<B: Backend> {
    tokens: Embedding<B>,
    positions: Embedding<B>,
    encoder: TransformerEncoder<B>,
    head: Linear<B>,
}

impl<B: Backend> Stock<B> {
    pub fn new(device: &B::Device) -> Self {
        let encoder = TransformerEncoderConfig::new(D_MODEL, 2 * D_MODEL, 4, 2).with_dropout(0.0);
        Self {
            tokens: EmbeddingConfig::new(VOCAB_SIZE, D_MODEL).init(device),
            positions: EmbeddingConfig::new(LENGTH, D_MODEL).init(device),
            encoder: encoder.init(device),
            head: LinearConfig::new(D_MODEL, VOCAB_SIZE).init(device),
        }
    }

    /// Sequences `[batch, LENGTH]` to logits `[batch, LENGTH, VOCAB_SIZE]`.
    pub fn forward(&self, sequences: Tensor<B, 2, Int>) -> Tensor<B, 3> {
        let x = embed(&self.tokens, &self.positions, sequences);
        self.head.forward(self.encoder.forward(TransformerEncoderInput::new(x)))
    }
}

/// The model with this crate's attention. The fields have the same names as Burn's, so that adapters
/// have the same paths in both models.
#[derive(Module, Debug)]
pub struct Layered<B: Backend> {
    tokens: Embedding<B>,
    positions: Embedding<B>,
    encoder: Encoder<B>,
    head: Linear<B>,
}

#[derive(Module, Debug)]
struct Encoder<B: Backend> {
    layers: Vec<Layer<B>>,
}

#[derive(Module, Debug)]
struct Layer<B: Backend> {
    mha: LoraMultiHeadAttention<B>,
    pwff: PositionWiseFeedForward<B>,
    norm_1: LayerNorm<B>,
    norm_2: LayerNorm<B>,
}

impl<B: Backend> From<Stock<B>> for Layered<B> {
    fn from(stock: Stock<B>) -> Self {
        let layer = |layer: TransformerEncoderLayer<B>| Layer {
            mha: layer.mha.into(),
            pwff: layer.pwff,
            norm_1: layer.norm_1,
            norm_2: layer.norm_2,
        };
        Self {
            tokens: stock.tokens,
            positions: stock.positions,
            encoder: Encoder { layers: stock.encoder.layers.into_iter().map(layer).collect() },
            head: stock.head,
        }
    }
}

impl<B: Backend> Layered<B> {
    /// Sequences `[batch, LENGTH]` to logits `[batch, LENGTH, VOCAB_SIZE]`.
    pub fn forward(&self, sequences: Tensor<B, 2, Int>) -> Tensor<B, 3> {
        let x = embed(&self.tokens, &self.positions, sequences);
        let x = self.encoder.layers.iter().fold(x, |x, layer| {
            let attended = layer.mha.forward(LoraMhaInput::self_attn(x.clone())).context;
            let x = layer.norm_1.forward(x + attended);
            layer.norm_2.forward(x.clone() + layer.pwff.forward(x))
        });
        self.head.forward(x)
    }
}

fn embed<B: Backend>(
    tokens: &Embedding<B>,
    positions: &Embedding<B>,
    sequences: Tensor<B, 2, Int>,
) -> Tensor<B, 3> {
    let indices = Tensor::arange(0..LENGTH as i64, &sequences.device()).unsqueeze();
    tokens.forward(sequences) + positions.forward(indices)
}
