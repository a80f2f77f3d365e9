//! What trains in a model, to be read or printed.

use std::{collections::BTreeMap, fmt};

use burn::{module::Module, tensor::backend::Backend};

use crate::{
    layer::LoraLayer,
    table::{grouped, table},
    traverse::{self, Seen},
};

/// What trains in a model, and how much of it that is.
///
/// `total` counts the parameters of the plain model, which full fine-tuning would train; those of
/// adapters come on top, and disappear when the adapters are merged. Printed, it is a table of the
/// layers that can carry an adapter and of the other modules that train, and one line on the whole.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ParameterReport {
    /// How many parameters train: the adapters', and those that train in full.
    pub trainable: usize,
    /// How many parameters the model has without its adapters.
    pub total: usize,
    /// The layers that can carry an adapter, and other modules in which something trains, in the
    /// model's order.
    pub layers: Vec<LayerReport>,
}

/// What trains in one layer.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct LayerReport {
    /// The layer's path in the model; empty for the model itself.
    pub path: String,
    /// The weight seen as a matrix, `[d_input, d_output]`; none for a module that cannot carry an
    /// adapter.
    pub shape: Option<[usize; 2]>,
    /// The adapter's rank and its scale `s`, if the layer has one.
    pub adapter: Option<(usize, f64)>,
    /// How many parameters train: the adapter's, or those of the layer if it is not frozen.
    pub trainable: usize,
    /// How many parameters the layer has without its adapter.
    pub total: usize,
    /// The bytes of the weight if it is quantized, or else 0.
    pub quantized_bytes: usize,
}

/// What trains in the model, where `trains` says so for each parameter.
pub(super) fn of<B: Backend, M: Module<B>>(
    model: &M,
    trains: impl Fn(&Seen) -> bool,
) -> ParameterReport {
    let layers = traverse::layers(model, |path, layer: &dyn LoraLayer<B>| {
        let adapter = layer.adapter().map(|it| (it.rank(), it.scale()));
        let bytes = layer.quantized().map(|it| it.num_bytes());
        (path.to_owned(), layer.weight_shape(), adapter, bytes)
    });
    // Their weights are not among the parameters.
    let quantized = layers.iter().filter_map(|it| Some((it.0.clone(), it.1, it.3?)));
    let quantized: Vec<_> = quantized.collect();
    let layers: BTreeMap<_, _> =
        layers.into_iter().map(|(path, shape, adapter, _)| (path, (shape, adapter))).collect();
    // A parameter belongs to the layer whose adapter it is part of, or to the module that holds it.
    let owner = |param: &Seen| match (param.in_adapter, param.module.strip_suffix("adapter")) {
        (true, Some(layer)) => layer.strip_suffix('.').unwrap_or(layer).to_owned(),
        // A weight that is no layer's carries an adapter by its own name.
        _ if layers.contains_key(&param.path) => param.path.clone(),
        _ => param.module.clone(),
    };
    let mut rows: Vec<LayerReport> = Vec::new();
    let mut count = |path: String, trainable: usize, total: usize, bytes: usize| {
        let place = rows.iter().position(|row| row.path == path).unwrap_or_else(|| {
            let (shape, adapter) = layers.get(&path).copied().unzip();
            let adapter = adapter.flatten();
            let (trainable, total, quantized_bytes) = (0, 0, 0);
            rows.push(LayerReport { path, shape, adapter, trainable, total, quantized_bytes });
            rows.len() - 1
        });
        rows[place].trainable += trainable;
        rows[place].total += total;
        rows[place].quantized_bytes += bytes;
    };
    for param in traverse::params(model).iter().filter(|it| !it.is_statistic) {
        let size = param.num_elements;
        let trainable = if trains(param) { size } else { 0 };
        count(owner(param), trainable, if param.in_adapter { 0 } else { size }, 0);
    }
    for (path, shape, bytes) in quantized {
        count(path, 0, shape.iter().product(), bytes);
    }
    let (trainable, total) = (sum(&rows, |row| row.trainable), sum(&rows, |row| row.total));
    rows.retain(|row| row.shape.is_some() || row.trainable > 0);
    ParameterReport { trainable, total, layers: rows }
}

fn sum(rows: &[LayerReport], of: impl Fn(&LayerReport) -> usize) -> usize {
    rows.iter().map(of).sum()
}

impl ParameterReport {
    /// The trainable parameters in percent of the plain model's.
    pub fn percent(&self) -> f64 {
        percent(self.trainable, self.total)
    }
}

impl LayerReport {
    /// Whether the adapter has more parameters than the weight that it adapts. Training that weight in
    /// full would cost less; a lower rank is what was meant most likely.
    fn is_oversized(&self) -> bool {
        let weight = self.shape.map(|[d_input, d_output]| d_input * d_output);
        let adapter = self.adapter.zip(self.shape);
        let adapter = adapter.map(|((rank, _), [d_input, d_output])| rank * (d_input + d_output));
        adapter > weight
    }
}

fn percent(part: usize, whole: usize) -> f64 {
    if whole == 0 { 0.0 } else { 100.0 * part as f64 / whole as f64 }
}

impl fmt::Display for ParameterReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let row = |layer: &LayerReport| {
            let shape = layer.shape.map(|[d_input, d_output]| format!("{d_input}x{d_output}"));
            let (rank, scale) = match layer.adapter {
                Some((rank, scale)) => (rank.to_string(), format!("{scale:.4}")),
                None if layer.trainable > 0 => ("full".to_owned(), "-".to_owned()),
                None => ("-".to_owned(), "-".to_owned()),
            };
            [
                layer.path.clone(),
                shape.unwrap_or("-".to_owned()),
                rank,
                scale.trim_end_matches('0').trim_end_matches('.').to_owned(),
                grouped(layer.trainable),
                grouped(layer.total),
                format!("{:.2} %", percent(layer.trainable, layer.total)),
            ]
        };
        let headers = ["layer", "weight", "rank", "scale", "trainable", "total", "share"];
        let rows: Vec<_> = self.layers.iter().map(row).collect();
        writeln!(f, "{}", table(&headers, &rows))?;
        let oversized: Vec<_> = self.layers.iter().filter(|it| it.is_oversized()).collect();
        if let Some(first) = oversized.first() {
            let others = match oversized.len() - 1 {
                0 => String::new(),
                others => format!(" and of {others} others"),
            };
            writeln!(
                f,
                "warning: the adapter of `{}`{others} has more parameters than the weight; \
                 choose a lower rank",
                first.path,
            )?;
        }
        let (trainable, total) = (grouped(self.trainable), grouped(self.total));
        write!(f, "trainable {trainable} of {total} parameters ({:.2} %)", self.percent())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_a_table() {
        let layer = |path: &str, adapter, trainable| LayerReport {
            path: path.to_owned(),
            shape: Some([784, 512]),
            adapter,
            trainable,
            total: 401_920,
            quantized_bytes: 0,
        };
        let norm = LayerReport { shape: None, total: 1024, ..layer("norm", None, 1024) };
        let report = ParameterReport {
            trainable: 11_392,
            total: 1_004_800,
            layers: vec![layer("encoder.fc1", Some((8, 0.5)), 10_368), layer("fc2", None, 0), norm],
        };
        let expected = "\
layer         weight  rank  scale  trainable    total     share
---------------------------------------------------------------
encoder.fc1  784x512     8    0.5     10,368  401,920    2.58 %
fc2          784x512     -      -          0  401,920    0.00 %
norm               -  full      -      1,024    1,024  100.00 %
trainable 11,392 of 1,004,800 parameters (1.13 %)";
        assert_eq!(report.to_string(), expected);
    }

    #[test]
    fn warns_of_an_adapter_that_is_larger_than_its_weight() {
        let layer = LayerReport {
            path: "head".to_owned(),
            shape: Some([64, 4]),
            adapter: Some((4, 1.0)),
            trainable: 272,
            total: 256,
            quantized_bytes: 0,
        };
        let report = ParameterReport { trainable: 272, total: 256, layers: vec![layer] };
        let expected = "warning: the adapter of `head` has more parameters than the weight";
        assert!(report.to_string().contains(expected), "{report}");
    }
}
