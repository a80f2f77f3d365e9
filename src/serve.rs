//! Many sets of adapters in use at once.

mod multi;
mod store;

pub use multi::{MixedBatch, MultiLora};
pub use store::{AdapterStore, StoredAdapters};
