//! `adapter_model.safetensors`: the names and the layout of the tensors.
//!
//! PyTorch stores a linear weight as `[d_output, d_input]`, and PEFT stores the factors accordingly:
//! A is `[rank, d_input]` and B is `[d_output, rank]`, the transposes of this crate's factors. For a
//! convolution, A is a kernel `[rank, channels_in, ..kernel]`, and B is a kernel of size 1,
//! `[channels_out, rank, 1, ..]`, with the elements in the same order. The factors of embeddings have
//! other names.

use std::{
    collections::{BTreeMap, HashMap},
    io::Read,
    path::Path,
};

use burn::{
    module::Param,
    nn::Dropout,
    tensor::{ElementConversion, Tensor, TensorData, backend::Backend},
};
use half::{bf16, f16};
use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};

use super::{
    config::PeftConfig,
    json::check_object,
    keys::{A, B, B_BIAS, EMBEDDING_A, EMBEDDING_B, Keys, MAGNITUDE, PREFIX, Role},
    outgoing::{Outgoing, all_finite, factor_shapes, magnitude_shape},
};
use crate::{
    adapter::{LoraAdapter, Tie, WeightLayout},
    adapters::{Extra, LoraAdapters},
    error::{LoraError, shown},
    tensors::frozen,
};

/// Reads the file of `length` bytes. The whole header is checked first. The tensors are then read one
/// after the other, each into its own buffer.
pub(super) fn read<Bk: Backend>(
    config: PeftConfig,
    mut source: impl Read,
    length: u64,
    file: &str,
    device: &Bk::Device,
) -> Result<LoraAdapters<Bk>, LoraError> {
    let invalid = |problem: String| LoraError::InvalidFile { file: file.to_owned(), problem };
    let header = read_header(&mut source, length).map_err(invalid)?;
    let names = header.offset_keys();
    let keys = Keys::read(&names, &header, &config, file)?;
    if keys.layers.is_empty() {
        return Err(invalid("there is no adapter in it".to_owned()));
    }

    let mut factors: BTreeMap<&str, [Option<Tensor<Bk, 2>>; 2]> = BTreeMap::new();
    let (mut biases, mut magnitudes) = (BTreeMap::new(), BTreeMap::new());
    let mut extras = BTreeMap::new();
    for (key, info, role) in &keys.roles {
        if let Role::Count = role {
            let (start, end) = info.data_offsets;
            let mut count = vec![0; end - start];
            source.read_exact(&mut count).map_err(|error| invalid(error.to_string()))?;
            continue;
        }
        let values = read_values(&mut source, info);
        let values = values.map_err(|problem| invalid(format!("`{}` {problem}", shown(key))))?;
        let flat = |values: Vec<f32>| {
            let shape = [values.len()];
            Tensor::<Bk, 1>::from_data(TensorData::new(values, shape), device)
        };
        let factor = |values: Vec<f32>| {
            let [rows, columns] = [info.shape[0], values.len() / info.shape[0]];
            // The elements themselves move: a product with a transposed view may add in another order than one
            // with a factor that was trained here, and so differ in the last bit.
            let values = transposed(&values, rows, columns);
            let data = TensorData::new(values, [columns, rows]);
            Some(Tensor::<Bk, 2>::from_data(data, device))
        };
        match role {
            Role::A(path) => factors.entry(path).or_default()[0] = factor(values),
            Role::B(path) => factors.entry(path).or_default()[1] = factor(values),
            Role::Bias(path) => drop(biases.insert(*path, flat(values))),
            Role::Magnitude(path) => drop(magnitudes.insert(*path, flat(values))),
            Role::Extra(name) => {
                let may_be_conv1d = config.fan_in_fan_out && info.shape.len() == 2;
                let shape = info.shape.clone();
                extras.insert(name.clone(), Extra { values: flat(values), shape, may_be_conv1d });
            }
            Role::Unused | Role::Count => {}
        }
    }
    let mut adapters = BTreeMap::new();
    for (path, factors) in factors {
        let [a, b] = factors.map(|factor| factor.expect("none is missing"));
        let mut adapter = LoraAdapter::new(a, b, config.alpha(path), config.scaling());
        adapter.layout = keys.layers[path].layout();
        adapter.dropout = Dropout { prob: config.lora_dropout };
        adapter.bias = biases.remove(path).map(Param::from_tensor);
        adapter.magnitude = magnitudes.remove(path).map(Param::from_tensor);
        adapters.insert(path.to_owned(), Box::new(adapter));
    }
    let not_meant = |path: &str| !config.targets.allow(path, true);
    if let Some(path) = tie(&mut adapters, config.ties_head, not_meant) {
        let problem = format!(
            "`{}` is not a target, and its factors are not those of the embedding that \
             `ensure_weight_tying` ties it to",
            shown(&path)
        );
        return Err(invalid(problem));
    }
    let Keys { modules_to_save, unused, .. } = keys;
    let (config, targets, names_in_file) = (config.others, Some(config.targets), Vec::new());
    Ok(LoraAdapters { adapters, extras, modules_to_save, targets, names_in_file, config, unused })
}

/// Notes what the adapters of embeddings, and of a head tied to one, do to the head. The result is a
/// layer that is `not_meant` by the configuration, and no tied head.
fn tie<Bk: Backend>(
    adapters: &mut BTreeMap<String, Box<LoraAdapter<Bk>>>,
    ties_head: bool,
    not_meant: impl Fn(&str) -> bool,
) -> Option<String> {
    let tables = adapters.values_mut().filter(|it| it.layout == WeightLayout::Embedding);
    let mut tables: Vec<_> = tables.collect();
    if !ties_head {
        tables.iter_mut().for_each(|table| table.tie = Tie::Leaves);
        return None;
    }
    let tables: Vec<_> = tables.into_iter().map(|table| table.clone()).collect();
    let equal = |one: &Param<Tensor<Bk, 2>>, other: &Param<Tensor<Bk, 2>>| -> bool {
        let (one, other) = (frozen(one), frozen(other).transpose());
        one.dims() == other.dims() && one.equal(other).all().into_scalar().elem()
    };
    for (path, head) in adapters.iter_mut() {
        let is_matrix = head.layout == WeightLayout::Matrix;
        if is_matrix && tables.iter().any(|it| equal(&head.a, &it.b) && equal(&head.b, &it.a)) {
            head.tie = Tie::Repeats;
        } else if is_matrix && not_meant(path) {
            return Some(path.clone());
        }
    }
    None
}

/// Reads the header and its length, and checks that the header describes all bytes that follow.
pub(super) fn read_header(source: &mut impl Read, length: u64) -> Result<Metadata, String> {
    let mut bytes = [0; 8];
    source.read_exact(&mut bytes).map_err(|error| format!("header: {error}"))?;
    let announced = u64::from_le_bytes(bytes);
    let rest = length.saturating_sub(8);
    if announced > rest {
        return Err(format!("the header should have {announced} bytes, but only {rest} follow"));
    }
    let mut header = vec![0; announced as usize];
    source.read_exact(&mut header).map_err(|error| format!("header: {error}"))?;
    check_object(&header).map_err(|error| format!("header: {error}"))?;
    let header: Metadata = serde_json::from_slice(&header)
        .map_err(|error| culprit(&header).unwrap_or_else(|| format!("header: {error}")))?;
    let (announced, rest) = (header.data_len() as u64, rest - announced);
    if announced != rest {
        return Err(format!("the tensors should have {announced} bytes, but {rest} follow"));
    }
    Ok(header)
}

/// The tensor for which the header is not accepted, and what is wrong with it.
fn culprit(header: &[u8]) -> Option<String> {
    let mut entries: BTreeMap<String, serde_json::Value> = serde_json::from_slice(header).ok()?;
    entries.remove("__metadata__");
    let mut tensors = Vec::new();
    for (key, entry) in entries {
        let problem = match serde_json::from_value::<TensorInfo>(entry) {
            Ok(info) => {
                tensors.push((info.data_offsets, key, info));
                continue;
            }
            Err(error) => error,
        };
        return Some(format!("`{}` is described wrongly in the header: {problem}", shown(&key)));
    }
    tensors.sort_by_key(|(offsets, ..)| *offsets);
    let mut expected = 0;
    for ((start, end), key, info) in tensors {
        let key = shown(&key);
        if start != expected || end < start {
            return Some(format!(
                "`{key}` is at bytes {start} to {end} by the header, and should begin at {expected}"
            ));
        }
        let sizes = info.shape.iter().copied();
        let count =
            sizes.map(Some).reduce(|one, other| one?.checked_mul(other?)).unwrap_or(Some(1));
        let bits = count.and_then(|count| count.checked_mul(info.dtype.bitsize()));
        if bits != (end - start).checked_mul(8) {
            return Some(format!(
                "`{key}` has {} bytes by the header, and its shape {:?} in {:?} needs another number",
                end - start,
                info.shape,
                info.dtype
            ));
        }
        expected = end;
    }
    None
}

/// Reads the next tensor's elements as `f32`. It is an error if one of them is not finite.
pub(super) fn read_values(source: &mut impl Read, info: &TensorInfo) -> Result<Vec<f32>, String> {
    let count = info.shape.iter().product();
    let mut halves = |convert: fn(u16) -> f32| {
        let mut halves = vec![0u16; count];
        source.read_exact(bytemuck::cast_slice_mut(&mut halves))?;
        Ok::<_, std::io::Error>(halves.into_iter().map(|it| convert(u16::from_le(it))).collect())
    };
    let values: std::io::Result<Vec<f32>> = match info.dtype {
        Dtype::F16 => halves(|bits| f16::from_bits(bits).to_f32()),
        Dtype::BF16 => halves(|bits| bf16::from_bits(bits).to_f32()),
        Dtype::F32 => {
            let mut values = vec![0u32; count];
            source.read_exact(bytemuck::cast_slice_mut(&mut values)).map(|()| {
                if cfg!(target_endian = "big") {
                    values.iter_mut().for_each(|it| *it = u32::from_le(*it));
                }
                bytemuck::cast_vec(values)
            })
        }
        Dtype::F64 => {
            let mut values = vec![0u64; count];
            source.read_exact(bytemuck::cast_slice_mut(&mut values)).map(|()| {
                let values = values.into_iter().map(|it| f64::from_bits(u64::from_le(it)) as f32);
                values.collect()
            })
        }
        other => return Err(format!("is of type {other:?}; F64, F32, F16 or BF16 is expected")),
    };
    let values = values.map_err(|error| error.to_string())?;
    if all_finite(&values) { Ok(values) } else { Err("holds NaN or infinite values".to_owned()) }
}

/// The transpose of a matrix of `rows` × `columns`.
pub(super) fn transposed(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut transposed = Vec::with_capacity(values.len());
    for column in 0..columns {
        transposed.extend((0..rows).map(|row| values[row * columns + column]));
    }
    transposed
}

/// Writes the file at `path`. Errors in what is to be saved call it `file`.
pub(super) fn write<Bk: Backend>(
    set: &LoraAdapters<Bk>,
    path: &Path,
    file: &Path,
) -> Result<(), LoraError> {
    outgoing(set).write(metadata(), path, file)
}

/// What the file would hold, which errors call `file`.
pub(super) fn to_bytes<Bk: Backend>(
    set: &LoraAdapters<Bk>,
    file: &Path,
) -> Result<Vec<u8>, LoraError> {
    outgoing(set).into_bytes(metadata(), file)
}

/// What else the header says.
fn metadata() -> HashMap<String, String> {
    HashMap::from([("format".to_owned(), "pt".to_owned())])
}

/// The tensors of the file.
fn outgoing<Bk: Backend>(set: &LoraAdapters<Bk>) -> Outgoing<Bk> {
    let any_bias = set.adapters.values().any(|adapter| adapter.bias.is_some());
    let mut tensors = Outgoing::new();
    for (path, adapter) in set.iter() {
        let (a_name, b_name) = match &adapter.layout {
            WeightLayout::Embedding => (EMBEDDING_A, EMBEDDING_B),
            _ => (A, B),
        };
        let key = |suffix: &str| format!("{PREFIX}{path}{suffix}");
        let [a_shape, b_shape] = factor_shapes(adapter);
        tensors.factor(key(a_name), adapter.a.val(), a_shape);
        tensors.factor(key(b_name), adapter.b.val(), b_shape);
        if let Some(magnitude) = &adapter.magnitude {
            tensors.flat(key(MAGNITUDE), magnitude.val(), magnitude_shape(adapter));
        }
        if any_bias {
            // In PEFT all adapters of a file have a bias, or none has one.
            let [_, d_output] = adapter.shape();
            let bias = match &adapter.bias {
                Some(bias) => bias.val(),
                None => Tensor::zeros([d_output], &adapter.a.device()),
            };
            tensors.flat(key(B_BIAS), bias, vec![d_output]);
        }
    }
    for (name, extra) in &set.extras {
        let (path, parameter) = name.rsplit_once('.').unwrap_or(("", name));
        let key = match set.adapters.contains_key(path) {
            true => format!("{PREFIX}{path}.base_layer.{parameter}"),
            false => format!("{PREFIX}{name}"),
        };
        tensors.flat(key, extra.values.clone(), extra.shape.clone());
    }
    tensors
}
