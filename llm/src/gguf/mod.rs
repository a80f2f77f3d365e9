//! Language models in [GGUF](https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) files: what their fields say of
//! a decoder and of its tokens. [`burn_lora::gguf`] reads and writes the files themselves.

pub(crate) mod architecture;
pub mod config;
pub(crate) mod fields;
pub mod model;
mod rope;
pub mod tokens;

use std::path::Path;

use burn_lora::gguf::{Family, Gguf};

use crate::{
    config::LlamaConfig,
    error::{Context, Result},
    files::{check_start, is_gguf_start, start_of},
};
use architecture::Architecture;

/// The families of decoders that can be read: the names of each in GGUF files, and in `config.json`.
pub fn families() -> impl Iterator<Item = [&'static str; 2]> {
    Architecture::names()
}

/// Reads the header of a file, as [`Gguf::open`] does.
///
/// # Errors
///
/// Those of [`Gguf::open`]. A file of another kind is named as such.
pub fn open(path: &Path) -> Result<Gguf> {
    let start = start_of(path).context(path.display())?;
    if !is_gguf_start(&start) {
        check_start(path, &start)?;
    }
    Gguf::open(path).map_err(|error| error.to_string())
}

/// How the linear layers, and the table of embeddings, of a decoder are called in GGUF files, so that adapters can be
/// exchanged with llama.cpp: see [`LoraAdapters::save_gguf`](burn_lora::LoraAdapters::save_gguf).
///
/// # Errors
///
/// If there are no GGUF files of such decoders.
pub fn family(config: &LlamaConfig) -> Result<Family> {
    let model_type = config.model_type();
    let family = Architecture::of_model_type(&model_type)
        .ok_or_else(|| format!("there are no GGUF files of the family `{model_type}`"))?;
    let heads = [("attn_q", config.num_attention_heads), ("attn_k", config.key_value_heads())];
    let pairs = heads.map(|(name, heads)| (format!("blk.*.{name}"), heads));
    Ok(Family {
        architecture: family.name.to_owned(),
        names: family.modules(),
        pairs: if family.permuted { pairs.into() } else { Vec::new() },
        is_tied: config.tie_word_embeddings,
    })
}
