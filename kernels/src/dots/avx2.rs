//! Pairs of products by `vpmaddubsw`, of one block at once.

use std::arch::x86_64::*;

use super::{
    Vector8,
    layout::{BLOCK, Format, Packing},
    part::{AHEAD, Part, Sums},
    split::HalvesRow,
};

/// The unsigned codes of a block, of those that lie together.
#[inline]
#[target_feature(enable = "avx2")]
fn codes<F: Format>(bytes: &[u8], block: usize) -> __m256i {
    let (start, bits) = (F::LAYOUT.start, F::LAYOUT.bits);
    let fifteen = _mm256_set1_epi8(15);
    let three = _mm256_set1_epi8(3);
    match F::LAYOUT.packing {
        Packing::Nibbles => nibbles(bytes, start),
        Packing::NibblesAndBits => {
            // The four bytes of the bits, each for eight places, and the bit of each place.
            let bytes_of = _mm256_setr_epi8(
                0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, //
                2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3,
            );
            let bit_of = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
            let word =
                u32::from_le_bytes(*bytes[bits..].first_chunk().expect("the block is longer"));
            let bits = _mm256_shuffle_epi8(_mm256_set1_epi32(word as i32), bytes_of);
            let set = _mm256_cmpeq_epi8(_mm256_and_si256(bits, bit_of), bit_of);
            _mm256_or_si256(nibbles(bytes, start), _mm256_and_si256(set, _mm256_set1_epi8(16)))
        }
        Packing::Levels | Packing::EightLevels => {
            let levels = _mm256_broadcastsi128_si256(half(F::LAYOUT.levels, 0));
            _mm256_shuffle_epi8(levels, nibbles(bytes, start + block * BLOCK / 2))
        }
        Packing::Bytes => {
            _mm256_xor_si256(whole(bytes, start), _mm256_set1_epi8(F::LAYOUT.flip as i8))
        }
        Packing::Q4K => {
            let codes = whole(bytes, start + block / 2 * BLOCK);
            _mm256_and_si256(shifted(codes, block % 2 * 4), fifteen)
        }
        Packing::Q5K => {
            let fifth = shifted(whole(bytes, bits), block);
            let fifth = _mm256_and_si256(fifth, _mm256_set1_epi8(1));
            let codes = whole(bytes, start + block / 2 * BLOCK);
            let codes = _mm256_and_si256(shifted(codes, block % 2 * 4), fifteen);
            _mm256_or_si256(codes, _mm256_slli_epi16::<4>(fifth))
        }
        Packing::Q6K => {
            let (of, group) = (block / 4, block % 4);
            let both = shifted(whole(bytes, bits + of * BLOCK), 2 * group);
            let both = _mm256_and_si256(both, three);
            let codes = whole(bytes, start + of * 64 + group % 2 * BLOCK);
            let codes = _mm256_and_si256(shifted(codes, group / 2 * 4), fifteen);
            _mm256_or_si256(codes, _mm256_slli_epi16::<4>(both))
        }
        Packing::Q2K => {
            let codes = whole(bytes, start + block / 4 * BLOCK);
            _mm256_and_si256(shifted(codes, block % 4 * 2), three)
        }
        Packing::Q3K => {
            let third = shifted(whole(bytes, bits), block);
            let third = _mm256_and_si256(third, _mm256_set1_epi8(1));
            let codes = whole(bytes, start + block / 4 * BLOCK);
            let codes = _mm256_and_si256(shifted(codes, block % 4 * 2), three);
            _mm256_or_si256(codes, _mm256_slli_epi16::<2>(third))
        }
    }
}

/// Adds the products of some blocks.
#[target_feature(enable = "avx2")]
pub(super) fn add<F: Format, const N: usize>(part: Part<N>, to: &mut [Sums; N]) {
    let Part { bytes, x, factors } = part;
    let (stride, of) = (F::LAYOUT.stride, F::LAYOUT.blocks());
    let zero = _mm256_set1_epi8(F::LAYOUT.zero as i8);
    let mut sums = [[_mm256_setzero_ps(); 2]; N];
    for (sums, to) in sums.iter_mut().zip(&*to) {
        // SAFETY: there are 16 sums.
        *sums = unsafe { [_mm256_loadu_ps(to.as_ptr()), _mm256_loadu_ps(to.as_ptr().add(8))] };
    }
    // What is computed at once: two blocks of 32, or eight that lie together.
    let count = of.max(2);
    for (group, bytes) in bytes.chunks(count / of * stride).enumerate() {
        for place in 0..count {
            let block = group * count + place;
            // A single block is left.
            if block == part.blocks() {
                break;
            }
            let bytes = &bytes[place / of * stride..][..stride];
            ahead(&bytes[place % of * stride / of..]);
            let weights = _mm256_sub_epi8(codes::<F>(bytes, place % of), zero);
            let magnitudes = _mm256_abs_epi8(weights);
            for vector in 0..N {
                let (x, factors) = (&x[vector][block], of_two(&factors[vector][block]));
                let sum = &mut sums[vector][place % 2];
                *sum = added(*sum, weights, magnitudes, x, factors);
            }
        }
    }
    for (sums, to) in sums.iter().zip(to) {
        // SAFETY: there is room for 16.
        unsafe {
            _mm256_storeu_ps(to.as_mut_ptr(), sums[0]);
            _mm256_storeu_ps(to.as_mut_ptr().add(8), sums[1]);
        }
    }
}

/// The products of a row of blocks of 32 with scales of 16 bits, which are read eight at once.
#[target_feature(enable = "avx2,f16c")]
pub(super) fn halves<F: Format, const N: usize>(row: HalvesRow, x: [&Vector8; N]) -> [f32; N] {
    let blocks = row.scales.len();
    let zero = _mm256_set1_epi8(F::LAYOUT.zero as i8);
    let mut sums = [[_mm256_setzero_ps(); 2]; N];
    let mut minima = sums;
    for start in (0..blocks).step_by(GROUP) {
        let count = GROUP.min(blocks - start);
        let scales = widened(&row.scales[start..start + count]);
        let mut factors = [[0.0; GROUP]; N];
        for (factors, x) in factors.iter_mut().zip(x) {
            let products = _mm256_mul_ps(scales, eight(&x.scales()[start..]));
            // SAFETY: there is room for eight.
            unsafe { _mm256_storeu_ps(factors.as_mut_ptr(), products) }
        }
        if let Some(least) = row.minima {
            let least = widened(&least[start..start + count]);
            for half in 0..2 {
                let places = _mm256_add_epi32(
                    _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3),
                    _mm256_set1_epi32(half as i32 * 4),
                );
                let least = _mm256_permutevar8x32_ps(least, places);
                for (minima, x) in minima.iter_mut().zip(x) {
                    let of_halves = eight(x.sums()[start + half * GROUP / 2..].as_flattened());
                    minima[half] = _mm256_add_ps(minima[half], _mm256_mul_ps(least, of_halves));
                }
            }
        }
        for place in 0..count {
            let block = start + place;
            let bytes = &row.bytes[block * F::LAYOUT.stride..][..F::LAYOUT.stride];
            ahead(bytes);
            let weights = _mm256_sub_epi8(codes::<F>(bytes, 0), zero);
            let magnitudes = _mm256_abs_epi8(weights);
            for vector in 0..N {
                let (x, factor) =
                    (&x[vector].codes()[block], _mm256_set1_ps(factors[vector][place]));
                let sum = &mut sums[vector][place % 2];
                *sum = added(*sum, weights, magnitudes, x, factor);
            }
        }
    }
    let mut products = [0.0; N];
    for (vector, product) in products.iter_mut().enumerate() {
        *product = total(sums[vector]) + total(minima[vector]);
    }
    products
}

/// Scales that are read at once.
const GROUP: usize = 8;

/// The first eight numbers.
#[inline]
#[target_feature(enable = "avx2")]
fn eight(numbers: &[f32]) -> __m256 {
    let numbers: &[f32; 8] = numbers.first_chunk().expect("vectors are filled up");
    // SAFETY: there are eight.
    unsafe { _mm256_loadu_ps(numbers.as_ptr()) }
}

/// The numbers in half precision, eight at most, and zeros after them.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn widened(halves: &[[u8; 2]]) -> __m256 {
    let mut bits = [[0; 2]; GROUP];
    bits[..halves.len()].copy_from_slice(halves);
    // SAFETY: there are 16 bytes.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(bits.as_ptr().cast()) })
}

/// The sum, of which one half is added to the other until one number is left.
#[inline]
#[target_feature(enable = "avx2")]
fn total([one, other]: [__m256; 2]) -> f32 {
    let eight = _mm256_add_ps(one, other);
    let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
}

/// Asks for bytes that are needed later.
#[inline]
#[target_feature(enable = "avx2")]
fn ahead(bytes: &[u8]) {
    let address = bytes.as_ptr().wrapping_add(AHEAD).cast();
    #[allow(unused_unsafe, reason = "it is safe from some version of Rust on")]
    // SAFETY: nothing happens where there is no memory.
    unsafe {
        _mm_prefetch::<_MM_HINT_T0>(address);
    }
}

/// The products of a block, added to sums.
///
/// `vpmaddubsw` adds two products of an unsigned and a signed byte in 16 bits, and saturates. So the magnitude of a
/// weight is multiplied with the other number, which gets the weight's sign: 2 · 128 · 127 is in range.
#[inline]
#[target_feature(enable = "avx2")]
fn added(
    sums: __m256,
    weights: __m256i,
    magnitudes: __m256i,
    x: &[i8; BLOCK],
    factors: __m256,
) -> __m256 {
    // SAFETY: there are 32 codes.
    let x = unsafe { _mm256_loadu_si256(x.as_ptr().cast()) };
    let pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(x, weights));
    let products = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    // Not fused: plain Rust would take long to do the same.
    _mm256_add_ps(sums, _mm256_mul_ps(_mm256_cvtepi32_ps(products), factors))
}

/// Each of two factors for four sums.
#[inline]
#[target_feature(enable = "avx2")]
fn of_two(factors: &[f32; 2]) -> __m256 {
    // SAFETY: two factors are as long as an `f64`.
    let factors = unsafe { _mm_load_sd(factors.as_ptr().cast()) };
    let factors = _mm256_castps128_ps256(_mm_castpd_ps(factors));
    _mm256_permutevar8x32_ps(factors, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1))
}

/// The lower halves of 16 bytes, and the upper ones after them.
#[inline]
#[target_feature(enable = "avx2")]
fn nibbles(bytes: &[u8], start: usize) -> __m256i {
    let bytes = half(bytes, start);
    let both = _mm256_set_m128i(_mm_srli_epi16::<4>(bytes), bytes);
    _mm256_and_si256(both, _mm256_set1_epi8(15))
}

/// The lowest bits of each byte are those that were so many bits higher. The others become anything.
#[inline]
#[target_feature(enable = "avx2")]
fn shifted(bytes: __m256i, by: usize) -> __m256i {
    _mm256_srl_epi16(bytes, _mm_cvtsi32_si128(by as i32))
}

#[inline]
#[target_feature(enable = "avx2")]
fn whole(bytes: &[u8], start: usize) -> __m256i {
    let bytes: &[u8; 32] = bytes[start..].first_chunk().expect("the block is longer");
    // SAFETY: there are 32 bytes.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn half(bytes: &[u8], start: usize) -> __m128i {
    let bytes: &[u8; 16] = bytes[start..].first_chunk().expect("the block is longer");
    // SAFETY: there are 16 bytes.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}
