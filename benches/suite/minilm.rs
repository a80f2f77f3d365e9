//! A classifier of texts on an encoder of the size of MiniLM, with random weights.

// The example reads weights and saves adapters, which is not measured here.
#[allow(dead_code)]
#[path = "../../examples/text_classification/bert.rs"]
pub mod bert;
// Its names in Python are not needed here, and not by all programs what they could train.
#[allow(dead_code)]
#[path = "../../examples/text_classification/model.rs"]
pub mod model;

use burn::tensor::backend::Backend;

use bert::BertConfig;
use model::TextClassifier;

/// The number of words that it knows.
pub const WORDS: usize = 30_522;

pub fn base<B: Backend>(device: &B::Device) -> TextClassifier<B> {
    let config = BertConfig {
        vocab_size: WORDS,
        hidden_size: 384,
        num_hidden_layers: 6,
        num_attention_heads: 12,
        intermediate_size: 1536,
        max_position_embeddings: 512,
        type_vocab_size: 2,
        layer_norm_eps: 1e-12,
    };
    TextClassifier::new(config.init(device), &config, 2, device)
}
