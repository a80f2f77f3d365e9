//! A figure over several seeds.

use std::fmt;

use serde::Serialize;

/// The mean of what was measured with several seeds, and the ends of its range.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    pub mean: f64,
    pub low: f64,
    pub high: f64,
}

impl Spread {
    /// # Panics
    ///
    /// If there are no values.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let values: Vec<_> = values.into_iter().collect();
        assert!(!values.is_empty(), "a spread has values");
        Self {
            mean: values.iter().sum::<f64>() / values.len() as f64,
            low: values.iter().copied().fold(f64::INFINITY, f64::min),
            high: values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        }
    }

    pub fn ends(self) -> (f64, f64) {
        (self.low, self.high)
    }
}

/// The mean, and the ends of the range behind it, with the same number of digits.
impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = f.precision().unwrap_or(2);
        let Self { mean, low, high } = self;
        write!(f, "{mean:.digits$} ({low:.digits$}-{high:.digits$})")
    }
}

#[cfg(test)]
mod tests {
    use super::Spread;

    #[test]
    fn a_spread_has_the_mean_and_the_ends() {
        let spread = Spread::of([3.0, 1.0, 5.0]);
        assert_eq!(spread, Spread { mean: 3.0, low: 1.0, high: 5.0 });
        assert_eq!(format!("{spread:.1}"), "3.0 (1.0-5.0)");
    }
}
