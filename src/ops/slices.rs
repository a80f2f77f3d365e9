//! Arithmetic on numbers next to each other, in the widest vectors that the processor has.

use super::simd::{exp_of_negative, largest, sum_of, sum_of_pairs, tanh, widest};

/// `a·b`.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    widest(
        #[inline(always)]
        || sum_of_pairs(a, b, |a, b| a * b),
    )
}

/// The sum of the squares.
pub(crate) fn sum_of_squares(x: &[f32]) -> f32 {
    widest(
        #[inline(always)]
        || sum_of(x, |x| x * x),
    )
}

/// Adds `factor·x` to y.
pub(crate) fn add_scaled(y: &mut [f32], factor: f32, x: &[f32]) {
    widest(
        #[inline(always)]
        || {
            for (y, x) in y.iter_mut().zip(x) {
                *y += factor * x;
            }
        },
    );
}

/// Sets y to `factor·x·weight`.
pub(crate) fn set_scaled(y: &mut [f32], factor: f32, x: &[f32], weight: &[f32]) {
    widest(
        #[inline(always)]
        || {
            for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
                *y = x * factor * weight;
            }
        },
    );
}

/// Replaces each number x by `cap·tanh(x/cap)`.
pub(crate) fn cap(numbers: &mut [f32], cap: f32) {
    widest(
        #[inline(always)]
        || {
            for number in numbers {
                *number = cap * tanh(*number / cap);
            }
        },
    );
}

/// Replaces each number x by `exp((x - top)·factor)`, where `top` is the largest of them. Returns the sum.
pub(crate) fn exponentials(numbers: &mut [f32], factor: f32) -> f32 {
    widest(
        #[inline(always)]
        || {
            let top = largest(numbers);
            for number in &mut *numbers {
                *number = exp_of_negative((*number - top) * factor);
            }
            sum_of(numbers, |it| it)
        },
    )
}
