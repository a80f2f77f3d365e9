//! Arithmetic on numbers next to each other, in the widest vectors that the processor has.

use half::f16;

use super::{
    quantized::of_half,
    simd::{exp_of_negative, largest, sum_of, sum_of_pairs, tanh, widest},
};

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

/// The numbers in half precision, with the lower byte first.
pub(crate) fn halves(numbers: &[f32]) -> Vec<[u8; 2]> {
    numbers.iter().map(|&it| f16::from_f32(it).to_le_bytes()).collect()
}

/// `a·b`, where a is in half precision and finite.
pub(crate) fn dot_of_halves(a: &[[u8; 2]], b: &[f32]) -> f32 {
    const LANES: usize = 32;

    widest(
        #[inline(always)]
        || {
            let ((a, a_end), (b, b_end)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
            let mut sums = [0.0; LANES];
            for (a, b) in a.iter().zip(b) {
                for lane in 0..LANES {
                    sums[lane] += of_half(a[lane]) * b[lane];
                }
            }
            let end: f32 = a_end.iter().zip(b_end).map(|(&a, b)| of_half(a) * b).sum();
            sum_of(&sums, |it| it) + end
        },
    )
}

/// Adds `factor·x` to y, where x is in half precision and finite.
pub(crate) fn add_scaled_halves(y: &mut [f32], factor: f32, x: &[[u8; 2]]) {
    widest(
        #[inline(always)]
        || {
            for (y, &x) in y.iter_mut().zip(x) {
                *y += factor * of_half(x);
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
