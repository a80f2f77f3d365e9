//! How rotary embeddings turn.

mod rules;

use std::borrow::Cow;

pub(super) use rules::{Fields, Sizes};

/// How the pairs of elements of a head turn ([Su et al. 2021](https://arxiv.org/abs/2104.09864)).
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// The angles per position, in radians, in texts of the usual length: `[pairs]`. What comes after so many pairs of a
    /// head is not turned.
    pub frequencies: Vec<f64>,
    /// What cosines and sines are multiplied by, so that scores change by its square.
    pub amplitude: f64,
    /// Without a rule, pair i of n would turn by `theta^(-i / n)` per token.
    pub theta: f64,
    beyond: Option<Beyond>,
}

/// What becomes of texts that are longer than usual.
#[derive(Clone, Debug, PartialEq)]
enum Beyond {
    /// They have frequencies of their own.
    Long { length: usize, frequencies: Vec<f64> },
    /// All pairs turn slower, the longer the text is.
    Slower { length: usize, theta: f64, factor: f64 },
}

impl Rope {
    /// The angles per position in a text of this length.
    pub fn frequencies_at(&self, length: usize) -> Cow<'_, [f64]> {
        match &self.beyond {
            Some(Beyond::Long { length: usual, frequencies }) if length > *usual => {
                Cow::Borrowed(frequencies)
            }
            Some(Beyond::Slower { length: usual, theta, factor }) if length > *usual => {
                let pairs = self.frequencies.len();
                let grown = factor * length as f64 / *usual as f64 - (factor - 1.0);
                let theta = theta * grown.powf(pairs as f64 / (pairs as f64 - 1.0));
                Cow::Owned(plain(theta, pairs))
            }
            _ => Cow::Borrowed(&self.frequencies),
        }
    }

    /// The length up to which texts are usual, if longer ones are turned otherwise from their first token on.
    pub fn usual_length(&self) -> Option<usize> {
        match self.beyond {
            Some(Beyond::Long { length, .. }) => Some(length),
            _ => None,
        }
    }

    /// By how much each frequency is divided from what it would be without a rule.
    pub fn divisors(&self) -> Vec<f64> {
        let usual = plain(self.theta, self.frequencies.len());
        usual.into_iter().zip(&self.frequencies).map(|(usual, it)| usual / it).collect()
    }

    /// The same for longer texts, and the length up to which texts are usual, if they are turned otherwise from their
    /// first token on.
    pub fn long_divisors(&self) -> Option<(usize, Vec<f64>)> {
        let Some(Beyond::Long { length, frequencies }) = &self.beyond else { return None };
        let long = Self { frequencies: frequencies.clone(), ..self.clone() };
        Some((*length, long.divisors()))
    }

    /// Whether the length of a text decides how it is turned.
    pub fn depends_on_length(&self) -> bool {
        self.beyond.is_some()
    }

    /// The same with each frequency divided by a number.
    pub(super) fn divided(mut self, divisors: &[f64]) -> Self {
        self.frequencies.iter_mut().zip(divisors).for_each(|(it, divisor)| *it /= divisor);
        self
    }
}

/// Pair i of n turns by `theta^(-i / n)` per token.
fn plain(theta: f64, pairs: usize) -> Vec<f64> {
    (0..pairs).map(|i| theta.powf(-(i as f64) / pairs as f64)).collect()
}
