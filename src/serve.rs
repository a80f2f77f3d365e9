//! Many sets of adapters in use at once.

mod memory;
mod multi;
mod store;

pub use memory::MemoryReport;
pub use multi::{MixedBatch, MultiLora};
pub use store::{AdapterStore, StoredAdapters};
