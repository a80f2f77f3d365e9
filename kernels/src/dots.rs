//! Dot products of packed rows with vectors in 8 bits, whose products are summed up in whole numbers.

mod blocks;
mod format;
mod formats;
mod kernel;
mod layout;
mod part;
#[forbid(unsafe_code)]
mod portable;
mod row;
mod scales;
mod split;
mod vector;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod vnni;

pub use blocks::Blocks;
pub use format::BlockFormat;
pub use kernel::{Dots, dots};
pub use row::DotMemory;
pub use split::{Codes, Floats, SplitRow};
pub use vector::Vector8;
