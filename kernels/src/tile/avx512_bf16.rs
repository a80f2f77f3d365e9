//! Pairs of bf16 by `vdpbf16ps`: in each of 16 places, the products of two pairs are added to a sum in `f32`.

use std::arch::x86_64::{
    __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_epi32, _mm512_loadu_ps, _mm512_set1_epi32,
    _mm512_setzero_ps, _mm512_storeu_ps,
};

use super::{Factors, SIDE, Tile};

/// With two vectors, the sums of so many rows take half of the registers. A row more of them would not be faster: 16
/// sums at once are more than an instruction's latency.
const ROWS: usize = 8;

/// Numbers in a vector.
const LANES: usize = 16;

pub(super) fn multiply(factors: Factors, rows: usize, adds: bool, tile: &mut Tile) {
    for top in (0..rows).step_by(ROWS) {
        // SAFETY: `instructions` chooses these only where the processor has them.
        unsafe { multiply_rows(factors, top, adds, tile) }
    }
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn multiply_rows(
    Factors { left, stride, right }: Factors,
    top: usize,
    adds: bool,
    tile: &mut Tile,
) {
    // Each row has as many pairs, which is looked at here and not for each of them.
    let rows: [*const i32; ROWS] =
        std::array::from_fn(|row| left[(top + row) * stride..][..2 * right.len()].as_ptr().cast());
    const { assert!(SIDE == 2 * LANES && SIDE.is_multiple_of(ROWS)) };
    let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
    if adds {
        for (sums, row) in sums.iter_mut().zip(&tile.0[top..top + ROWS]) {
            // SAFETY: the row has 32 numbers, which are two vectors.
            *sums = unsafe {
                [_mm512_loadu_ps(row.as_ptr()), _mm512_loadu_ps(row.as_ptr().add(LANES))]
            };
        }
    }
    for (pair, words) in right.iter().enumerate() {
        // SAFETY: there are 32 words, which are two vectors.
        let (lower, upper) = unsafe {
            let words = words.0.as_ptr().cast::<i32>();
            (as_bf16(_mm512_loadu_epi32(words)), as_bf16(_mm512_loadu_epi32(words.add(LANES))))
        };
        for (row, sums) in rows.iter().zip(&mut sums) {
            // SAFETY: the row has so many pairs of numbers, and one more.
            let both = unsafe { row.add(pair).read_unaligned() };
            let both = as_bf16(_mm512_set1_epi32(both));
            *sums =
                [_mm512_dpbf16_ps(sums[0], both, lower), _mm512_dpbf16_ps(sums[1], both, upper)];
        }
    }
    for (sums, row) in sums.iter().zip(&mut tile.0[top..top + ROWS]) {
        // SAFETY: as above.
        unsafe {
            _mm512_storeu_ps(row.as_mut_ptr(), sums[0]);
            _mm512_storeu_ps(row.as_mut_ptr().add(LANES), sums[1]);
        }
    }
}

/// The same bits as another type of vector.
#[inline(always)]
fn as_bf16(words: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits, of which each value is valid.
    unsafe { std::mem::transmute(words) }
}
