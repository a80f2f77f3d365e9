//! A decoder of the size of SmolLM2-135M with random weights, and its loss on texts of 128 tokens.

// The example reads it from files, which is not measured here.
#[allow(dead_code)]
#[path = "../../examples/language_model/config.rs"]
mod config;
// The example continues texts, which is not measured here.
#[allow(dead_code)]
#[path = "../../examples/language_model/llama.rs"]
mod llama;

use std::ops::Range;

use burn::{
    module::{Initializer, Module},
    tensor::{
        Int, Tensor,
        activation::log_softmax,
        backend::{AutodiffBackend, Backend},
    },
};
use burn_lora::{
    Lora,
    train::{Backward, Blocks, segments},
};
use serde_json::json;

use config::LlamaConfig;
use llama::{Llama, Places};

/// The number of tokens of a text.
pub const LENGTH: usize = 128;

/// The number of places at which the head computes at once, with segments.
const CHUNK: usize = 32;

pub const WORDS: usize = 49_152;

/// The linear layers of each block.
pub const LAYERS: [&str; 7] =
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// Texts, one after the other.
pub struct Texts(pub Vec<i32>);

pub type Model<B> = Llama<B>;

pub fn base<B: Backend>(device: &B::Device) -> Model<B> {
    let config = json!({
        "model_type": "llama", "vocab_size": WORDS, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5, "rope_theta": 1e5, "max_position_embeddings": 2048,
        "tie_word_embeddings": true, "hidden_act": "silu",
    });
    let config: LlamaConfig = serde_json::from_value(config).expect("it is complete");
    config.init(&Initializer::Normal { mean: 0.0, std: 0.02 }, device)
}

/// Texts of tokens from a fixed sequence.
pub fn texts(count: usize) -> Texts {
    Texts((0..count * LENGTH).map(|i| (i * 7919 % WORDS) as i32).collect())
}

/// The gradients of the loss, the sum over all tokens; in segments or at once.
pub fn pass<B: AutodiffBackend>(
    model: &Lora<B, Model<B>>,
    texts: &Texts,
    segmented: bool,
) -> Backward
where
    Model<B>: burn::module::AutodiffModule<B, InnerModule = Model<B::InnerBackend>>,
{
    if segmented {
        return segments(model, texts);
    }
    let context = Blocks::context(&**model, texts, &model.devices()[0]);
    let hidden = model.hidden(context.0.clone(), &context.1);
    Backward::new(model, surprise(model, hidden, &context.0, 0..LENGTH - 1))
}

impl<B: Backend> Blocks<B, 3, Texts> for Llama<B> {
    type Context = (Tensor<B, 2, Int>, Places<B>);

    fn blocks(&self) -> usize {
        self.depth()
    }

    fn context(&self, Texts(ids): &Texts, device: &B::Device) -> Self::Context {
        let count = ids.len() / LENGTH;
        let ids = Tensor::<B, 1, Int>::from_ints(&**ids, device).reshape([count, LENGTH]);
        (ids, self.places(0, LENGTH, device))
    }

    fn begin(&self, (ids, _): &Self::Context) -> Tensor<B, 3> {
        self.embed(ids.clone())
    }

    fn block(&self, index: usize, x: Tensor<B, 3>, (_, places): &Self::Context) -> Tensor<B, 3> {
        self.layer(index, x, places)
    }

    fn parts(&self, _: &Self::Context) -> usize {
        LENGTH / CHUNK
    }

    fn loss(&self, part: usize, x: Tensor<B, 3>, (ids, _): &Self::Context) -> Tensor<B, 1> {
        surprise(self, x, ids, CHUNK * part..(CHUNK * (part + 1)).min(LENGTH - 1))
    }
}

/// The loss at some places of all texts.
fn surprise<B: Backend>(
    llama: &Llama<B>,
    hidden: Tensor<B, 3>,
    ids: &Tensor<B, 2, Int>,
    places: Range<usize>,
) -> Tensor<B, 1> {
    let count = places.len();
    let scores = llama.logits(hidden.narrow(1, places.start, count));
    let targets = ids.clone().narrow(1, places.start + 1, count).unsqueeze_dim(2);
    log_softmax(scores, 2).gather(2, targets).sum().neg()
}
