//! Functions of numbers next to each other.

use super::share;
use crate::ops::{GeluTanh, Silu, gated, slices, turn};

/// The numbers that a thread takes at once.
const BLOCK: usize = 1 << 12;

/// The activation of a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// `x·sigmoid(x)`, as in [`swiglu`](crate::nn::swiglu).
    Silu,
    /// The approximation by a hyperbolic tangent, as in [`geglu`](crate::nn::geglu).
    GeluTanh,
}

/// Replaces each number of the gate by `activation(gate)·up`.
///
/// # Panics
///
/// If the slices differ in length.
pub fn gate(gate: &mut [f32], up: &[f32], activation: Gate) {
    assert!(gate.len() == up.len(), "{} gates for {} numbers", gate.len(), up.len());
    let gated = match activation {
        Gate::Silu => gated::<Silu>,
        Gate::GeluTanh => gated::<GeluTanh>,
    };
    let work = gate.len();
    let jobs = gate.chunks_mut(BLOCK).zip(up.chunks(BLOCK)).collect();
    share(jobs, work, |(gate, up)| gated(gate, up));
}

/// RMS norm ([Zhang and Sennrich 2019](https://arxiv.org/abs/1910.07467)): each row, as long as the weight, is divided by
/// the root of its mean square plus epsilon, and multiplied by the weight.
///
/// # Panics
///
/// If the slices differ in length, or have no whole rows.
pub fn norm(x: &[f32], weight: &[f32], epsilon: f32, y: &mut [f32]) {
    let width = weight.len();
    assert!(
        x.len() == y.len() && x.len().is_multiple_of(width),
        "rows of {width}: {} to {}",
        x.len(),
        y.len()
    );
    let row = |(x, y): (&[f32], &mut [f32])| {
        let variance = slices::sum_of_squares(x) / width as f32;
        let factor = 1.0 / (variance + epsilon).sqrt();
        slices::set_scaled(y, factor, x, weight);
    };
    let rows = BLOCK.div_ceil(width) * width;
    let (work, jobs) = (x.len(), x.chunks(rows).zip(y.chunks_mut(rows)).collect());
    share(jobs, work, |(x, y)| {
        x.chunks_exact(width).zip(y.chunks_exact_mut(width)).for_each(row);
    });
}

/// Turns pairs of each head, i and i + pairs, by an angle, whose cosines and sines these are. What comes after the pairs
/// stays. As [`rotate`](crate::nn::rotate) does.
///
/// # Panics
///
/// If there are no whole heads, or fewer numbers in a head than in the pairs.
pub fn rotate(heads: &mut [f32], size: usize, cos: &[f32], sin: &[f32]) {
    let pairs = cos.len();
    assert!(
        sin.len() == pairs && 2 * pairs <= size && heads.len().is_multiple_of(size),
        "heads of {size} numbers, of which {pairs} pairs turn, got {} numbers",
        heads.len(),
    );
    turn(heads, size, cos, sin, 1.0);
}

/// `y + factor·x`.
///
/// # Panics
///
/// If the slices differ in length.
pub fn add_scaled(y: &mut [f32], factor: f32, x: &[f32]) {
    assert!(y.len() == x.len(), "{} and {} numbers", y.len(), x.len());
    slices::add_scaled(y, factor, x);
}

/// Caps numbers: x becomes `cap·tanh(x/cap)`, as in [`soft_cap`](crate::nn::soft_cap).
pub fn cap(numbers: &mut [f32], cap: f32) {
    slices::cap(numbers, cap);
}

/// Replaces scores by what is proportional to their probabilities: x becomes `exp((x - top)/temperature)`, where `top` is
/// the largest of them. Returns the sum.
///
/// # Panics
///
/// If the temperature is not above 0.
pub fn weigh(scores: &mut [f32], temperature: f32) -> f32 {
    assert!(temperature > 0.0, "the temperature must be above 0, got {temperature}");
    slices::exponentials(scores, 1.0 / temperature)
}
