//! Pairs of products by `vpmaddubsw`, of one block at once.

use std::arch::x86_64::*;

use super::{
    layout::{BLOCK, Format, Packing},
    part::{AHEAD, Part, Sums},
};

#[target_feature(enable = "avx2")]
pub(super) fn add<F: Format>(part: Part, sums: &mut Sums) {
    let (start, bits) = (F::LAYOUT.start, F::LAYOUT.bits);
    let fifteen = _mm256_set1_epi8(15);
    let sixteen = _mm256_set1_epi8(16);
    let three = _mm256_set1_epi8(3);
    match F::LAYOUT.packing {
        Packing::Nibbles => by_blocks::<F>(part, sums, |bytes, _| nibbles(bytes, start)),
        Packing::NibblesAndBits => {
            // The four bytes of the bits, each for eight places, and the bit of each place.
            let bytes_of = _mm256_setr_epi8(
                0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, //
                2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3,
            );
            let bit_of = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
            by_blocks::<F>(part, sums, |bytes, _| {
                let word =
                    u32::from_le_bytes(*bytes[bits..].first_chunk().expect("the block is longer"));
                let bits = _mm256_shuffle_epi8(_mm256_set1_epi32(word as i32), bytes_of);
                let set = _mm256_cmpeq_epi8(_mm256_and_si256(bits, bit_of), bit_of);
                _mm256_or_si256(nibbles(bytes, start), _mm256_and_si256(set, sixteen))
            });
        }
        Packing::Levels | Packing::EightLevels => {
            let levels = _mm256_broadcastsi128_si256(half(F::LAYOUT.levels, 0));
            by_blocks::<F>(part, sums, |bytes, block| {
                _mm256_shuffle_epi8(levels, nibbles(bytes, start + block * BLOCK / 2))
            });
        }
        Packing::Bytes => {
            let flip = _mm256_set1_epi8(F::LAYOUT.flip as i8);
            by_blocks::<F>(part, sums, |bytes, _| _mm256_xor_si256(whole(bytes, start), flip));
        }
        Packing::Q4K => by_blocks::<F>(part, sums, |bytes, block| {
            let codes = whole(bytes, start + block / 2 * BLOCK);
            _mm256_and_si256(shifted(codes, block % 2 * 4), fifteen)
        }),
        Packing::Q5K => by_blocks::<F>(part, sums, |bytes, block| {
            let fifth = shifted(whole(bytes, bits), block);
            let fifth = _mm256_and_si256(fifth, _mm256_set1_epi8(1));
            let codes = whole(bytes, start + block / 2 * BLOCK);
            let codes = _mm256_and_si256(shifted(codes, block % 2 * 4), fifteen);
            _mm256_or_si256(codes, _mm256_slli_epi16::<4>(fifth))
        }),
        Packing::Q6K => by_blocks::<F>(part, sums, |bytes, block| {
            let (of, group) = (block / 4, block % 4);
            let both = shifted(whole(bytes, bits + of * BLOCK), 2 * group);
            let both = _mm256_and_si256(both, three);
            let codes = whole(bytes, start + of * 64 + group % 2 * BLOCK);
            let codes = _mm256_and_si256(shifted(codes, group / 2 * 4), fifteen);
            _mm256_or_si256(codes, _mm256_slli_epi16::<4>(both))
        }),
        Packing::Q2K => by_blocks::<F>(part, sums, |bytes, block| {
            let codes = whole(bytes, start + block / 4 * BLOCK);
            _mm256_and_si256(shifted(codes, block % 4 * 2), three)
        }),
        Packing::Q3K => by_blocks::<F>(part, sums, |bytes, block| {
            let third = shifted(whole(bytes, bits), block);
            let third = _mm256_and_si256(third, _mm256_set1_epi8(1));
            let codes = whole(bytes, start + block / 4 * BLOCK);
            let codes = _mm256_and_si256(shifted(codes, block % 4 * 2), three);
            _mm256_or_si256(codes, _mm256_slli_epi16::<2>(third))
        }),
    }
}

/// Adds the products of some blocks. `codes` reads the unsigned codes of one of those that lie together.
#[inline]
#[target_feature(enable = "avx2")]
fn by_blocks<F: Format>(part: Part, to: &mut Sums, codes: impl Fn(&[u8], usize) -> __m256i) {
    let Part { bytes, x, factors } = part;
    let (stride, of) = (F::LAYOUT.stride, F::LAYOUT.blocks());
    let zero = _mm256_set1_epi8(F::LAYOUT.zero as i8);
    // SAFETY: there are 16 sums.
    let mut sums = unsafe { [_mm256_loadu_ps(to.as_ptr()), _mm256_loadu_ps(to.as_ptr().add(8))] };
    // What is computed at once: two blocks of 32, or eight that lie together.
    let count = of.max(2);
    let groups = bytes.chunks(count / of * stride).zip(x.chunks(count)).zip(factors.chunks(count));
    for ((bytes, x), factors) in groups {
        for place in 0..count {
            // A single block is left.
            if place == x.len() {
                break;
            }
            let bytes = &bytes[place / of * stride..][..stride];
            ahead(&bytes[place % of * stride / of..]);
            let sum = &mut sums[place % 2];
            *sum = added(*sum, codes(bytes, place % of), zero, &x[place], &factors[place]);
        }
    }
    // SAFETY: there is room for 16.
    unsafe {
        _mm256_storeu_ps(to.as_mut_ptr(), sums[0]);
        _mm256_storeu_ps(to.as_mut_ptr().add(8), sums[1]);
    }
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
    codes: __m256i,
    zero: __m256i,
    x: &[i8; BLOCK],
    factors: &[f32; 2],
) -> __m256 {
    // SAFETY: there are 32 codes, and two factors, which are as long as an `f64`.
    let (x, factors) =
        unsafe { (_mm256_loadu_si256(x.as_ptr().cast()), _mm_load_sd(factors.as_ptr().cast())) };
    let weights = _mm256_sub_epi8(codes, zero);
    let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights));
    let products = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    let factors = _mm256_castps128_ps256(_mm_castpd_ps(factors));
    let four = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    let factors = _mm256_permutevar8x32_ps(factors, four);
    // Not fused: plain Rust would take long to do the same.
    _mm256_add_ps(sums, _mm256_mul_ps(_mm256_cvtepi32_ps(products), factors))
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
