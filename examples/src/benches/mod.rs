//! What the benches share: measuring, and what both the time and the memory of are measured.

pub mod layers;
pub mod measure;
pub mod models;
pub mod text;
pub mod train_step;
