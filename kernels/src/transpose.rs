//! The transpose of 32 rows of pairs.

use crate::{
    instructions::Instructions,
    tile::{Pair, SIDE},
};

/// Rows that are transposed at once.
const SQUARE: usize = 16;

/// Writes the pairs at each place of 32 rows, which lie one after the other, next to each other.
pub(crate) fn transpose(by: Instructions, rows: &[[u16; 2]], to: &mut [Pair]) {
    let length = to.len();
    assert_eq!((rows.len(), length % SQUARE), (SIDE * length, 0));
    match by {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: these are chosen only where the processor has them.
        Instructions::Avx512 | Instructions::Avx512Bf16 | Instructions::Amx => unsafe {
            by_avx512(rows, to);
        },
        _ => {
            for (place, to) in to.iter_mut().enumerate() {
                for (row, to) in to.0.iter_mut().enumerate() {
                    let [first, second] = rows[row * length + place];
                    *to = u32::from(first) | u32::from(second) << 16;
                }
            }
        }
    }
}

/// Squares of 16 by 16 words, in four steps: words, pairs of words, and twice groups of four words change places.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn by_avx512(rows: &[[u16; 2]], to: &mut [Pair]) {
    use std::arch::x86_64::{
        __m512i, _mm512_loadu_epi32, _mm512_setzero_si512, _mm512_shuffle_i32x4,
        _mm512_storeu_epi32, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32,
        _mm512_unpacklo_epi64,
    };

    let length = to.len();
    for (step, to) in to.as_chunks_mut::<SQUARE>().0.iter_mut().enumerate() {
        for half in 0..SIDE / SQUARE {
            let mut lines: [__m512i; SQUARE] = [_mm512_setzero_si512(); SQUARE];
            for (row, line) in lines.iter_mut().enumerate() {
                let start = (half * SQUARE + row) * length + step * SQUARE;
                let words = &rows[start..start + SQUARE];
                // SAFETY: these are 16 pairs, each of the size of a word.
                *line = unsafe { _mm512_loadu_epi32(words.as_ptr().cast()) };
            }
            let mut next = lines;
            for i in 0..SQUARE / 2 {
                next[2 * i] = _mm512_unpacklo_epi32(lines[2 * i], lines[2 * i + 1]);
                next[2 * i + 1] = _mm512_unpackhi_epi32(lines[2 * i], lines[2 * i + 1]);
            }
            for i in 0..SQUARE / 4 {
                let [a, b, c, d] = [0, 1, 2, 3].map(|it| next[4 * i + it]);
                lines[4 * i] = _mm512_unpacklo_epi64(a, c);
                lines[4 * i + 1] = _mm512_unpackhi_epi64(a, c);
                lines[4 * i + 2] = _mm512_unpacklo_epi64(b, d);
                lines[4 * i + 3] = _mm512_unpackhi_epi64(b, d);
            }
            // The line 4·i + j has, in its quarter q, the place 4·q + j of the rows 4·i to 4·i + 3.
            for j in 0..4 {
                let [a, b, c, d] = [0, 4, 8, 12].map(|it| lines[it + j]);
                let [ab, cd] =
                    [_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0x88>(c, d)];
                next[j] = _mm512_shuffle_i32x4::<0x88>(ab, cd);
                next[8 + j] = _mm512_shuffle_i32x4::<0xdd>(ab, cd);
                let [ab, cd] =
                    [_mm512_shuffle_i32x4::<0xdd>(a, b), _mm512_shuffle_i32x4::<0xdd>(c, d)];
                next[4 + j] = _mm512_shuffle_i32x4::<0x88>(ab, cd);
                next[12 + j] = _mm512_shuffle_i32x4::<0xdd>(ab, cd);
            }
            for (line, to) in next.iter().zip(to.iter_mut()) {
                let words = &mut to.0[half * SQUARE..(half + 1) * SQUARE];
                // SAFETY: these are 16 words.
                unsafe { _mm512_storeu_epi32(words.as_mut_ptr().cast(), *line) }
            }
        }
    }
}
