//! `adapter_model.safetensors`: the names and the layout of the tensors.
//!
//! PyTorch keeps a linear weight as `[d_output, d_input]`, and PEFT its factors accordingly:
//! A is `[rank, d_input]` and B is `[d_output, rank]`, the transposes of this crate's.

use std::{borrow::Cow, collections::BTreeMap, collections::HashMap, path::Path};

use burn::{
    module::Param,
    nn::Dropout,
    tensor::{DType, FloatDType, Tensor, TensorData, backend::Backend},
};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors, View, tensor::TensorView};

use super::{config::PeftConfig, json::check_object};
use crate::{LoraAdapter, LoraAdapters, LoraError, adapters::Extra, error::Mismatch};

const PREFIX: &str = "base_model.model.";
const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";
const B_BIAS: &str = ".lora_B.bias";

/// Parts of names by which adapters are known that are not supported.
const UNSUPPORTED: [(&str, &str); 4] = [
    (".lora_embedding_", ": adapters of embeddings cannot be read yet"),
    (".lora_magnitude_vector", ": DoRA cannot be read"),
    (".token_adapter.", ": trainable tokens cannot be read"),
    (".lora_ga_", ": LoRA-GA cannot be read"),
];

/// The tensors of one layer, as they come.
#[derive(Default)]
struct Parts<'a> {
    a: Option<TensorView<'a>>,
    b: Option<TensorView<'a>>,
    bias: Option<TensorView<'a>>,
}

pub(super) fn read<Bk: Backend>(
    config: PeftConfig,
    bytes: &[u8],
    file: &str,
    device: &Bk::Device,
) -> Result<LoraAdapters<Bk>, LoraError> {
    let invalid = |problem: String| LoraError::InvalidFile { file: file.to_owned(), problem };
    let unsupported = |field: String, reason: &str| LoraError::Unsupported {
        file: file.to_owned(),
        field,
        reason: reason.to_owned(),
    };
    let tensors = SafeTensors::deserialize(bytes).map_err(|error| invalid(error.to_string()))?;
    let header = &bytes[8..8 + header_length(bytes)];
    check_object(header).map_err(|error| invalid(format!("header: {error}")))?;

    let mut layers: BTreeMap<&str, Parts> = BTreeMap::new();
    let mut rest = Vec::new();
    let mut mismatch = Mismatch::default();
    for (key, view) in tensors.iter() {
        if let Some((_, reason)) = UNSUPPORTED.iter().find(|(part, _)| key.contains(part)) {
            return Err(unsupported(key.to_owned(), reason));
        }
        let Some(name) = key.strip_prefix(PREFIX) else {
            mismatch.unexpected.push(key.to_owned());
            continue;
        };
        if let Some(path) = name.strip_suffix(A) {
            layers.entry(path).or_default().a = Some(view);
        } else if let Some(path) = name.strip_suffix(B) {
            layers.entry(path).or_default().b = Some(view);
        } else if let Some(path) = name.strip_suffix(B_BIAS) {
            layers.entry(path).or_default().bias = Some(view);
        } else {
            rest.push((key, name, view));
        }
    }

    let mut extras = BTreeMap::new();
    for (key, name, view) in rest {
        // The base's parameters, seen from an adapted layer, are one level further down.
        let of_target =
            name.strip_suffix(".base_layer.bias").filter(|path| layers.contains_key(path));
        let name = match of_target {
            Some(path) => format!("{path}.bias"),
            None => name.to_owned(),
        };
        if config.saves(&name, of_target.is_some()) {
            let shape = view.shape().to_vec();
            let values = values(&view).map_err(|problem| invalid(format!("`{key}` {problem}")))?;
            let data = TensorData::new(values, [view.shape().iter().product::<usize>()]);
            extras.insert(name, Extra { values: Tensor::from_data(data, device), shape });
        } else {
            mismatch.unexpected.push(key.to_owned());
        }
    }

    let mut adapters = BTreeMap::new();
    for (path, parts) in &layers {
        let found = check(path, parts, &config, &mut mismatch);
        let Some((a, b)) = found else { continue };
        let [a, b] = [(a, A), (b, B)].map(|(view, suffix)| {
            let shape: [usize; 2] = view.shape().try_into().expect("the shape was checked");
            let values = values(view);
            let values =
                values.map_err(|problem| invalid(format!("`{PREFIX}{path}{suffix}` {problem}")))?;
            let tensor = Tensor::<Bk, 2>::from_data(TensorData::new(values, shape), device);
            Ok::<_, LoraError>(tensor.transpose())
        });
        let scaling = config.scaling();
        let mut adapter = LoraAdapter::new(a?, b?, config.alpha(path), scaling);
        adapter.dropout = Dropout { prob: config.lora_dropout };
        if let Some(view) = &parts.bias {
            let values = values(view);
            let values =
                values.map_err(|problem| invalid(format!("`{PREFIX}{path}{B_BIAS}` {problem}")))?;
            let data = TensorData::new(values, [view.shape()[0]]);
            adapter.bias = Some(Param::from_tensor(Tensor::from_data(data, device)));
        }
        adapters.insert((*path).to_owned(), adapter);
    }

    let targets = config.targets();
    mismatch.unmatched_targets =
        targets.as_ref().map_or(vec![], |it| it.unmatched(layers.keys().copied()));
    mismatch.into_result(file)?;
    if adapters.is_empty() {
        return Err(invalid("there is no adapter in it".to_owned()));
    }
    Ok(LoraAdapters {
        adapters,
        extras,
        modules_to_save: config.modules_to_save().to_vec(),
        targets,
        config: config.others,
    })
}

/// The length of the header, which `SafeTensors` has found to lie within the file.
fn header_length(bytes: &[u8]) -> usize {
    let length = bytes[..8].try_into().expect("eight bytes were asked for");
    u64::from_le_bytes(length) as usize
}

/// The layer's factors, if all its tensors are there and fit each other and the configuration.
fn check<'a, 'b>(
    path: &str,
    parts: &'b Parts<'a>,
    config: &PeftConfig,
    mismatch: &mut Mismatch,
) -> Option<(&'b TensorView<'a>, &'b TensorView<'a>)> {
    let key = |suffix| format!("{PREFIX}{path}{suffix}");
    let faults = |it: &Mismatch| (it.missing.len(), it.unexpected.len(), it.misshapen.len());
    let before = faults(mismatch);
    for (part, suffix) in [(&parts.a, A), (&parts.b, B)] {
        if part.is_none() {
            mismatch.missing.push(key(suffix));
        }
    }
    match &parts.bias {
        None if config.lora_bias => mismatch.missing.push(key(B_BIAS)),
        Some(_) if !config.lora_bias => mismatch.unexpected.push(key(B_BIAS)),
        _ => {}
    }
    let rank = config.rank(path);
    let mut expect =
        |view: &Option<TensorView>, suffix, expected: &str, fits: &dyn Fn(&[usize]) -> bool| {
            if let Some(view) = view
                && !fits(view.shape())
            {
                let found = view.shape();
                let text = format!("{} (expected {expected}, found {found:?})", key(suffix));
                mismatch.misshapen.push(text);
            }
        };
    let a_expected = format!("[{rank}, d_input]");
    expect(&parts.a, A, &a_expected, &|it| it.len() == 2 && it[0] == rank && it[1] > 0);
    let b_expected = format!("[d_output, {rank}]");
    expect(&parts.b, B, &b_expected, &|it| it.len() == 2 && it[1] == rank && it[0] > 0);
    let d_output = parts.b.as_ref().and_then(|b| b.shape().first().copied());
    expect(&parts.bias, B_BIAS, "[d_output]", &|it| {
        it.len() == 1 && d_output.is_none_or(|size| it[0] == size)
    });
    (faults(mismatch) == before).then_some(())?;
    Some((parts.a.as_ref()?, parts.b.as_ref()?))
}

/// The tensor's elements, all finite, in `f32`.
fn values(view: &TensorView) -> Result<Vec<f32>, String> {
    let bytes = view.data();
    let values: Vec<f32> = match view.dtype() {
        Dtype::F32 => chunks(bytes).map(f32::from_le_bytes).collect(),
        Dtype::F16 => chunks(bytes).map(|it| f16::from_le_bytes(it).to_f32()).collect(),
        Dtype::BF16 => chunks(bytes).map(|it| bf16::from_le_bytes(it).to_f32()).collect(),
        other => return Err(format!("is of type {other:?}; F32, F16 or BF16 is expected")),
    };
    if values.iter().all(|value| value.is_finite()) {
        Ok(values)
    } else {
        Err("holds NaN or infinite values".to_owned())
    }
}

fn chunks<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> {
    bytes.chunks_exact(N).map(|it| it.try_into().expect("chunks are of this size"))
}

/// A tensor on its way to the file.
struct Tensor32 {
    data: TensorData,
    shape: Vec<usize>,
}

impl View for &Tensor32 {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(self.data.as_bytes())
    }

    fn data_len(&self) -> usize {
        self.data.as_bytes().len()
    }
}

pub(super) fn write<Bk: Backend>(set: &LoraAdapters<Bk>, path: &Path) -> Result<(), LoraError> {
    let any_bias = set.adapters.values().any(|adapter| adapter.bias.is_some());
    let mut tensors = BTreeMap::new();
    for (path, adapter) in &set.adapters {
        let [_, d_output] = adapter.shape();
        tensors.insert(format!("{PREFIX}{path}{A}"), host(adapter.a.val().transpose()));
        tensors.insert(format!("{PREFIX}{path}{B}"), host(adapter.b.val().transpose()));
        if any_bias {
            // PEFT has biases everywhere or nowhere.
            let bias = match &adapter.bias {
                Some(bias) => bias.val(),
                None => Tensor::zeros([d_output], &adapter.a.device()),
            };
            tensors.insert(format!("{PREFIX}{path}{B_BIAS}"), host(bias));
        }
    }
    for (name, extra) in &set.extras {
        let of_target = name.strip_suffix(".bias").filter(|it| set.adapters.contains_key(*it));
        let key = match of_target {
            Some(path) => format!("{PREFIX}{path}.base_layer.bias"),
            None => format!("{PREFIX}{name}"),
        };
        let Tensor32 { data, .. } = host(extra.values.clone());
        tensors.insert(key, Tensor32 { data, shape: extra.shape.clone() });
    }
    for (key, tensor) in &tensors {
        if !tensor.data.iter::<f32>().all(f32::is_finite) {
            let file = path.display().to_string();
            let problem = format!("`{key}` holds NaN or infinite values; nothing was saved");
            return Err(LoraError::InvalidFile { file, problem });
        }
    }
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(&tensors, Some(metadata), path).map_err(|error| LoraError::Io {
        path: path.to_owned(),
        source: std::io::Error::other(error),
    })
}

fn host<Bk: Backend, const D: usize>(tensor: Tensor<Bk, D>) -> Tensor32 {
    let tensor = match tensor.dtype() {
        DType::F32 => tensor,
        _ => tensor.cast(FloatDType::F32),
    };
    Tensor32 { shape: tensor.dims().to_vec(), data: tensor.into_data() }
}
