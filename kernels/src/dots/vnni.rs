//! Groups of four products by `vpdpbusd`, of two blocks at once.

use std::arch::x86_64::*;

use super::{
    layout::{BLOCK, Format, Packing},
    part::{AHEAD, Part, Sums},
    portable,
};

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn add<F: Format>(part: Part, sums: &mut Sums) {
    let (start, bits) = (F::LAYOUT.start, F::LAYOUT.bits);
    let fifteen = _mm512_set1_epi8(15);
    let sixteen = _mm512_set1_epi8(16);
    // What the shorter vectors are shifted by: quarters, and halves, in turn.
    let quarters = _mm512_set_epi64(
        0x4_0004_0004_0004,
        0x4_0004_0004_0004,
        0,
        0,
        0x4_0004_0004_0004,
        0x4_0004_0004_0004,
        0,
        0,
    );
    match F::LAYOUT.packing {
        Packing::Nibbles => by_pairs::<F>(part, sums, |one, other| {
            let bytes = of_quarters(quarter(one, start), quarter(other, start));
            _mm512_and_si512(_mm512_srlv_epi16(bytes, quarters), fifteen)
        }),
        Packing::NibblesAndBits => by_pairs::<F>(part, sums, |one, other| {
            let bytes = of_quarters(quarter(one, start), quarter(other, start));
            let codes = _mm512_and_si512(_mm512_srlv_epi16(bytes, quarters), fifteen);
            let bits = u64::from(word(one, bits)) | u64::from(word(other, bits)) << 32;
            _mm512_mask_add_epi8(codes, bits, codes, sixteen)
        }),
        Packing::Levels => {
            let levels = _mm512_broadcast_i32x4(quarter(F::LAYOUT.levels, 0));
            by_pairs::<F>(part, sums, |one, other| {
                let bytes = of_quarters(quarter(one, start), quarter(other, start));
                let codes = _mm512_and_si512(_mm512_srlv_epi16(bytes, quarters), fifteen);
                _mm512_shuffle_epi8(levels, codes)
            });
        }
        Packing::Bytes => {
            let flip = _mm512_set1_epi8(F::LAYOUT.flip as i8);
            by_pairs::<F>(part, sums, |one, other| {
                let codes = of_halves(half(one, start), half(other, start));
                _mm512_xor_si512(codes, flip)
            });
        }
        Packing::Q4K => by_eights::<F>(part, sums, |bytes, pair| {
            let bytes = half(bytes, start + pair * BLOCK);
            _mm512_and_si512(of_halves(bytes, _mm256_srli_epi16::<4>(bytes)), fifteen)
        }),
        Packing::Q5K => by_eights::<F>(part, sums, |bytes, pair| {
            let fifth =
                _mm512_test_epi8_mask(_mm512_broadcast_i64x4(half(bytes, bits)), bits_of(pair));
            let bytes = half(bytes, start + pair * BLOCK);
            let codes = _mm512_and_si512(of_halves(bytes, _mm256_srli_epi16::<4>(bytes)), fifteen);
            _mm512_mask_add_epi8(codes, fifth, codes, sixteen)
        }),
        Packing::Q6K => {
            let forty_eight = _mm512_set1_epi8(48);
            by_eights::<F>(part, sums, |bytes, pair| {
                let (of, upper) = (pair / 2, pair % 2 == 1);
                let lower = whole(bytes, start + of * 64);
                let both = half(bytes, bits + of * BLOCK);
                let (lower, both) = match upper {
                    false => (
                        lower,
                        of_halves(_mm256_slli_epi16::<4>(both), _mm256_slli_epi16::<2>(both)),
                    ),
                    true => (
                        _mm512_srli_epi16::<4>(lower),
                        of_halves(both, _mm256_srli_epi16::<2>(both)),
                    ),
                };
                let both = _mm512_and_si512(both, forty_eight);
                _mm512_or_si512(_mm512_and_si512(lower, fifteen), both)
            });
        }
        Packing::Q2K => {
            by_eights::<F>(part, sums, |bytes, pair| two_bits(bytes, start, pair));
        }
        Packing::Q3K => {
            let four = _mm512_set1_epi8(4);
            by_eights::<F>(part, sums, |bytes, pair| {
                let codes = two_bits(bytes, start, pair);
                let third =
                    _mm512_test_epi8_mask(_mm512_broadcast_i64x4(half(bytes, bits)), bits_of(pair));
                _mm512_mask_add_epi8(codes, third, codes, four)
            });
        }
        Packing::EightLevels => {
            let levels = _mm512_broadcast_i32x4(quarter(F::LAYOUT.levels, 0));
            by_eights::<F>(part, sums, |bytes, pair| {
                let at = start + pair * BLOCK;
                let bytes = of_quarters(quarter(bytes, at), quarter(bytes, at + BLOCK / 2));
                let codes = _mm512_and_si512(_mm512_srlv_epi16(bytes, quarters), fifteen);
                _mm512_shuffle_epi8(levels, codes)
            });
        }
    }
}

/// The codes of two blocks that have two bits each of 32 bytes, with two blocks more.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn two_bits(bytes: &[u8], start: usize, pair: usize) -> __m512i {
    let bytes = half(bytes, start + pair / 2 * BLOCK);
    let codes = match pair % 2 {
        0 => of_halves(bytes, _mm256_srli_epi16::<2>(bytes)),
        _ => of_halves(_mm256_srli_epi16::<4>(bytes), _mm256_srli_epi16::<6>(bytes)),
    };
    _mm512_and_si512(codes, _mm512_set1_epi8(3))
}

/// The bit of the first of two blocks in the one half, and that of the second in the other.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn bits_of(pair: usize) -> __m512i {
    let bit = 1 << (2 * pair);
    of_halves(_mm256_set1_epi8(bit), _mm256_set1_epi8(bit << 1))
}

/// Adds the products of formats with blocks of 32, two at once. `codes` reads the unsigned codes of two.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn by_pairs<F: Format>(part: Part, to: &mut Sums, codes: impl Fn(&[u8], &[u8]) -> __m512i) {
    let Part { bytes, x, factors } = part;
    let zero = _mm512_set1_epi8(F::LAYOUT.zero as i8);
    let mut sums = load(to);
    let (x, factors) = (x.as_chunks().0, factors.as_chunks().0);
    for ((bytes, x), factors) in bytes.chunks_exact(2 * F::LAYOUT.stride).zip(x).zip(factors) {
        ahead(bytes);
        let (one, other) = bytes.split_at(F::LAYOUT.stride);
        sums = added(sums, codes(one, other), zero, x, factors);
    }
    store(sums, to);
    // An odd block is left.
    portable::add::<F>(part, x.len() * 2, to);
}

/// The same of formats with eight blocks of 32 together. `codes` reads the codes of the pair with a number below 4.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn by_eights<F: Format>(part: Part, to: &mut Sums, codes: impl Fn(&[u8], usize) -> __m512i) {
    let Part { bytes, x, factors } = part;
    let zero = _mm512_set1_epi8(F::LAYOUT.zero as i8);
    let mut sums = load(to);
    let (x, factors) = (x.as_chunks::<8>().0, factors.as_chunks::<8>().0);
    for ((bytes, x), factors) in bytes.chunks_exact(F::LAYOUT.stride).zip(x).zip(factors) {
        let pairs = x.as_chunks().0.iter().zip(factors.as_chunks().0);
        for (pair, (x, factors)) in pairs.enumerate() {
            ahead(&bytes[pair * F::LAYOUT.stride / 4..]);
            sums = added(sums, codes(bytes, pair), zero, x, factors);
        }
    }
    store(sums, to);
}

/// Asks for bytes that are needed later.
#[inline]
#[target_feature(enable = "avx512f")]
fn ahead(bytes: &[u8]) {
    let address = bytes.as_ptr().wrapping_add(AHEAD).cast();
    #[allow(unused_unsafe, reason = "it is safe from some version of Rust on")]
    // SAFETY: nothing happens where there is no memory.
    unsafe {
        _mm_prefetch::<_MM_HINT_T0>(address);
    }
}

/// The products of two blocks, added to sums.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn added(
    sums: __m512,
    codes: __m512i,
    zero: __m512i,
    x: &[[i8; BLOCK]; 2],
    factors: &[[f32; 2]; 2],
) -> __m512 {
    let none = _mm512_setzero_si512();
    // SAFETY: there are 64 codes, and four factors.
    let (x, factors) =
        unsafe { (_mm512_loadu_epi8(x.as_ptr().cast()), _mm_loadu_ps(factors.as_ptr().cast())) };
    let products = _mm512_dpbusd_epi32(none, codes, x);
    let products = _mm512_sub_epi32(products, _mm512_dpbusd_epi32(none, zero, x));
    let four = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    let factors = _mm512_permutexvar_ps(four, _mm512_castps128_ps512(factors));
    // Not fused: plain Rust would take long to do the same.
    _mm512_add_ps(sums, _mm512_mul_ps(_mm512_cvtepi32_ps(products), factors))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(sums: &Sums) -> __m512 {
    // SAFETY: there are 16.
    unsafe { _mm512_loadu_ps(sums.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(sums: __m512, to: &mut Sums) {
    // SAFETY: there is room for 16.
    unsafe { _mm512_storeu_ps(to.as_mut_ptr(), sums) }
}

/// One in the first two quarters, and the other in the last two.
#[inline]
#[target_feature(enable = "avx512f")]
fn of_quarters(one: __m128i, other: __m128i) -> __m512i {
    of_halves(_mm256_broadcastsi128_si256(one), _mm256_broadcastsi128_si256(other))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn of_halves(one: __m256i, other: __m256i) -> __m512i {
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(one), other)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn whole(bytes: &[u8], start: usize) -> __m512i {
    let bytes: &[u8; 64] = bytes[start..].first_chunk().expect("the block is longer");
    // SAFETY: there are 64 bytes.
    unsafe { _mm512_loadu_epi8(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn half(bytes: &[u8], start: usize) -> __m256i {
    let bytes: &[u8; 32] = bytes[start..].first_chunk().expect("the block is longer");
    // SAFETY: there are 32 bytes.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn quarter(bytes: &[u8], start: usize) -> __m128i {
    let bytes: &[u8; 16] = bytes[start..].first_chunk().expect("the block is longer");
    // SAFETY: there are 16 bytes.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[inline]
fn word(bytes: &[u8], start: usize) -> u32 {
    u32::from_le_bytes(*bytes[start..].first_chunk().expect("the block is longer"))
}
