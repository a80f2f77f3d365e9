//! Adapters in files of llama.cpp: `general.type` is `adapter`, and the factors of a layer have the name of its weight
//! with `.lora_a` and `.lora_b` after it.
//!
//! A is `[rank, d_input]` there, and B `[d_output, rank]`, as PyTorch has them. What is multiplied is
//! `adapter.lora.alpha / rank`, or nothing if alpha is 0.

mod reading;
mod writing;

use crate::adapters::renaming::{Renaming, is_at};

const ARCHITECTURE: &str = "general.architecture";
const GENERAL_TYPE: &str = "general.type";
const ADAPTER_TYPE: &str = "adapter.type";
const ALPHA: &str = "adapter.lora.alpha";
const INVOCATION: &str = "adapter.alora.invocation_tokens";
const BASES: &str = "general.base_model.count";
const BASE: &str = "general.base_model.0.name";
const BASE_ADDRESS: &str = "general.base_model.0.repo_url";

/// What an address on Hugging Face's hub begins with.
const HUB: &str = "https://huggingface.co/";

/// The table of embeddings. llama.cpp has its factors the other way round.
const TABLE: &str = "token_embd";

/// What comes after the name of a layer.
const WEIGHT: &str = ".weight";
const A: &str = ".weight.lora_a";
const B: &str = ".weight.lora_b";

/// How a family of language models has its layers in GGUF files.
///
/// ```
/// use burn_lora::{gguf::Family, peft::Renaming};
///
/// let family = Family {
///     architecture: "llama".to_owned(),
///     names: Renaming::new([
///         ("blk.*.attn_q", "layers.*.attention.query"),
///         ("blk.*.attn_k", "layers.*.attention.key"),
///         ("blk.*.ffn_down", "layers.*.feed_forward.down"),
///     ]),
///     // 8 heads of queries share 2 of keys.
///     pairs: vec![("blk.*.attn_q".to_owned(), 8), ("blk.*.attn_k".to_owned(), 2)],
///     is_tied: true,
/// };
/// # assert_eq!(family.names.apply("blk.1.attn_q"), "layers.1.attention.query");
/// ```
#[derive(Clone, Debug)]
pub struct Family {
    /// Its name, `general.architecture`. llama.cpp takes adapters for a model of the same one only.
    pub architecture: String,
    /// From the names of the layers in files, without `.weight`, to their paths in the model. Layers that it does not
    /// name have no adapters in such files.
    pub names: Renaming,
    /// Templates of names in files, each with a number of heads: layers whose rows that RoPE turns together are next to
    /// each other there, and half a head apart in the model. See [`pairs_to_halves`](crate::gguf::pairs_to_halves).
    pub pairs: Vec<(String, usize)>,
    /// Whether the table of embeddings is also the head. llama.cpp then takes no adapter of either: it multiplies by the
    /// same tensor in both places, which does not fit, and ends the whole program.
    pub is_tied: bool,
}

impl Family {
    /// Whether so many outputs of the layer of this name are whole heads of pairs.
    fn fits(&self, name: &str, outputs: usize) -> bool {
        self.heads(name).is_none_or(|heads| heads > 0 && outputs.is_multiple_of(2 * heads))
    }

    /// The heads of the layer of this name, if the pairs of its rows are next to each other.
    fn heads(&self, name: &str) -> Option<usize> {
        self.pairs.iter().find(|(template, _)| is_at(name, template)).map(|(_, heads)| *heads)
    }
}
