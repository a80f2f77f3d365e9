//! Language models for [burn-lora](burn_lora): the decoders of Llama's family and BERT's encoders, read from Hugging
//! Face directories and GGUF files, with their tokens, chats, texts, losses and generation.
//!
//! The package also has the program `burn-lora`, which trains, evaluates, merges and serves such models:
//! `cargo install --path llm`.
//!
//! # Where to start
//!
//! - [`llama`]: the decoder; [`config`], [`pretrained`], [`merged`]: its sizes and files; [`gguf`]: files of llama.cpp.
//! - [`bert`]: the encoder, and a classifier of texts on it.
//! - [`chat`]: tokens and chat templates; [`data`]: texts to learn from; [`loss`]: cross-entropy.
//! - [`sizes`]: models with random weights, to measure with.
//! - [`generate`](mod@generate): an answer, token by token; [`texts`]: many at once, with adapters of their own.
//!
//! # Features
//!
//! The library is generic over Burn's [`Backend`](burn::tensor::backend::Backend) and needs none. `cli` has what
//! programs with arguments need; the backends' features choose the one of the program.

pub mod bert;
pub mod chat;
#[cfg(feature = "cli")]
pub mod cli;
pub mod config;
pub mod data;
mod error;
pub mod files;
pub mod generate;
pub mod gguf;
pub mod llama;
pub mod loss;
pub mod merged;
pub mod pretrained;
pub mod sizes;
pub mod sst2;
pub mod texts;
mod tokenizer;

pub use error::{Context, Result};
