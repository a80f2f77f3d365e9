//! What the instructions work on.

use super::{layout::BLOCK, scales::CHUNK};

/// Sums of products that are kept apart until the end of a row. Within a block, four products next to each other go to
/// one of eight sums. Blocks with an odd number have eight of their own.
pub(super) type Sums = [f32; 16];

/// What the sums over both halves of each block are multiplied by.
pub(super) type Factors = [[f32; 2]; CHUNK];

/// What sums are added to: some blocks of a row and of vectors, and what a sum over each half of a block is multiplied by
/// for each vector.
#[derive(Clone, Copy)]
pub(super) struct Part<'a, const N: usize> {
    pub bytes: &'a [u8],
    pub x: [&'a [[i8; BLOCK]]; N],
    pub factors: [&'a [[f32; 2]]; N],
}

impl<const N: usize> Part<'_, N> {
    /// The number of blocks.
    pub fn blocks(&self) -> usize {
        self.x.first().map_or(0, |it| it.len())
    }
}

/// Bytes that far ahead are asked for while others are multiplied. Processors do so by themselves only within a page of
/// memory.
pub(super) const AHEAD: usize = 4096;
