//! Groups of four products by `vpdpbusd`, of two blocks at once.

use std::arch::x86_64::*;

use super::{
    Vector8,
    layout::{BLOCK, Format, Packing},
    part::{AHEAD, Part, Sums},
    portable,
    split::HalvesRow,
};

/// Adds the products of some blocks.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn add<F: Format, const N: usize>(part: Part<N>, sums: &mut [Sums; N]) {
    match F::LAYOUT.blocks() {
        1 => by_pairs::<F, N>(part, sums),
        _ => by_eights::<F, N>(part, sums),
    }
}

/// The codes of two blocks of 32 with what belongs to them, in formats that have no longer blocks.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn pair_of<F: Format>(one: &[u8], other: &[u8]) -> __m512i {
    let start = F::LAYOUT.start;
    let nibbles = || of_nibbles(of_quarters(quarter(one, start), quarter(other, start)));
    match F::LAYOUT.packing {
        Packing::Nibbles => nibbles(),
        Packing::NibblesAndBits => {
            let (codes, bits) = (nibbles(), F::LAYOUT.bits);
            let bits = u64::from(word(one, bits)) | u64::from(word(other, bits)) << 32;
            _mm512_mask_add_epi8(codes, bits, codes, _mm512_set1_epi8(16))
        }
        Packing::Levels => {
            let levels = _mm512_broadcast_i32x4(quarter(F::LAYOUT.levels, 0));
            _mm512_shuffle_epi8(levels, nibbles())
        }
        Packing::Bytes => {
            let codes = of_halves(half(one, start), half(other, start));
            _mm512_xor_si512(codes, _mm512_set1_epi8(F::LAYOUT.flip as i8))
        }
        _ => unreachable!("blocks are longer"),
    }
}

/// The codes of the pair of blocks with a number below 4, of eight that lie together.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn pair_in<F: Format>(bytes: &[u8], pair: usize) -> __m512i {
    let (start, bits) = (F::LAYOUT.start, F::LAYOUT.bits);
    let fifteen = _mm512_set1_epi8(15);
    let four_bits = || {
        let bytes = half(bytes, start + pair * BLOCK);
        _mm512_and_si512(of_halves(bytes, _mm256_srli_epi16::<4>(bytes)), fifteen)
    };
    let bit = || _mm512_test_epi8_mask(_mm512_broadcast_i64x4(half(bytes, bits)), bits_of(pair));
    match F::LAYOUT.packing {
        Packing::Q4K => four_bits(),
        Packing::Q5K => {
            let codes = four_bits();
            _mm512_mask_add_epi8(codes, bit(), codes, _mm512_set1_epi8(16))
        }
        Packing::Q6K => {
            let (of, upper) = (pair / 2, pair % 2 == 1);
            let lower = whole(bytes, start + of * 64);
            let both = half(bytes, bits + of * BLOCK);
            let (lower, both) = match upper {
                false => {
                    (lower, of_halves(_mm256_slli_epi16::<4>(both), _mm256_slli_epi16::<2>(both)))
                }
                true => {
                    (_mm512_srli_epi16::<4>(lower), of_halves(both, _mm256_srli_epi16::<2>(both)))
                }
            };
            let both = _mm512_and_si512(both, _mm512_set1_epi8(48));
            _mm512_or_si512(_mm512_and_si512(lower, fifteen), both)
        }
        Packing::Q2K => two_bits(bytes, start, pair),
        Packing::Q3K => {
            let codes = two_bits(bytes, start, pair);
            _mm512_mask_add_epi8(codes, bit(), codes, _mm512_set1_epi8(4))
        }
        Packing::EightLevels => {
            let levels = _mm512_broadcast_i32x4(quarter(F::LAYOUT.levels, 0));
            let at = start + pair * BLOCK;
            let bytes = of_quarters(quarter(bytes, at), quarter(bytes, at + BLOCK / 2));
            _mm512_shuffle_epi8(levels, of_nibbles(bytes))
        }
        _ => unreachable!("blocks are shorter"),
    }
}

/// The lower halves of the first and third 16 bytes, and the upper halves of the others.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn of_nibbles(bytes: __m512i) -> __m512i {
    const UPPER: i64 = 0x4_0004_0004_0004;

    let shifts = _mm512_set_epi64(UPPER, UPPER, 0, 0, UPPER, UPPER, 0, 0);
    _mm512_and_si512(_mm512_srlv_epi16(bytes, shifts), _mm512_set1_epi8(15))
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

/// Adds the products of formats with blocks of 32, two at once.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn by_pairs<F: Format, const N: usize>(part: Part<N>, to: &mut [Sums; N]) {
    let mut sums = load(to);
    let (x, factors) = (part.x.map(|it| it.as_chunks().0), part.factors.map(|it| it.as_chunks().0));
    let pairs = part.blocks() / 2;
    for (pair, bytes) in part.bytes.chunks_exact(2 * F::LAYOUT.stride).take(pairs).enumerate() {
        ahead(bytes);
        let (one, other) = bytes.split_at(F::LAYOUT.stride);
        let codes = pair_of::<F>(one, other);
        for vector in 0..N {
            let factors = of_four(&factors[vector][pair]);
            sums[vector] = added::<F>(sums[vector], codes, &x[vector][pair], factors);
        }
    }
    store(&sums, to);
    // An odd block is left.
    portable::add::<F, N>(part, pairs * 2, to);
}

/// The same of formats with eight blocks of 32 together.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn by_eights<F: Format, const N: usize>(part: Part<N>, to: &mut [Sums; N]) {
    let mut sums = load(to);
    let (x, factors) = (part.x.map(|it| it.as_chunks().0), part.factors.map(|it| it.as_chunks().0));
    for (eight, bytes) in part.bytes.chunks_exact(F::LAYOUT.stride).enumerate() {
        for pair in 0..4 {
            ahead(&bytes[pair * F::LAYOUT.stride / 4..]);
            let codes = pair_in::<F>(bytes, pair);
            for vector in 0..N {
                let (x, factors) =
                    (&x[vector][eight * 4 + pair], &factors[vector][eight * 4 + pair]);
                sums[vector] = added::<F>(sums[vector], codes, x, of_four(factors));
            }
        }
    }
    store(&sums, to);
}

/// The products of a row of blocks of 32 with scales of 16 bits, which are read 16 at once.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn halves<F: Format, const N: usize>(row: HalvesRow, x: [&Vector8; N]) -> [f32; N] {
    let mut sums = [[_mm512_setzero_ps(); 2]; N];
    let groups = row.bytes.chunks(GROUP * F::LAYOUT.stride).zip(row.scales.chunks(GROUP));
    for (group, (bytes, scales)) in groups.enumerate() {
        let start = group * GROUP;
        let least = row.minima.map(|it| &it[start..start + scales.len()]);
        let part = HalvesRow { bytes, scales, minima: least };
        // The compiler checks no place in a whole group.
        match scales.len() == GROUP && bytes.len() == GROUP * F::LAYOUT.stride {
            true => add_group::<F, N, true>(part, x, start, &mut sums),
            false => add_group::<F, N, false>(part, x, start, &mut sums),
        }
    }
    sums.map(|[sums, minima]| total(sums) + total(minima))
}

/// Adds the products of a group of blocks, from a block of the vectors on, and apart from them what the smallest numbers
/// contribute.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn add_group<F: Format, const N: usize, const WHOLE: bool>(
    row: HalvesRow,
    x: [&Vector8; N],
    start: usize,
    to: &mut [[__m512; 2]; N],
) {
    let count = if WHOLE { GROUP } else { row.scales.len() };
    let bytes = &row.bytes[..count * F::LAYOUT.stride];
    let scales = widened(row.scales);
    let least = widened(row.minima.unwrap_or_default());
    let [lower, upper] =
        [&LOWER, &UPPER].map(|places| _mm512_permutexvar_ps(whole_of(places), least));
    let mut factors = [scales; N];
    let mut codes_of = [&[[0; BLOCK]; GROUP]; N];
    for vector in 0..N {
        let x = x[vector];
        codes_of[vector] = x.codes()[start..].first_chunk().expect("vectors are filled up");
        factors[vector] = _mm512_mul_ps(scales, sixteen(&x.scales()[start..]));
        if row.minima.is_some() {
            let of_halves: &[[f32; 2]; GROUP] =
                x.sums()[start..].first_chunk().expect("vectors are filled up");
            let (one, other) = of_halves.as_flattened().split_at(GROUP);
            let minima = &mut to[vector][1];
            *minima = _mm512_add_ps(*minima, _mm512_mul_ps(lower, sixteen(one)));
            *minima = _mm512_add_ps(*minima, _mm512_mul_ps(upper, sixteen(other)));
        }
    }
    for pair in 0..count.div_ceil(2) {
        let bytes = &bytes[2 * pair * F::LAYOUT.stride..];
        ahead(bytes);
        let (one, other) = bytes.split_at(F::LAYOUT.stride);
        // After an odd block there is none, and its scale is 0.
        let codes = pair_of::<F>(one, if !WHOLE && other.is_empty() { one } else { other });
        for vector in 0..N {
            let pairs = codes_of[vector].as_chunks::<2>().0;
            let factors = _mm512_permutexvar_ps(whole_of(&PAIRS[pair]), factors[vector]);
            let sums = &mut to[vector][0];
            *sums = added::<F>(*sums, codes, &pairs[pair], factors);
        }
    }
}

/// Scales that are read at once.
const GROUP: usize = 16;

/// For each pair of blocks of a group, the number of the first one eight times, and then that of the second.
const PAIRS: [[i32; 16]; GROUP / 2] = {
    let mut places = [[0; 16]; GROUP / 2];
    let mut place = 0;
    while place < 16 * GROUP / 2 {
        let pair = place / 16;
        places[pair][place % 16] = (2 * pair + place % 16 / 8) as i32;
        place += 1;
    }
    places
};

/// Each number of the lower half of a vector twice.
const LOWER: [i32; 16] = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7];

/// Each number of the upper half of a vector twice.
const UPPER: [i32; 16] = [8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15];

#[inline]
#[target_feature(enable = "avx512f")]
fn whole_of(places: &[i32; 16]) -> __m512i {
    // SAFETY: there are 16.
    unsafe { _mm512_loadu_epi32(places.as_ptr()) }
}

/// The first 16 numbers.
#[inline]
#[target_feature(enable = "avx512f")]
fn sixteen(numbers: &[f32]) -> __m512 {
    let numbers: &[f32; 16] = numbers.first_chunk().expect("vectors are filled up");
    // SAFETY: there are 16.
    unsafe { _mm512_loadu_ps(numbers.as_ptr()) }
}

/// The numbers in half precision, 16 at most, and zeros after them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn widened(halves: &[[u8; 2]]) -> __m512 {
    let mask = (1_u32 << halves.len()).wrapping_sub(1) as u16;
    // SAFETY: what is masked out is not read.
    let bits = unsafe { _mm256_maskz_loadu_epi16(mask, halves.as_ptr().cast()) };
    _mm512_cvtph_ps(bits)
}

/// The sum, of which one half is added to the other until one number is left.
#[inline]
#[target_feature(enable = "avx512f")]
fn total(sums: __m512) -> f32 {
    let bits = _mm512_castps_pd(sums);
    let (one, other) = (_mm512_castpd512_pd256(bits), _mm512_extractf64x4_pd::<1>(bits));
    let eight = _mm256_add_ps(_mm256_castpd_ps(one), _mm256_castpd_ps(other));
    let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
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

/// The products of two blocks times their factors, added to sums.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn added<F: Format>(sums: __m512, codes: __m512i, x: &[[i8; BLOCK]; 2], factors: __m512) -> __m512 {
    let none = _mm512_setzero_si512();
    // SAFETY: there are 64 codes.
    let x = unsafe { _mm512_loadu_epi8(x.as_ptr().cast()) };
    let mut products = _mm512_dpbusd_epi32(none, codes, x);
    if F::LAYOUT.zero != 0 {
        let zero = _mm512_set1_epi8(F::LAYOUT.zero as i8);
        products = _mm512_sub_epi32(products, _mm512_dpbusd_epi32(none, zero, x));
    }
    // Not fused: plain Rust would take long to do the same.
    _mm512_add_ps(sums, _mm512_mul_ps(_mm512_cvtepi32_ps(products), factors))
}

/// Each of four factors for four sums.
#[inline]
#[target_feature(enable = "avx512f")]
fn of_four(factors: &[[f32; 2]; 2]) -> __m512 {
    // SAFETY: there are four factors.
    let factors = unsafe { _mm_loadu_ps(factors.as_ptr().cast()) };
    let four = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    _mm512_permutexvar_ps(four, _mm512_castps128_ps512(factors))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load<const N: usize>(sums: &[Sums; N]) -> [__m512; N] {
    let mut loaded = [_mm512_setzero_ps(); N];
    for (loaded, sums) in loaded.iter_mut().zip(sums) {
        // SAFETY: there are 16.
        *loaded = unsafe { _mm512_loadu_ps(sums.as_ptr()) };
    }
    loaded
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store<const N: usize>(sums: &[__m512; N], to: &mut [Sums; N]) {
    for (sums, to) in sums.iter().zip(to) {
        // SAFETY: there is room for 16.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), *sums) }
    }
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
