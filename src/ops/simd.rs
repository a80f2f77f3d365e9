//! Loops in the widest vectors that the processor has.
//!
//! The crate is compiled for any processor of its kind. [`widest`] chooses, at run time, among copies of a loop
//! that were compiled for wider vectors. What is called in it must be inlined to become part of the copies, and so must
//! the closure itself: the compiler may think it too long otherwise.

use pulp::Arch;

/// Calls a closure that is compiled for the widest vectors of this processor.
#[inline(always)]
pub(super) fn widest<R>(work: impl FnOnce() -> R) -> R {
    Arch::new().dispatch(work)
}

/// How many numbers are added next to each other. A loop that adds to one number cannot use vectors, because the
/// order of additions of floating-point numbers counts.
const LANES: usize = 32;

/// The sum of `term` of the numbers at each place of two slices of one length.
#[inline(always)]
pub(super) fn sum_of_pairs(a: &[f32], b: &[f32], term: impl Fn(f32, f32) -> f32) -> f32 {
    let ((a, a_end), (b, b_end)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sums = [0.0; LANES];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            sums[lane] += term(a[lane], b[lane]);
        }
    }
    let end: f32 = a_end.iter().zip(b_end).map(|(&a, &b)| term(a, b)).sum();
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
    }
    sums[0] + end
}

/// The sum of `term` of each number.
#[inline(always)]
pub(super) fn sum_of(a: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    sum_of_pairs(a, a, |a, _| term(a))
}

/// The largest number. Numbers that are not a number do not count.
#[inline(always)]
pub(super) fn largest(a: &[f32]) -> f32 {
    let (chunks, end) = a.as_chunks::<LANES>();
    let greater = |a: f32, b: f32| if b > a { b } else { a };
    let mut tops = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for lane in 0..LANES {
            tops[lane] = greater(tops[lane], chunk[lane]);
        }
    }
    tops.iter().chain(end).fold(f32::NEG_INFINITY, |top, &it| greater(top, it))
}

/// `exp(x)` for `x ≤ 0`, with 0 in the place of what is below `exp(-87)`, about the smallest normal number.
///
/// `x = k·ln 2 + r` with a whole number k and `|r| ≤ ln 2 / 2`, so `exp(x) = 2ᵏ·exp(r)`, and the Taylor
/// polynomial of degree 6 is exact enough for r.
#[inline(always)]
pub(super) fn exp_of_negative(x: f32) -> f32 {
    use std::f32::consts::{LN_2, LOG2_E};

    const LEAST: f32 = -87.0;
    /// Adding this number to a small one rounds that one to a whole number, in the lowest bits.
    const ROUND: f32 = 1.5 * (1 << 23) as f32;
    /// The upper bits of ln 2, whose product with k is exact, and what they leave out.
    const LN_2_UPPER: f32 = 0.693_359_4;
    const LN_2_LOWER: f32 = LN_2 - LN_2_UPPER;

    // Unlike `max`, this keeps what is not a number.
    let within = if x < LEAST { LEAST } else { x };
    let rounded = within * LOG2_E + ROUND;
    let k = rounded - ROUND;
    let r = within - k * LN_2_UPPER - k * LN_2_LOWER;
    let taylor = [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
    let polynomial = taylor.iter().fold(0.0, |sum, factor| sum * r + factor);
    // The exponent of a number in f32 lies above 23 bits, and is stored plus 127.
    let power = (rounded.to_bits() << 23).wrapping_add(127 << 23);
    if x < LEAST { 0.0 } else { polynomial * f32::from_bits(power) }
}

/// `1 / (1 + exp(-x))`.
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    let small = exp_of_negative(-x.abs());
    let large = 1.0 / (1.0 + small);
    if x < 0.0 { small * large } else { large }
}

/// The hyperbolic tangent, exact to about 1e-7.
#[inline(always)]
pub(super) fn tanh(x: f32) -> f32 {
    let small = exp_of_negative(-2.0 * x.abs());
    ((1.0 - small) / (1.0 + small)).copysign(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_are_those_of_the_standard_library() {
        for i in -2000..=2000 {
            let x = i as f32 / 100.0;
            let wide = f64::from(x);
            let near = |found: f32, expected: f64| {
                assert!((f64::from(found) - expected).abs() < 3e-7, "{x}: {found}, {expected}");
            };
            near(sigmoid(x), 1.0 / (1.0 + (-wide).exp()));
            near(tanh(x), wide.tanh());
            if x <= 0.0 {
                near(exp_of_negative(x), wide.exp());
            }
        }
    }

    #[test]
    fn what_is_tiny_is_zero_and_what_is_no_number_stays() {
        assert_eq!(exp_of_negative(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_of_negative(-88.0), 0.0);
        assert!(exp_of_negative(f32::NAN).is_nan() && sigmoid(f32::NAN).is_nan());
        assert!(tanh(f32::NAN).is_nan());
        assert_eq!((tanh(f32::INFINITY), sigmoid(f32::NEG_INFINITY)), (1.0, 0.0));
    }

    #[test]
    fn sums_and_the_largest_of_any_length() {
        for length in 0..100 {
            let a: Vec<f32> = (0..length).map(|i| ((i * 7) % 11) as f32).collect();
            let b: Vec<f32> = (0..length).map(|i| ((i * 5) % 13) as f32).collect();
            let sum: f32 = a.iter().zip(&b).map(|(a, b)| a * b).sum();
            assert_eq!(
                widest(
                    #[inline(always)]
                    || sum_of_pairs(&a, &b, |a, b| a * b)
                ),
                sum
            );
            assert_eq!(
                widest(
                    #[inline(always)]
                    || sum_of(&a, |a| a * a)
                ),
                a.iter().map(|a| a * a).sum::<f32>()
            );
            let top = a.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(
                widest(
                    #[inline(always)]
                    || largest(&a)
                ),
                top
            );
        }
    }
}
