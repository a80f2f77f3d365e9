//! Dot products of packed rows with vectors in 8 bits.

mod extremes;
mod matrices;
mod oracle;
mod products;
mod split;
mod unpack;
mod vectors;
