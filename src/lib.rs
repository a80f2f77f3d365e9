#![doc = include_str!("../README.md")]

mod adapter;
mod adapters;
mod config;
mod error;
mod layer;
mod merged;
mod module;
mod pattern;
mod peft;
mod report;
mod walk;

pub use adapter::{LoraAdapter, LoraAdapterRecord};
pub use adapters::{Approximation, Combination, LoraAdapters};
pub use config::{Init, LoraConfig, Scaling};
pub use error::{LoraError, Mismatch};
pub use layer::{LoraLayer, LoraLinear, LoraLinearRecord};
pub use merged::Merged;
pub use module::{LoraLayers, LoraModule};
pub use report::{LayerReport, ParameterReport};
