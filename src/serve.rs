//! Many sets of adapters in use at once.

mod multi;

pub use multi::{MixedBatch, MultiLora};
