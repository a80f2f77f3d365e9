//! Vectors in 8 bits.

use pulp::NullaryFnOnce;

use super::layout::BLOCK;

/// A vector in 8 bits, to multiply packed rows with: each 32 numbers share a scale, which is the largest magnitude
/// among them divided by 127, and are rounded to the nearest multiple of it. So each number is off by at most 1/254 of
/// the largest of its block.
///
/// A number that is not finite makes the scale of its block NaN, and so every product with the vector. A block without
/// any number as far from zero as 2⁻¹¹⁹ counts as zeros, since its scale would be subnormal.
#[derive(Clone, Debug, Default)]
pub struct Vector8 {
    len: usize,
    /// From -127 to 127. There are zeros up to whole blocks of every format.
    codes: Vec<[i8; BLOCK]>,
    scales: Vec<f32>,
    sums: Vec<[f32; 2]>,
}

/// The longest blocks of all formats have half as many blocks of 32. So many scales are read at once.
const WHOLE: usize = 16;

impl Vector8 {
    /// Rounds the numbers.
    pub fn new(numbers: &[f32]) -> Self {
        let mut vector = Self::default();
        vector.set(numbers);
        vector
    }

    /// Rounds other numbers, in the same memory if it is large enough.
    pub fn set(&mut self, numbers: &[f32]) {
        let Self { len, codes, scales, sums } = self;
        let blocks = numbers.len().div_ceil(BLOCK);
        let padded = blocks.next_multiple_of(WHOLE);
        *len = numbers.len();
        codes.resize(padded, [0; BLOCK]);
        scales.resize(padded, 0.0);
        sums.resize(padded, [0.0; 2]);
        codes[blocks..].fill([0; BLOCK]);
        scales[blocks..].fill(0.0);
        pulp::Arch::new().dispatch(Round { numbers, codes, scales, sums });
    }

    /// The number of numbers.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The codes of each 32 numbers, from -127 to 127. Those of a block whose scale is 0 or NaN mean nothing. The last blocks may be filled up with zeros, and there may be
    /// more blocks of zeros after them.
    pub fn codes(&self) -> &[[i8; BLOCK]] {
        &self.codes
    }

    /// The scale of each block: a number is its code times the scale.
    pub fn scales(&self) -> &[f32] {
        &self.scales
    }

    /// The sums of the numbers of both halves of each block, by which the smallest numbers of a block of weights are
    /// multiplied.
    pub(super) fn sums(&self) -> &[[f32; 2]] {
        &self.sums
    }
}

/// Rounds all blocks. It is a type, since a closure is not always compiled for the instructions that `pulp` finds.
struct Round<'a> {
    numbers: &'a [f32],
    codes: &'a mut [[i8; BLOCK]],
    scales: &'a mut [f32],
    sums: &'a mut [[f32; 2]],
}

impl NullaryFnOnce for Round<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { numbers, codes, scales, sums } = self;
        let (whole, rest) = numbers.as_chunks::<BLOCK>();
        for ((numbers, codes), scale) in whole.iter().zip(&mut *codes).zip(&mut *scales) {
            *scale = round(numbers, codes);
        }
        if !rest.is_empty() {
            let mut filled = [0.0; BLOCK];
            filled[..rest.len()].copy_from_slice(rest);
            scales[whole.len()] = round(&filled, &mut codes[whole.len()]);
        }
        for ((sums, codes), scale) in sums.iter_mut().zip(codes).zip(scales) {
            let halves = codes.as_chunks::<{ BLOCK / 2 }>().0;
            for (sum, codes) in sums.iter_mut().zip(halves) {
                *sum = codes.iter().map(|&it| i32::from(it)).sum::<i32>() as f32 * *scale;
            }
        }
    }
}

/// Rounds a block, and returns its scale.
#[inline(always)]
fn round(numbers: &[f32; BLOCK], codes: &mut [i8; BLOCK]) -> f32 {
    /// 2⁻¹¹⁹.
    const LEAST: f32 = f32::MIN_POSITIVE * 128.0;
    /// 1.5 · 2²³. Between 2²³ and 2²⁴ there are only whole numbers, so adding it rounds to one, ties to even, which is
    /// then in the lowest bits.
    const WHOLE: f32 = 12_582_912.0;

    // The bits of magnitudes have the order of magnitudes, with infinity and NaN above all others.
    let largest = numbers.iter().fold(0, |largest, it| (it.to_bits() & 0x7fff_ffff).max(largest));
    let largest = f32::from_bits(largest);
    if !largest.is_finite() {
        return f32::NAN;
    }
    if largest < LEAST {
        return 0.0;
    }
    let inverse = 127.0 / largest;
    // All are computed before any is written, which the compiler does with vectors.
    *codes = numbers.map(|it| (it * inverse + WHOLE).to_bits() as i8);
    largest / 127.0
}
