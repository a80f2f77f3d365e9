//! A classifier of texts: BERT, and a linear layer on the mean of its vectors.

use burn::{
    module::Module,
    nn::{Linear, LinearConfig},
    tensor::{Tensor, backend::Backend},
};
use burn_lora::Renaming;

use super::bert::{self, Bert, BertConfig, Tokens};

/// The layers that the LoRA paper adapts.
pub const QUERY_VALUE: [&str; 2] = ["query", "value"];

/// All linear layers of the encoder.
pub const ALL_LINEAR: [&str; 6] = ["query", "key", "value", "output", "expand", "contract"];

/// The new layer, which always trains in full.
pub const HEAD: &str = "classifier";

#[derive(Module, Debug)]
pub struct TextClassifier<B: Backend> {
    pub bert: Bert<B>,
    classifier: Linear<B>,
}

impl<B: Backend> TextClassifier<B> {
    /// A new classifier on an encoder whose vectors have `config.hidden_size` elements.
    pub fn new(bert: Bert<B>, config: &BertConfig, classes: usize, device: &B::Device) -> Self {
        Self { bert, classifier: LinearConfig::new(config.hidden_size, classes).init(device) }
    }

    /// One logit per class for each text: `[batch, classes]`.
    pub fn forward(&self, tokens: &Tokens<B>) -> Tensor<B, 2> {
        self.classifier.forward(self.bert.embed(tokens))
    }
}

/// The names of the modules at Hugging Face, as in an encoder without a classifier: the adapters then fit
/// `AutoModel`.
pub fn names() -> Renaming {
    bert::names("bert")
}
