//! Models whose base is held in 4, 8 or 16 bits.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    fmt,
    rc::Rc,
};

use burn::{
    module::Module,
    tensor::{ElementConversion, Tensor, backend::Backend},
};

use crate::{
    config::Targets,
    error::{LoraError, Mismatch},
    layer::{LoraLayer, LoraLayerMut, is_quantized, quantized},
    pattern::Pattern,
    quantized::{Quantization, QuantizedWeight},
    table::{grouped, table},
    traverse,
};

/// Which weights of a model are quantized, and how.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct QuantizeConfig {
    /// What the weights are rounded to.
    pub quantization: Quantization,
    /// The layers, as in [`LoraConfig::targets`](crate::LoraConfig::targets). All that can be quantized, if
    /// there are no targets.
    pub targets: Vec<String>,
    /// The layers that are left as they are, even if a target matches them.
    pub excludes: Vec<String>,
}

impl From<Quantization> for QuantizeConfig {
    fn from(quantization: Quantization) -> Self {
        Self { quantization, targets: Vec::new(), excludes: Vec::new() }
    }
}

impl QuantizeConfig {
    /// The same for these layers.
    pub fn with_targets(mut self, targets: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.targets = targets.into_iter().map(Into::into).collect();
        self
    }

    /// The same without these layers.
    pub fn with_excludes(mut self, excludes: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.excludes = excludes.into_iter().map(Into::into).collect();
        self
    }
}

/// What quantizing a model changed. Printed, it is a table of the layers.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct QuantizationReport {
    /// The layers that were quantized, in the model's order.
    pub layers: Vec<QuantizedLayer>,
}

/// What quantizing a layer changed.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct QuantizedLayer {
    /// The layer's path in the model; empty for the model itself.
    pub path: String,
    /// The weight's shape, `[d_input, d_output]`.
    pub shape: [usize; 2],
    /// The bytes of the weight before.
    pub bytes_before: usize,
    /// The bytes of the weight now, with its scales.
    pub bytes: usize,
    /// The norm of what rounding changed in the weight, over the norm of the weight; 0 for a weight of
    /// zeros.
    pub error: f64,
}

/// What has to be known of a layer before its weight is quantized.
struct Candidate {
    path: String,
    takes: bool,
    is_quantized: bool,
}

/// The model with the chosen weights rounded, unless a layer is one of those that train in full.
pub(super) fn quantize<B: Backend, M: Module<B>>(
    model: M,
    config: &QuantizeConfig,
    trains: impl Fn(&str) -> bool,
) -> Result<(M, QuantizationReport), LoraError> {
    let chosen = choose::<B, M>(&model, config)?;
    if let Some(path) = chosen.iter().find(|path| trains(path)) {
        let (path, problem) = (path.clone(), "its weight trains in full".to_owned());
        return Err(LoraError::NotQuantizable { path, problem });
    }
    let to = config.quantization;
    let report = Rc::new(RefCell::new(Vec::new()));
    let problem = Rc::new(RefCell::new(None));
    let (reported, refused) = (report.clone(), problem.clone());
    let model =
        model.map(&mut traverse::changer(move |path: &str, layer: &mut dyn LoraLayerMut<B>| {
            if !chosen.contains(path) {
                return;
            }
            let weight = layer.weight_matrix();
            match round(weight, layer, to) {
                Ok((rounded, change)) => {
                    assert!(layer.set_quantized(rounded), "`{path}` takes a quantized weight");
                    reported.borrow_mut().push(QuantizedLayer { path: path.to_owned(), ..change });
                }
                Err(problem) => {
                    let path = path.to_owned();
                    refused.borrow_mut().get_or_insert(LoraError::NotQuantizable { path, problem });
                }
            }
        }));
    match problem.take() {
        Some(error) => Err(error),
        None => Ok((model, QuantizationReport { layers: report.take() })),
    }
}

/// The weight rounded, and what that changed.
fn round<B: Backend>(
    weight: Tensor<B, 2>,
    layer: &dyn LoraLayer<B>,
    to: Quantization,
) -> Result<(QuantizedWeight<B>, QuantizedLayer), String> {
    let shape = weight.dims();
    if shape.contains(&0) {
        return Err(format!("its weight is empty, {shape:?}"));
    }
    if is_quantized(weight.dtype()) {
        return Err("its weight is quantized by one of Burn's schemes: dequantize it".to_owned());
    }
    if !weight.clone().is_finite().all().into_scalar().elem::<bool>() {
        return Err("its weight has numbers that are not finite".to_owned());
    }
    let bytes_before = shape.iter().product::<usize>() * weight.dtype().size();
    let layout = layer.weight_layout();
    let rounded = quantized::rounded(weight.clone(), &layout, to);
    let change = QuantizedLayer {
        path: String::new(),
        shape,
        bytes_before,
        bytes: rounded.num_bytes(),
        error: distance(weight, quantized::matrix(&rounded, &layout)),
    };
    Ok((rounded, change))
}

/// The norm of the difference over the norm of `before`.
fn distance<B: Backend>(before: Tensor<B, 2>, after: Tensor<B, 2>) -> f64 {
    let before = before.cast(after.dtype());
    let square = |it: Tensor<B, 2>| it.powi_scalar(2).sum().into_scalar().elem::<f64>();
    let norm = square(before.clone());
    if norm == 0.0 { 0.0 } else { (square(after - before) / norm).sqrt() }
}

/// The paths of the layers that `config` means.
fn choose<B: Backend, M: Module<B>>(
    model: &M,
    config: &QuantizeConfig,
) -> Result<BTreeSet<String>, LoraError> {
    let layers = traverse::layers(model, |path, layer: &dyn LoraLayer<B>| Candidate {
        path: path.to_owned(),
        takes: layer.capabilities().quantized,
        is_quantized: layer.quantized().is_some(),
    });
    let paths: Vec<_> = layers.iter().filter(|it| it.takes).map(|it| it.path.clone()).collect();
    let targets = Targets::new(&config.targets, &config.excludes, &[])?;
    targets.require_matches(&paths)?;
    let chosen: BTreeSet<_> = targets.choose(&paths)?.into_iter().cloned().collect();
    match layers.iter().find(|it| it.is_quantized && chosen.contains(&it.path)) {
        Some(layer) => Err(LoraError::NotQuantizable {
            path: layer.path.clone(),
            problem: "its weight is quantized already".to_owned(),
        }),
        None => Ok(chosen),
    }
}

/// The model with all weights in full.
pub(super) fn dequantize<B: Backend, M: Module<B>>(model: M) -> M {
    model.map(&mut traverse::changer(|_: &str, layer: &mut dyn LoraLayerMut<B>| layer.dequantize()))
}

/// The model with these weights for its layers.
pub(super) fn with_weights<B: Backend, M: Module<B>>(
    model: M,
    weights: BTreeMap<String, QuantizedWeight<B>>,
) -> Result<M, LoraError> {
    let mismatch = Rc::new(RefCell::new(Mismatch::default()));
    let (found, weights) = (mismatch.clone(), Rc::new(RefCell::new(weights)));
    let left = weights.clone();
    let model =
        model.map(&mut traverse::changer(move |path: &str, layer: &mut dyn LoraLayerMut<B>| {
            let Some(weight) = weights.borrow_mut().remove(path) else { return };
            let mut mismatch = found.borrow_mut();
            if !layer.capabilities().quantized {
                mismatch.unexpected.push(path.to_owned());
                return;
            }
            let (expected, shape) =
                (layer.weight_shape(), quantized::shape(&weight, &layer.weight_layout()));
            match shape == expected {
                true => assert!(layer.set_quantized(weight), "`{path}` takes a quantized weight"),
                false => {
                    let problem = format!("{path} (expected {expected:?}, found {shape:?})");
                    mismatch.misshapen.push(problem);
                }
            }
        }));
    let mut mismatch = mismatch.take();
    mismatch.unexpected.extend(left.take().into_keys());
    mismatch.into_result("a quantized base")?;
    Ok(model)
}

/// The path of a quantized weight that a pattern means, of a layer that `is_adapted` does not accept.
pub(super) fn meant<B: Backend, M: Module<B>>(
    model: &M,
    patterns: &[Pattern],
    is_adapted: impl Fn(&str) -> bool,
) -> Option<String> {
    let layers = traverse::layers(model, |path, layer: &dyn LoraLayer<B>| {
        layer.quantized().is_some().then(|| path.to_owned())
    });
    let weights = layers.into_iter().flatten().filter(|path| !is_adapted(path)).map(weight_path);
    weights.into_iter().find(|weight| patterns.iter().any(|it| it.covers(weight)))
}

/// The path of a layer's weight.
pub(super) fn weight_path(layer: impl AsRef<str>) -> String {
    match layer.as_ref() {
        "" => "weight".to_owned(),
        path => format!("{path}.weight"),
    }
}

impl QuantizationReport {
    /// The bytes of all weights that were quantized, before.
    pub fn bytes_before(&self) -> usize {
        self.layers.iter().map(|it| it.bytes_before).sum()
    }

    /// The bytes of all weights that were quantized, now.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(|it| it.bytes).sum()
    }
}

impl fmt::Display for QuantizationReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let row = |layer: &QuantizedLayer| {
            let [d_input, d_output] = layer.shape;
            [
                layer.path.clone(),
                format!("{d_input}x{d_output}"),
                grouped(layer.bytes_before),
                grouped(layer.bytes),
                format!("{:.2} %", 100.0 * layer.error),
            ]
        };
        let headers = ["layer", "weight", "bytes before", "bytes", "error"];
        let rows: Vec<_> = self.layers.iter().map(row).collect();
        writeln!(f, "{}", table(&headers, &rows))?;
        let (before, now) = (self.bytes_before(), self.bytes());
        let share = now as f64 / before.max(1) as f64;
        write!(f, "{} of {} bytes ({share:.3})", grouped(now), grouped(before))
    }
}
