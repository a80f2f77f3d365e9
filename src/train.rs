//! What training needs beyond Burn's optimizers and recorders.

mod checkpoint;
mod lora_plus;

pub use checkpoint::{AtomicRecorder, last_checkpoint};
pub use lora_plus::LoraPlus;
