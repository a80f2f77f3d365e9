//! A classifier of texts: BERT, and a linear layer on the mean of its vectors.

use burn::{
    module::Module,
    nn::{Linear, LinearConfig, loss::CrossEntropyLossConfig},
    tensor::{Int, Tensor, backend::Backend},
};
use burn_lora::{peft::Renaming, train::Blocks};

use super::{Bert, BertConfig, Tokens};

/// The layers that the LoRA paper adapts.
pub const QUERY_VALUE: [&str; 2] = ["query", "value"];

/// All linear layers of the encoder.
pub const ALL_LINEAR: [&str; 6] = ["query", "key", "value", "output", "expand", "contract"];

/// The new layer, which always trains in full.
pub const HEAD: &str = "classifier";

/// A text as the encoder reads it, and its class.
#[derive(Clone, Debug)]
pub struct Text {
    /// The ids of its tokens.
    pub ids: Vec<u32>,
    /// The class, from 0.
    pub label: u8,
}

/// An encoder, and a linear layer on the mean of its vectors.
#[derive(Module, Debug)]
pub struct TextClassifier<B: Backend> {
    /// The encoder.
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

/// The loss is the mean over the texts.
impl<B: Backend> Blocks<B, 3, [Text]> for TextClassifier<B> {
    /// The texts and their classes.
    type Context = (Tokens<B>, Tensor<B, 1, Int>);

    fn blocks(&self) -> usize {
        self.bert.depth()
    }

    fn context(&self, texts: &[Text], device: &B::Device) -> Self::Context {
        let labels: Vec<i32> = texts.iter().map(|text| text.label.into()).collect();
        let tokens = Tokens::stack(texts.iter().map(|text| &*text.ids), device);
        (tokens, Tensor::from_ints(&*labels, device))
    }

    fn begin(&self, (tokens, _): &Self::Context) -> Tensor<B, 3> {
        self.bert.begin(tokens)
    }

    fn block(&self, index: usize, x: Tensor<B, 3>, (tokens, _): &Self::Context) -> Tensor<B, 3> {
        self.bert.block(index, x, tokens)
    }

    fn loss(&self, _: usize, x: Tensor<B, 3>, (tokens, labels): &Self::Context) -> Tensor<B, 1> {
        let logits = self.classifier.forward(tokens.mean(x));
        CrossEntropyLossConfig::new().init(&logits.device()).forward(logits, labels.clone())
    }
}

/// The renaming from the names at Hugging Face, as in an encoder without a classifier, to the modules: by its inverse,
/// the adapters fit `AutoModel`.
pub fn names() -> Renaming {
    super::names("bert")
}
