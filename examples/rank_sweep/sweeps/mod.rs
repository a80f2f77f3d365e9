//! The sweeps, one a file.

pub mod alpha;
pub mod initialization;
pub mod layers;
pub mod rank;
pub mod scaling;
pub mod singular_values;
