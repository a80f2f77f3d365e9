//! Products of matrices in bf16.

mod formats;
mod oracle;
mod outputs;
mod refused;
mod rounding;
mod sizes;
mod special;
mod stripes;
mod terms;
mod threads;
mod tiles;
