//! The product of 32 rows with 32 columns, which each set of instructions computes in its way.

#[forbid(unsafe_code)]
mod portable;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[forbid(unsafe_code)]
mod wide;

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx512_bf16;

use crate::instructions::Instructions;

/// The rows, and the columns, of a tile.
pub(crate) const SIDE: usize = 32;

/// Sums in `f32`, of 32 rows and 32 columns. Like all that tiles are computed from, they begin where a line of the cache does:
/// an instruction that reads from two lines takes twice as long.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub struct Tile(
    /// The rows.
    pub [[f32; SIDE]; SIDE],
);

/// Two rows of 32 columns of the right matrix: for each column, the numbers of both in one word, the first in the lower
/// half.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub(crate) struct Pair(pub [u32; SIDE]);

/// What a tile is computed from, in bf16. All is there for 32 rows and 32 columns, with zeros where the matrices end,
/// and for a whole number of steps of 32 along the dimension that is summed over.
#[derive(Clone, Copy)]
pub(crate) struct Factors<'a> {
    /// Rows of the left matrix, which begin `stride` apart.
    left: &'a [u16],
    stride: usize,
    right: &'a [Pair],
}

impl<'a> Factors<'a> {
    /// # Panics
    ///
    /// If the slices do not hold what a tile is computed from.
    pub fn new(left: &'a [u16], stride: usize, right: &'a [Pair]) -> Self {
        assert!(right.len().is_multiple_of(SIDE / 2), "{} pairs", right.len());
        let needed = (SIDE - 1) * stride + 2 * right.len();
        assert!(left.len() >= needed, "{} numbers, {needed} expected", left.len());
        Self { left, stride, right }
    }
}

/// What computes tiles on one thread.
pub(crate) struct Unit {
    by: Instructions,
    #[cfg(target_arch = "x86_64")]
    tiles: Option<amx::Configured>,
}

impl Unit {
    /// # Panics
    ///
    /// If the processor does not have the instructions.
    pub fn new(by: Instructions) -> Self {
        assert!(by.are_there(), "this processor has no {by}");
        Self {
            by,
            #[cfg(target_arch = "x86_64")]
            tiles: (by == Instructions::Amx).then(amx::Configured::new),
        }
    }

    /// Computes the first `rows` of a tile, or adds to them. The others become anything.
    pub fn multiply(&self, factors: Factors, rows: usize, adds: bool, tile: &mut Tile) {
        #[cfg(target_arch = "x86_64")]
        if let Some(tiles) = &self.tiles {
            return tiles.multiply(factors, adds, tile);
        }
        match self.by {
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512Bf16 => avx512_bf16::multiply(factors, rows, adds, tile),
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 => wide::by_avx512(factors, rows, adds, tile),
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx2 => wide::by_avx2(factors, rows, adds, tile),
            #[cfg(target_arch = "aarch64")]
            Instructions::Neon => wide::by_neon(factors, rows, adds, tile),
            _ => portable::multiply(factors, rows, adds, tile),
        }
    }
}
