//! What trains in a model, to be read or printed.

use std::{collections::BTreeMap, fmt};

use burn::{
    module::{Module, Param},
    tensor::{DType, Tensor, backend::Backend},
};

use crate::{
    config::Scaling,
    layer::LoraLayer,
    precision::Precision,
    table::{grouped, table},
    traverse::{self, Place, Seen, Visit},
};

/// What trains in a model, and how much of it that is.
///
/// `total` counts the parameters of the plain model, which full fine-tuning would train; those of
/// adapters come on top, and disappear when the adapters are merged. Printed, it is a table of the layers that can carry
/// an adapter, by the names that [`LoraConfig::targets`](crate::LoraConfig::targets) takes, and one line on the whole.
/// Other modules that train have a table of their own. [Warnings](Self::warnings) come before the last line, which also
/// says how many layers multiply in bf16, if there are any.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ParameterReport {
    /// How many parameters train: the adapters', and those that train in full.
    pub trainable: usize,
    /// How many parameters the model has without its adapters.
    pub total: usize,
    /// The bytes in memory of the model without its adapters. Models that share weights share these bytes. The bytes of
    /// adapters are [`LoraAdapters::num_bytes`](crate::LoraAdapters::num_bytes).
    pub base_bytes: usize,
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
    /// The rule by which the adapter's alpha became its scale, if the layer has one.
    pub scaling: Option<Scaling>,
    /// How many parameters train: the adapter's, or those of the layer if it is not frozen.
    pub trainable: usize,
    /// How many parameters the layer has without its adapter.
    pub total: usize,
    /// The bytes of the weight if it is quantized, or else 0.
    pub quantized_bytes: usize,
    /// The precision in which the layer multiplies; [`Precision::F32`] for a module that cannot carry an adapter.
    pub precision: Precision,
    /// Whether PEFT's files, and so [`LoraAdapters::save`](crate::LoraAdapters::save), can hold an adapter of this layer.
    /// Records can in any case.
    pub in_peft_files: bool,
}

/// What trains in the model, where `trains` says so for each parameter.
pub(super) fn of<B: Backend, M: Module<B>>(
    model: &M,
    trains: impl Fn(&Seen) -> bool,
) -> ParameterReport {
    let layers = traverse::layers(model, |path, layer: &dyn LoraLayer<B>| {
        let kind = Kind {
            shape: layer.weight_shape(),
            adapter: layer.adapter().map(|it| (it.rank(), it.scale())),
            scaling: layer.adapter().map(|it| it.scaling),
            precision: layer.precision(),
            in_peft_files: layer.weight_layout().not_in_peft().is_none(),
        };
        (path.to_owned(), kind, layer.quantized().map(|it| it.num_bytes()))
    });
    // Their weights are not among the parameters.
    let quantized = layers.iter().filter_map(|it| Some((it.0.clone(), it.1.shape, it.2?)));
    let quantized: Vec<_> = quantized.collect();
    let layers: BTreeMap<_, _> = layers.into_iter().map(|(path, kind, _)| (path, kind)).collect();
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
            let kind = layers.get(&path);
            rows.push(LayerReport {
                shape: kind.map(|it| it.shape),
                adapter: kind.and_then(|it| it.adapter),
                scaling: kind.and_then(|it| it.scaling),
                trainable: 0,
                total: 0,
                quantized_bytes: 0,
                precision: kind.map_or(Precision::default(), |it| it.precision),
                in_peft_files: kind.is_none_or(|it| it.in_peft_files),
                path,
            });
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
    let mut base_bytes = BaseBytes(sum(&rows, |row| row.quantized_bytes));
    traverse::visit(model, &mut base_bytes);
    rows.retain(|row| row.shape.is_some() || row.trainable > 0);
    ParameterReport { trainable, total, base_bytes: base_bytes.0, layers: rows }
}

/// What a LoRA layer is, and what it carries.
struct Kind {
    shape: [usize; 2],
    adapter: Option<(usize, f64)>,
    scaling: Option<Scaling>,
    precision: Precision,
    in_peft_files: bool,
}

/// The bytes of all parameters but those of adapters.
struct BaseBytes(usize);

impl<B: Backend> Visit<B> for BaseBytes {
    fn param<const D: usize>(&mut self, place: &Place, param: &Param<Tensor<B, D>>) {
        if place.adapted_layer().is_none() {
            let bits = match param.dtype() {
                // Such numbers may be smaller than a byte.
                DType::QFloat(scheme) => scheme.size_bits_value(),
                dtype => 8 * dtype.size(),
            };
            self.0 += (param.shape().num_elements() * bits).div_ceil(8);
        }
    }
}

fn sum(rows: &[LayerReport], of: impl Fn(&LayerReport) -> usize) -> usize {
    rows.iter().map(of).sum()
}

impl ParameterReport {
    /// The trainable parameters in percent of the plain model's.
    pub fn percent(&self) -> f64 {
        percent(self.trainable, self.total)
    }

    /// How many layers multiply in bf16, and how many there are.
    fn bf16_layers(&self) -> (usize, usize) {
        let layers = || self.layers.iter().filter(|it| it.shape.is_some());
        (layers().filter(|it| it.precision == Precision::Bf16).count(), layers().count())
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

/// The greatest scale that is common. The paper and PEFT use 1 and 2.
const LARGE_SCALE: f64 = 4.0;

impl ParameterReport {
    /// What to look at before training: adapters that are larger than their weights, scales above 4, and adapters that
    /// PEFT's files cannot hold. If alpha itself is the scale, it is most likely one of PEFT's, which divides it by the
    /// rank.
    pub fn warnings(&self) -> Vec<String> {
        let of = |fits: &dyn Fn(&LayerReport) -> bool| {
            let mut layers = self.layers.iter().filter(|it| fits(it));
            let first = layers.next()?;
            let others = match layers.count() {
                0 => String::new(),
                1 => " and of another".to_owned(),
                others => format!(" and of {others} others"),
            };
            Some((first, format!("`{}`{others}", first.path)))
        };
        let oversized = of(&LayerReport::is_oversized).map(|(_, whose)| {
            format!(
                "the adapter of {whose} has more parameters than the weight; choose a lower rank"
            )
        });
        let scale = |layer: &LayerReport| layer.adapter.map_or(0.0, |(_, scale)| scale.abs());
        let steep = of(&|layer| scale(layer) > LARGE_SCALE).and_then(|(first, whose)| {
            let (rank, scale) = first.adapter?;
            let remedy = match first.scaling {
                Some(Scaling::Alpha) => format!(
                    "if that is an alpha of PEFT's, `LoraConfig::peft({rank}, {scale:?})` scales by {}",
                    number(scale / rank as f64)
                ),
                _ => "choose a smaller alpha".to_owned(),
            };
            Some(format!(
                "the scale of {whose} is {}, and training may diverge above {LARGE_SCALE}; {remedy}",
                number(scale),
            ))
        });
        let unsaved = of(&|layer| layer.adapter.is_some() && !layer.in_peft_files);
        let unsaved = unsaved.map(|(_, whose)| {
            format!(
                "PEFT's files cannot hold the adapter of {whose}; save the model by `save_file`, or leave out such \
                 layers by `excludes`"
            )
        });
        oversized.into_iter().chain(steep).chain(unsaved).collect()
    }
}

/// With at most four digits behind the point.
fn number(value: f64) -> String {
    format!("{value:.4}").trim_end_matches('0').trim_end_matches('.').to_owned()
}

impl fmt::Display for ParameterReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = |layer: &LayerReport| {
            let share = format!("{:.2} %", percent(layer.trainable, layer.total));
            [grouped(layer.trainable), grouped(layer.total), share]
        };
        let (layers, others): (Vec<_>, Vec<_>) =
            self.layers.iter().partition(|it| it.shape.is_some());
        if !layers.is_empty() || others.is_empty() {
            let row = |layer: &&LayerReport| {
                let shape = layer.shape.map(|[d_input, d_output]| format!("{d_input}x{d_output}"));
                let (rank, scale) = match layer.adapter {
                    Some((rank, scale)) => (rank.to_string(), number(scale)),
                    None if layer.trainable > 0 => ("full".to_owned(), "-".to_owned()),
                    None => ("-".to_owned(), "-".to_owned()),
                };
                let start = [layer.path.clone(), shape.unwrap_or_default(), rank, scale];
                [&start[..], &counts(layer)].concat()
            };
            let headers = ["layer", "weight", "rank", "scale", "trainable", "total", "share"];
            let rows: Vec<_> = layers.iter().map(row).collect();
            writeln!(f, "{}", table(&headers, &rows))?;
        }
        if !others.is_empty() {
            let row = |layer: &&LayerReport| [&[layer.path.clone()][..], &counts(layer)].concat();
            let headers = ["trains, is no target", "trainable", "total", "share"];
            let rows: Vec<_> = others.iter().map(row).collect();
            writeln!(f, "{}", table(&headers, &rows))?;
        }
        for warning in self.warnings() {
            writeln!(f, "warning: {warning}")?;
        }
        let (trainable, total) = (grouped(self.trainable), grouped(self.total));
        write!(f, "trainable {trainable} of {total} parameters ({:.2} %)", self.percent())?;
        match self.bf16_layers() {
            (0, _) => Ok(()),
            (all, layers) if all == layers => f.write_str(", products in bf16"),
            (some, layers) => write!(f, ", products of {some} of {layers} layers in bf16"),
        }
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
            scaling: None,
            trainable,
            total: 401_920,
            quantized_bytes: 0,
            precision: Precision::F32,
            in_peft_files: true,
        };
        let norm = LayerReport { shape: None, total: 1024, ..layer("norm", None, 1024) };
        let report = ParameterReport {
            trainable: 11_392,
            total: 1_004_800,
            base_bytes: 4_019_200,
            layers: vec![layer("encoder.fc1", Some((8, 0.5)), 10_368), layer("fc2", None, 0), norm],
        };
        let expected = "\
layer         weight  rank  scale  trainable    total   share
-------------------------------------------------------------
encoder.fc1  784x512     8    0.5     10,368  401,920  2.58 %
fc2          784x512     -      -          0  401,920  0.00 %
trains, is no target  trainable  total     share
------------------------------------------------
norm                      1,024  1,024  100.00 %
trainable 11,392 of 1,004,800 parameters (1.13 %)";
        assert_eq!(report.to_string(), expected);
    }

    #[test]
    fn says_which_products_are_in_bf16() {
        let last_line = |precisions: &[Precision]| {
            let layer = |&precision| LayerReport {
                path: "fc".to_owned(),
                shape: Some([64, 32]),
                adapter: Some((2, 1.0)),
                scaling: None,
                trainable: 192,
                total: 2048,
                quantized_bytes: 0,
                precision,
                in_peft_files: true,
            };
            // A norm multiplies no matrices.
            let norm = LayerReport { shape: None, adapter: None, ..layer(&Precision::F32) };
            let layers = precisions.iter().map(layer).chain([norm]).collect();
            let report = ParameterReport { trainable: 192, total: 2048, base_bytes: 0, layers };
            report.to_string().lines().last().unwrap_or_default().to_owned()
        };
        let usual = "trainable 192 of 2,048 parameters (9.38 %)";
        let (f32, bf16) = (Precision::F32, Precision::Bf16);
        assert_eq!(last_line(&[]), usual);
        assert_eq!(last_line(&[f32, f32]), usual);
        assert_eq!(last_line(&[bf16, bf16]), format!("{usual}, products in bf16"));
        let some = format!("{usual}, products of 1 of 3 layers in bf16");
        assert_eq!(last_line(&[f32, bf16, f32]), some);
    }

    #[test]
    fn warns_of_an_adapter_that_is_larger_than_its_weight() {
        let layer = LayerReport {
            path: "head".to_owned(),
            shape: Some([64, 4]),
            adapter: Some((4, 1.0)),
            scaling: Some(Scaling::Alpha),
            trainable: 272,
            total: 256,
            quantized_bytes: 0,
            precision: Precision::F32,
            in_peft_files: true,
        };
        let report =
            ParameterReport { trainable: 272, total: 256, base_bytes: 1024, layers: vec![layer] };
        let expected = "warning: the adapter of `head` has more parameters than the weight";
        assert!(report.to_string().contains(expected), "{report}");
    }

    #[test]
    fn s10_warns_of_a_scale_above_four() {
        let report = |scales: &[f64], scaling| {
            let layer = |(index, scale): (usize, &f64)| LayerReport {
                path: format!("fc{index}"),
                shape: Some([64, 64]),
                adapter: Some((8, *scale)),
                scaling: Some(scaling),
                trainable: 1024,
                total: 4096,
                quantized_bytes: 0,
                precision: Precision::F32,
                in_peft_files: true,
            };
            let layers = scales.iter().enumerate().map(layer).collect();
            ParameterReport { trainable: 1024, total: 4096, base_bytes: 0, layers }.to_string()
        };
        assert!(!report(&[4.0, -4.0, 0.5], Scaling::Alpha).contains("warning"));
        let expected = "warning: the scale of `fc1` and of 2 others is 16, and training may diverge above 4; if \
                        that is an alpha of PEFT's, `LoraConfig::peft(8, 16.0)` scales by 2\n";
        let found = report(&[4.0, 16.0, 16.0, -8.0], Scaling::Alpha);
        assert!(found.contains(expected), "{found}");
        // What PEFT would make of an alpha is the scale already.
        let expected =
            "the scale of `fc0` is 8, and training may diverge above 4; choose a smaller alpha\n";
        for scaling in [Scaling::AlphaOverRank, Scaling::AlphaOverSqrtRank] {
            let found = report(&[8.0], scaling);
            assert!(found.contains(expected), "{found}");
        }
    }
}
