use std::fmt;

/// What trains in a model, and how much of it that is.
///
/// `total` counts the parameters of the plain model, which full fine-tuning would train; those of
/// adapters come on top, and disappear when the adapters are merged. Printed, it is a table of the
/// layers that can carry an adapter, and one line on the whole.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ParameterReport {
    /// How many parameters train: the adapters', and those not frozen.
    pub trainable: usize,
    /// How many parameters the model has without its adapters.
    pub total: usize,
    /// The layers that can carry an adapter, in the model's order.
    pub layers: Vec<LayerReport>,
}

/// What trains in one layer.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct LayerReport {
    /// The layer's path in the model; empty for the model itself.
    pub path: String,
    /// The weight seen as a matrix: `[d_input, d_output]`.
    pub shape: [usize; 2],
    /// The adapter's rank and its scale `s`, if the layer has one.
    pub adapter: Option<(usize, f64)>,
    /// How many parameters train: the adapter's, or those of the layer if it is not frozen.
    pub trainable: usize,
    /// How many parameters the layer has without its adapter.
    pub total: usize,
}

impl ParameterReport {
    /// The trainable parameters in percent of the plain model's.
    pub fn percent(&self) -> f64 {
        percent(self.trainable, self.total)
    }
}

fn percent(part: usize, whole: usize) -> f64 {
    if whole == 0 { 0.0 } else { 100.0 * part as f64 / whole as f64 }
}

impl fmt::Display for ParameterReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.layers.iter().map(|it| it.path.len()).max().unwrap_or(0).max(5);
        writeln!(
            f,
            "{:<width$}  {:>15}  {:>4}  {:>7}  {:>13}  {:>13}  {:>8}",
            "layer", "weight", "rank", "scale", "trainable", "total", "share"
        )?;
        for layer in &self.layers {
            let [d_input, d_output] = layer.shape;
            let (rank, scale) = match layer.adapter {
                Some((rank, scale)) => (rank.to_string(), format!("{scale:.4}")),
                None => ("-".to_owned(), "-".to_owned()),
            };
            writeln!(
                f,
                "{:<width$}  {:>15}  {:>4}  {:>7}  {:>13}  {:>13}  {:>6.2} %",
                layer.path,
                format!("{d_input}x{d_output}"),
                rank,
                scale.trim_end_matches('0').trim_end_matches('.'),
                grouped(layer.trainable),
                grouped(layer.total),
                percent(layer.trainable, layer.total),
            )?;
        }
        let (trainable, total) = (grouped(self.trainable), grouped(self.total));
        write!(f, "trainable {trainable} of {total} parameters ({:.2} %)", self.percent())
    }
}

/// The number with a comma between thousands.
fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_a_table() {
        let layer = |path: &str, adapter, trainable| LayerReport {
            path: path.to_owned(),
            shape: [784, 512],
            adapter,
            trainable,
            total: 401_920,
        };
        let report = ParameterReport {
            trainable: 10_368,
            total: 1_004_800,
            layers: vec![layer("encoder.fc1", Some((8, 0.5)), 10_368), layer("fc2", None, 0)],
        };
        let expected = "\
layer                 weight  rank    scale      trainable          total     share
encoder.fc1          784x512     8      0.5         10,368        401,920    2.58 %
fc2                  784x512     -        -              0        401,920    0.00 %
trainable 10,368 of 1,004,800 parameters (1.03 %)";
        assert_eq!(report.to_string(), expected);
    }

    #[test]
    fn groups_thousands() {
        assert_eq!([0, 999, 1_000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
    }
}
