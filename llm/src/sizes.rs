//! Models of the sizes of real ones, with random weights: to measure time and memory, which do not depend on the
//! values.

/// A classifier of texts on an encoder of the size of MiniLM: 6 layers, width 384.
pub mod minilm {
    use burn::tensor::backend::Backend;

    use crate::bert::{BertConfig, classifier::TextClassifier};

    /// The number of tokens that it knows.
    pub const VOCAB_SIZE: usize = 30_522;

    /// The model, with two classes.
    pub fn base<B: Backend>(device: &B::Device) -> TextClassifier<B> {
        let config = BertConfig {
            vocab_size: VOCAB_SIZE,
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
}

/// A decoder of the size of SmolLM2-135M: 30 layers, width 576.
pub mod smollm2 {
    use burn::{module::Initializer, tensor::backend::Backend};
    use serde_json::json;

    use crate::{config::LlamaConfig, data::Text, llama::Llama};

    /// The number of tokens of a text.
    pub const LENGTH: usize = 128;

    /// The number of tokens that it knows.
    pub const VOCAB_SIZE: usize = 49_152;

    /// The linear layers of each block.
    pub const LAYERS: [&str; 7] =
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

    /// The model.
    pub fn base<B: Backend>(device: &B::Device) -> Llama<B> {
        let config = json!({
            "model_type": "llama", "vocab_size": VOCAB_SIZE, "hidden_size": 576, "intermediate_size": 1536,
            "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
            "rms_norm_eps": 1e-5, "rope_theta": 1e5, "max_position_embeddings": 2048,
            "tie_word_embeddings": true, "hidden_act": "silu",
        });
        let config = LlamaConfig::from_json(config).expect("it is complete");
        config.init(&Initializer::Normal { mean: 0.0, std: 0.02 }, device)
    }

    /// Texts of tokens from a fixed sequence.
    pub fn texts(count: usize) -> Vec<Text> {
        let ids = |text| (0..LENGTH).map(move |it| text * LENGTH + it);
        let ids = |text| ids(text).map(|it| (it * 7919 % VOCAB_SIZE) as u32).collect();
        (0..count).map(|text| Text { ids: ids(text), given: 0 }).collect()
    }
}
