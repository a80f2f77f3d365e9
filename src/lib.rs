#![doc = include_str!("../README.md")]

mod adapter;
mod adapters;
mod checkpoint;
mod config;
mod error;
mod files;
mod layer;
mod lora_plus;
mod merged;
mod module;
mod overlay;
mod pattern;
mod peft;
mod report;
mod trained;
mod tuned;
mod walk;

pub use adapter::{LoraAdapter, LoraAdapterRecord};
pub use adapters::{Approximation, Combination, LoraAdapters};
pub use checkpoint::{AtomicRecorder, last_checkpoint};
pub use config::{Init, LoraConfig, Scaling};
pub use error::{LoraError, Mismatch};
pub use layer::{
    Adaptable, LoraConv1d, LoraConv1dRecord, LoraConv2d, LoraConv2dRecord, LoraConvTranspose2d,
    LoraConvTranspose2dRecord, LoraEmbedding, LoraEmbeddingRecord, LoraLayer, LoraLinear,
    LoraLinearRecord, LoraMhaCache, LoraMhaInput, LoraMultiHeadAttention,
    LoraMultiHeadAttentionRecord, WeightLayout,
};
pub use lora_plus::LoraPlus;
pub use merged::Merged;
pub use module::{LoraLayers, LoraModule};
pub use overlay::{Lora, LoraRecord, PlacedAdapterRecord};
pub use report::{LayerReport, ParameterReport};
pub use trained::TrainedRecord;
pub use tuned::{AdapterShapeRecord, Tuned, TunedRecord};
