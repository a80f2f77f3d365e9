//! For processors that do not multiply bf16: both numbers of a pair are widened to `f32`, by a shift and a mask.

use pulp::{Simd, WithSimd};

use super::{Factors, SIDE, Tile};

#[cfg(target_arch = "x86_64")]
pub(super) fn by_avx512(factors: Factors, rows: usize, adds: bool, tile: &mut Tile) {
    let simd = pulp::x86::V4::try_new().expect("the instructions are there, or were not chosen");
    pulp::Simd::vectorize(simd, Widened::<8, 2> { factors, rows, adds, tile });
}

#[cfg(target_arch = "x86_64")]
pub(super) fn by_avx2(factors: Factors, rows: usize, adds: bool, tile: &mut Tile) {
    let simd = pulp::x86::V3::try_new().expect("the instructions are there, or were not chosen");
    pulp::Simd::vectorize(simd, Widened::<4, 2> { factors, rows, adds, tile });
}

#[cfg(target_arch = "aarch64")]
pub(super) fn by_neon(factors: Factors, rows: usize, adds: bool, tile: &mut Tile) {
    let simd =
        pulp::aarch64::Neon::try_new().expect("the instructions are there, or were not chosen");
    pulp::Simd::vectorize(simd, Widened::<8, 2> { factors, rows, adds, tile });
}

/// The work on so many rows and vectors at once, whose sums stay in registers.
struct Widened<'a, const ROWS: usize, const VECTORS: usize> {
    factors: Factors<'a>,
    rows: usize,
    adds: bool,
    tile: &'a mut Tile,
}

impl<const ROWS: usize, const VECTORS: usize> WithSimd for Widened<'_, ROWS, VECTORS> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { factors: Factors { left, stride, right }, rows, adds, tile } = self;
        let upper = simd.splat_u32s(0xffff_0000);
        let half = simd.splat_u32s(16);
        let vectors = SIDE / S::F32_LANES;
        for top in (0..rows).step_by(ROWS) {
            for from in (0..vectors).step_by(VECTORS) {
                let mut sums = [[simd.splat_f32s(0.0); VECTORS]; ROWS];
                if adds {
                    for (sums, numbers) in sums.iter_mut().zip(&tile.0[top..]) {
                        let (numbers, _) = S::as_simd_f32s(numbers);
                        sums.copy_from_slice(&numbers[from..from + VECTORS]);
                    }
                }
                let rows: [&[[u16; 2]]; ROWS] = std::array::from_fn(|row| {
                    &left[(top + row) * stride..].as_chunks::<2>().0[..right.len()]
                });
                for (pair, right) in right.iter().enumerate() {
                    let (words, _) = S::as_simd_u32s(&right.0);
                    let mut columns = [[simd.splat_f32s(0.0); 2]; VECTORS];
                    for vector in 0..VECTORS {
                        let words = words[from + vector];
                        let lower =
                            simd.transmute_f32s_u32s(simd.wrapping_dyn_shl_u32s(words, half));
                        let upper = simd.transmute_f32s_u32s(simd.and_u32s(words, upper));
                        columns[vector] = [lower, upper];
                    }
                    for row in 0..ROWS {
                        let [first, second] = rows[row][pair];
                        let first = simd.splat_f32s(crate::round::widened(first));
                        let second = simd.splat_f32s(crate::round::widened(second));
                        for vector in 0..VECTORS {
                            let [lower, upper] = columns[vector];
                            let sum = simd.mul_add_f32s(second, upper, sums[row][vector]);
                            sums[row][vector] = simd.mul_add_f32s(first, lower, sum);
                        }
                    }
                }
                for (sums, numbers) in sums.iter().zip(&mut tile.0[top..]) {
                    let (numbers, _) = S::as_mut_simd_f32s(numbers);
                    numbers[from..from + VECTORS].copy_from_slice(sums);
                }
            }
        }
    }
}
