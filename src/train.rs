//! What training needs beyond Burn's optimizers and recorders.

mod backward;
mod checkpoint;
mod lora_plus;
mod message_pack;
mod replicas;
mod segments;
mod workers;

pub use backward::Backward;
pub use checkpoint::{AtomicRecorder, last_checkpoint};
pub use lora_plus::LoraPlus;
#[cfg(feature = "mpi")]
pub use replicas::MpiReplicas;
pub use replicas::{Alone, Replicas, ThreadReplica, fingerprint};
pub use segments::{Blocks, segments};
pub use workers::Workers;
