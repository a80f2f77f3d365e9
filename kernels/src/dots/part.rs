//! What the instructions work on.

use super::layout::BLOCK;

/// Sums of products that are kept apart until the end of a row. Within a block, four products next to each other go to
/// one of eight sums. Blocks with an odd number have eight of their own.
pub(super) type Sums = [f32; 16];

/// What sums are added to: some blocks of a row and of a vector, and what a sum over each half of a block is multiplied
/// by.
#[derive(Clone, Copy)]
pub(super) struct Part<'a> {
    pub bytes: &'a [u8],
    pub x: &'a [[i8; BLOCK]],
    pub factors: &'a [[f32; 2]],
}

/// Bytes that far ahead are asked for while others are multiplied. Processors do so by themselves only within a page of
/// memory.
pub(super) const AHEAD: usize = 4096;
