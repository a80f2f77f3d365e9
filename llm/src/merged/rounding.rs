//! What rounding changes in weights, beside what adapters changed.

use std::collections::BTreeMap;

use burn::tensor::{Tensor, backend::Backend};

use crate::llama::Llama;

/// What rounding changed in a weight.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rounding {
    /// The norm of the rounded weight minus the weight.
    pub error: f64,
    /// The norm of the weight.
    pub norm: f64,
}

impl Rounding {
    /// Of numbers, and what they became.
    pub(super) fn of(numbers: impl Iterator<Item = (f32, f32)>) -> Self {
        let (mut errors, mut squares) = (0.0, 0.0);
        for (number, rounded) in numbers {
            let (number, rounded) = (f64::from(number), f64::from(rounded));
            errors += (rounded - number).powi(2);
            squares += number.powi(2);
        }
        Self { error: errors.sqrt(), norm: squares.sqrt() }
    }
}

/// The norm of what adapters changed in each weight, `merged` minus `base`, by the names of the weights that they
/// changed. Quantized weights are unpacked one at a time.
///
/// The two must be models with the same layers.
pub fn updates<B: Backend>(base: &Llama<B>, merged: &Llama<B>) -> BTreeMap<String, f64> {
    let norm = |difference: Tensor<B, 2>| {
        let numbers = difference.into_data();
        numbers.iter::<f64>().map(|it| it.powi(2)).sum::<f64>().sqrt()
    };
    let both = base.matrices().zip(merged.matrices());
    let updates =
        both.map(|((path, base), (_, merged))| (format!("{path}.weight"), norm(merged - base)));
    updates.filter(|(_, norm)| *norm > 0.0).collect()
}
