//! Products of a few tiles at a time, for algorithms that use each result at once, such as attention.

use crate::{
    instructions::instructions,
    left::Left,
    round::round,
    tile::{Factors, Pair, SIDE, Tile, Unit},
};

/// 32 columns of a right factor, packed: `[inner, 32]`. Its memory is used again when it is filled again.
#[derive(Debug, Default)]
pub struct Panel {
    /// With zeros up to whole steps of a tile.
    pairs: Vec<Pair>,
}

impl Panel {
    /// Packs `inner` rows, which `row` gives.
    pub fn fill<'a>(&mut self, inner: usize, row: impl Fn(usize) -> &'a [f32; SIDE]) {
        self.pairs.clear();
        self.pairs.resize(inner.next_multiple_of(SIDE) / 2, Pair([0; SIDE]));
        for (place, pair) in self.pairs.iter_mut().enumerate() {
            let (first, second) = (2 * place, 2 * place + 1);
            if second < inner {
                *pair = packed(row(first), row(second));
            } else if first < inner {
                *pair = packed(row(first), &[0.0; SIDE]);
            }
        }
    }

    /// Packs the rows of some tiles, one below the other.
    pub fn fill_tiles(&mut self, tiles: &[Tile]) {
        self.pairs.clear();
        for tile in tiles {
            let rows = tile.0.as_chunks::<2>().0;
            self.pairs.extend(rows.iter().map(|[first, second]| packed(first, second)));
        }
    }
}

/// Two rows of 32 columns, rounded.
fn packed(first: &[f32; SIDE], second: &[f32; SIDE]) -> Pair {
    #[cfg(target_arch = "x86_64")]
    if crate::round::all::by_processor() {
        // SAFETY: the processor has the instructions.
        return unsafe { packed_by_avx512_bf16(first, second) };
    }
    let mut pair = Pair([0; SIDE]);
    for column in 0..SIDE {
        let [first, second] = [first[column], second[column]].map(round);
        pair.0[column] = u32::from(first) | u32::from(second) << 16;
    }
    pair
}

/// `vcvtneps2bf16` gives halves of a vector, which are widened to words and put together.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
fn packed_by_avx512_bf16(first: &[f32; SIDE], second: &[f32; SIDE]) -> Pair {
    use std::arch::x86_64::{
        __m256i, __m512i, _mm512_cvtepu16_epi32, _mm512_cvtneps_pbh, _mm512_loadu_ps,
        _mm512_or_si512, _mm512_slli_epi32, _mm512_storeu_si512,
    };

    let mut pair = Pair([0; SIDE]);
    for half in 0..2 {
        let words = [first, second].map(|row| {
            let numbers = row.as_chunks::<16>().0[half].as_ptr();
            // SAFETY: there are 16 numbers, and bits of one type of vector are bits of the other.
            let halves: __m256i =
                unsafe { std::mem::transmute(_mm512_cvtneps_pbh(_mm512_loadu_ps(numbers))) };
            _mm512_cvtepu16_epi32(halves)
        });
        let both: __m512i = _mm512_or_si512(words[0], _mm512_slli_epi32::<16>(words[1]));
        let to = pair.0.as_chunks_mut::<16>().0[half].as_mut_ptr();
        // SAFETY: there are 16 words.
        unsafe { _mm512_storeu_si512(to.cast(), both) }
    }
    pair
}

/// What multiplies tiles on one thread, by the [instructions](instructions()) that are used.
pub struct Tiles(Unit);

impl Default for Tiles {
    fn default() -> Self {
        Self(Unit::new(instructions()))
    }
}

impl Tiles {
    /// Multiplies 32 rows of a left factor, from `row` on, with a panel: from the column `column` on, as many as the
    /// panel has rows, filled up to a multiple of 32. The result replaces the tile or, if it `adds`, is added to it.
    ///
    /// # Panics
    ///
    /// If the left factor has not so many rows or columns, filled up to multiples of 32 each.
    pub fn multiply(
        &self,
        left: &Left,
        [row, column]: [usize; 2],
        panel: &Panel,
        adds: bool,
        tile: &mut Tile,
    ) {
        let [rows, columns] = left.dims().map(|it| it.next_multiple_of(SIDE));
        let inner = 2 * panel.pairs.len();
        assert!(
            row + SIDE <= rows && column + inner <= columns,
            "32 rows from {row} on and {inner} columns from {column} on are not in {rows} x {columns}"
        );
        let factors = Factors::new(left.from(row, column), left.stride(), &panel.pairs);
        self.0.multiply(factors, SIDE, adds, tile);
    }
}
