#![doc = include_str!("../README.md")]

mod adapter;
mod adapters;
mod config;
mod error;
mod layer;
mod merged;
mod module;
mod overlay;
mod pattern;
mod peft;
mod report;
mod walk;

pub use adapter::{LoraAdapter, LoraAdapterRecord};
pub use adapters::{Approximation, Combination, LoraAdapters};
pub use config::{Init, LoraConfig, Scaling};
pub use error::{LoraError, Mismatch};
pub use layer::{
    Adaptable, LoraConv1d, LoraConv1dRecord, LoraConv2d, LoraConv2dRecord, LoraConvTranspose2d,
    LoraConvTranspose2dRecord, LoraEmbedding, LoraEmbeddingRecord, LoraLayer, LoraLinear,
    LoraLinearRecord, LoraMhaCache, LoraMhaInput, LoraMultiHeadAttention,
    LoraMultiHeadAttentionRecord, WeightLayout,
};
pub use merged::Merged;
pub use module::{LoraLayers, LoraModule};
pub use overlay::{Lora, LoraRecord, PlacedAdapterRecord, TrainedRecord};
pub use report::{LayerReport, ParameterReport};
