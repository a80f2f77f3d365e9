//! `adapter_model.safetensors`: the names and the layout of the tensors.
//!
//! PyTorch stores a linear weight as `[d_output, d_input]`, and PEFT stores the factors accordingly:
//! A is `[rank, d_input]` and B is `[d_output, rank]`, the transposes of this crate's factors. For a
//! convolution, A is a kernel `[rank, channels_in, ..kernel]`, and B is a kernel of size 1,
//! `[channels_out, rank, 1, ..]`, with the elements in the same order. The factors of embeddings have
//! other names.

use std::{
    borrow::Cow,
    cell::Cell,
    collections::{BTreeMap, BTreeSet, HashMap},
    io::Read,
    path::Path,
};

use burn::{
    module::Param,
    nn::Dropout,
    tensor::{Tensor, TensorData, backend::Backend},
};
use half::{bf16, f16};
use safetensors::{
    Dtype, View,
    tensor::{Metadata, TensorInfo},
};

use super::{config::PeftConfig, json::check_object};
use crate::{
    adapter::{LoraAdapter, WeightLayout},
    adapters::{Extra, LoraAdapters},
    error::{LoraError, Mismatch},
};

const PREFIX: &str = "base_model.model.";
const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";
const B_BIAS: &str = ".lora_B.bias";
const EMBEDDING_A: &str = ".lora_embedding_A";
const EMBEDDING_B: &str = ".lora_embedding_B";

/// Parts of tensor names by which unsupported adapters are recognised, and the reasons to report.
const UNSUPPORTED: [(&str, &str); 3] = [
    (".lora_magnitude_vector", ": DoRA cannot be read"),
    (".token_adapter.", ": trainable tokens cannot be read"),
    (".lora_ga_", ": LoRA-GA cannot be read"),
];

/// The header's entries for the tensors of one layer.
#[derive(Default)]
struct Parts<'a> {
    a: Option<&'a TensorInfo>,
    b: Option<&'a TensorInfo>,
    bias: Option<&'a TensorInfo>,
    embedding_a: Option<&'a TensorInfo>,
    embedding_b: Option<&'a TensorInfo>,
}

impl Parts<'_> {
    fn is_embedding(&self) -> bool {
        self.embedding_a.is_some() || self.embedding_b.is_some()
    }

    /// How the layer stores its weight. [`check`] checks the shapes of A and B.
    fn layout(&self) -> WeightLayout {
        match self.a {
            Some(a) if a.shape.len() > 2 => {
                WeightLayout::Conv { kernel: a.shape[2..].to_vec(), groups: 1 }
            }
            None if self.is_embedding() => WeightLayout::Embedding,
            _ => WeightLayout::Matrix,
        }
    }
}

/// The meaning of a tensor, by its key.
enum Role<'a> {
    A(&'a str),
    B(&'a str),
    Bias(&'a str),
    /// A parameter that was trained in full, with its name in the model.
    Extra(String),
}

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
    let keys = header.offset_keys();
    let tensors = keys.iter().map(|key| (key.as_str(), header.info(key).expect("it has its keys")));

    let mut layers: BTreeMap<&str, Parts> = BTreeMap::new();
    let mut roles = Vec::new();
    let mut mismatch = Mismatch::default();
    for (key, info) in tensors {
        if let Some((_, reason)) = UNSUPPORTED.iter().find(|(part, _)| key.contains(part)) {
            let (file, field, reason) = (file.to_owned(), key.to_owned(), (*reason).to_owned());
            return Err(LoraError::Unsupported { file, field, reason });
        }
        let Some(name) = key.strip_prefix(PREFIX) else {
            mismatch.unexpected.push(key.to_owned());
            continue;
        };
        let role = if let Some(path) = name.strip_suffix(A) {
            layers.entry(path).or_default().a = Some(info);
            Role::A(path)
        } else if let Some(path) = name.strip_suffix(B) {
            layers.entry(path).or_default().b = Some(info);
            Role::B(path)
        } else if let Some(path) = name.strip_suffix(B_BIAS) {
            layers.entry(path).or_default().bias = Some(info);
            Role::Bias(path)
        } else if let Some(path) = name.strip_suffix(EMBEDDING_A) {
            layers.entry(path).or_default().embedding_a = Some(info);
            Role::A(path)
        } else if let Some(path) = name.strip_suffix(EMBEDDING_B) {
            layers.entry(path).or_default().embedding_b = Some(info);
            Role::B(path)
        } else {
            Role::Extra(name.to_owned())
        };
        roles.push((key, info, role));
    }
    let mut names = BTreeSet::new();
    for (key, _, role) in &mut roles {
        let Role::Extra(name) = role else { continue };
        // PEFT names the parameters of an adapted layer's base `base_layer.*`.
        let target = name.strip_suffix(".base_layer.bias").filter(|path| layers.contains_key(path));
        // PEFT also saves the table of an adapted embedding.
        let table = name.strip_suffix(".base_layer.weight");
        let table = table.filter(|path| layers.get(path).is_some_and(Parts::is_embedding));
        let (of_target, is_table) = (target.is_some(), table.is_some());
        if let Some(path) = target {
            *name = format!("{path}.bias");
        } else if let Some(path) = table {
            *name = format!("{path}.weight");
        }
        let saved = is_table || config.saves(name, of_target);
        if !saved || !names.insert(name.clone()) {
            mismatch.unexpected.push((*key).to_owned());
        }
    }
    let targets = config.targets();
    for (path, parts) in &layers {
        if is_grouped(parts, config.rank(path)) {
            let (file, field) = (file.to_owned(), format!("{PREFIX}{path}{B}"));
            let reason = ": its convolution has groups, and PEFT's adapter mixes channels of different \
                          groups, which no update of the kernel can do";
            return Err(LoraError::Unsupported { file, field, reason: reason.to_owned() });
        }
        check(path, parts, &config, &mut mismatch);
        // PEFT would not put an adapter on this layer.
        if targets.as_ref().is_some_and(|targets| !targets.matches(path)) {
            mismatch.unexpected.push(format!("{PREFIX}{path} (not a target)"));
        }
    }
    mismatch.unmatched_targets =
        targets.as_ref().map_or(vec![], |it| it.unmatched(layers.keys().copied()));
    mismatch.into_result(file)?;
    if layers.is_empty() {
        return Err(invalid("there is no adapter in it".to_owned()));
    }

    let mut factors: BTreeMap<&str, [Option<Tensor<Bk, 2>>; 2]> = BTreeMap::new();
    let mut biases = BTreeMap::new();
    let mut extras = BTreeMap::new();
    for (key, info, role) in roles {
        let values = read_values(&mut source, info);
        let values = values.map_err(|problem| invalid(format!("`{key}` {problem}")))?;
        let flat = |values: Vec<f32>| {
            let shape = [values.len()];
            Tensor::<Bk, 1>::from_data(TensorData::new(values, shape), device)
        };
        let factor = |values: Vec<f32>| {
            let shape = [info.shape[0], values.len() / info.shape[0]];
            // This transposes a view; no element moves.
            Some(Tensor::<Bk, 2>::from_data(TensorData::new(values, shape), device).transpose())
        };
        match role {
            Role::A(path) => factors.entry(path).or_default()[0] = factor(values),
            Role::B(path) => factors.entry(path).or_default()[1] = factor(values),
            Role::Bias(path) => drop(biases.insert(path, flat(values))),
            Role::Extra(name) => {
                let extra = Extra { values: flat(values), shape: info.shape.clone() };
                extras.insert(name, extra);
            }
        }
    }
    let mut adapters = BTreeMap::new();
    for (path, factors) in factors {
        let [a, b] = factors.map(|factor| factor.expect("none is missing"));
        let mut adapter = LoraAdapter::new(a, b, config.alpha(path), config.scaling());
        adapter.layout = layers[path].layout();
        adapter.dropout = Dropout { prob: config.lora_dropout };
        adapter.bias = biases.remove(path).map(Param::from_tensor);
        adapters.insert(path.to_owned(), Box::new(adapter));
    }
    let modules_to_save = config.modules_to_save().to_vec();
    let (config, names_in_file) = (config.others, Vec::new());
    Ok(LoraAdapters { adapters, extras, modules_to_save, targets, names_in_file, config })
}

/// Reads the header and its length, and checks that the header describes all bytes that follow.
fn read_header(source: &mut impl Read, length: u64) -> Result<Metadata, String> {
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
    let header: Metadata =
        serde_json::from_slice(&header).map_err(|error| format!("header: {error}"))?;
    let (announced, rest) = (header.data_len() as u64, rest - announced);
    if announced != rest {
        return Err(format!("the tensors should have {announced} bytes, but {rest} follow"));
    }
    Ok(header)
}

/// Whether the layer is a convolution with groups. PEFT's B then has fewer columns than the rank.
fn is_grouped(parts: &Parts, rank: usize) -> bool {
    let columns = parts.b.filter(|b| b.shape.len() > 2).map(|b| b.shape[1]);
    columns.is_some_and(|columns| columns > 0 && columns < rank && rank.is_multiple_of(columns))
}

/// Adds to `mismatch` what is wrong with the tensors of a layer.
fn check(path: &str, parts: &Parts, config: &PeftConfig, mismatch: &mut Mismatch) {
    let key = |suffix: &str| format!("{PREFIX}{path}{suffix}");
    let rank = config.rank(path);
    let kernel = parts.a.map_or(&[][..], |a| a.shape.get(2..).unwrap_or_default());
    let (mut factors, mut others) = (
        vec![(parts.a, A), (parts.b, B)],
        vec![(parts.embedding_a, EMBEDDING_A), (parts.embedding_b, EMBEDDING_B)],
    );
    if parts.a.is_none() && parts.b.is_none() && parts.is_embedding() {
        std::mem::swap(&mut factors, &mut others);
    }
    let missing = factors.iter().filter(|(part, _)| part.is_none());
    mismatch.missing.extend(missing.map(|(_, suffix)| key(suffix)));
    let unexpected = others.iter().filter(|(part, _)| part.is_some());
    mismatch.unexpected.extend(unexpected.map(|(_, suffix)| key(suffix)));
    match parts.bias {
        None if config.lora_bias && !parts.is_embedding() => mismatch.missing.push(key(B_BIAS)),
        Some(_) if !config.lora_bias || parts.is_embedding() => {
            mismatch.unexpected.push(key(B_BIAS));
        }
        _ => {}
    }
    let [a, b] = [factors[0], factors[1]];
    let d_output = b.0.and_then(|b| b.shape.first().copied());
    let ones = vec![1; kernel.len()];
    let a_fits = |shape: &[usize]| {
        shape.len() >= 2 && shape[0] == rank && shape.iter().product::<usize>() > 0
    };
    let b_fits = |shape: &[usize]| {
        shape.len() >= 2 && shape[0] > 0 && shape[1] == rank && shape[2..] == ones
    };
    let bias_fits = |shape: &[usize]| shape.len() == 1 && d_output.is_none_or(|it| it == shape[0]);
    let mut expect =
        |(part, suffix): (Option<&TensorInfo>, &str), fits: &dyn Fn(&[usize]) -> bool, expected| {
            if let Some(info) = part
                && !fits(&info.shape)
            {
                let text = format!("{} (expected {expected}, found {:?})", key(suffix), info.shape);
                mismatch.misshapen.push(text);
            }
        };
    let (more_a, more_b) = if kernel.is_empty() { ("", "") } else { (", ..kernel", ", 1, ..") };
    expect(a, &a_fits, format!("[{rank}, d_input{more_a}]"));
    expect(b, &b_fits, format!("[d_output, {rank}{more_b}]"));
    expect((parts.bias, B_BIAS), &bias_fits, "[d_output]".to_owned());
}

/// Reads the next tensor's elements as `f32`. It is an error if one of them is not finite.
fn read_values(source: &mut impl Read, info: &TensorInfo) -> Result<Vec<f32>, String> {
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
        other => return Err(format!("is of type {other:?}; F32, F16 or BF16 is expected")),
    };
    let values = values.map_err(|error| error.to_string())?;
    if all_finite(&values) { Ok(values) } else { Err("holds NaN or infinite values".to_owned()) }
}

/// Whether all values are finite. A branch per element would take as long as reading the values.
fn all_finite(values: &[f32]) -> bool {
    values.chunks(4096).all(|chunk| chunk.iter().fold(true, |all, it| all & it.is_finite()))
}

/// A tensor to be written to the file. Its elements are copied to the host only when they are written,
/// so that the host does not hold all tensors at once.
struct Outgoing<'a, Bk: Backend> {
    values: Values<Bk>,
    /// The shape in the file.
    shape: Vec<usize>,
    /// Whether an element of any tensor was not finite.
    not_finite: &'a Cell<bool>,
}

enum Values<Bk: Backend> {
    /// A factor. The file holds its transpose.
    Factor(Tensor<Bk, 2>),
    Flat(Tensor<Bk, 1>),
}

impl<Bk: Backend> View for Outgoing<'_, Bk> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let values = match &self.values {
            Values::Factor(tensor) => host(tensor.clone()),
            Values::Flat(tensor) => host(tensor.clone()),
        };
        if !all_finite(&values) {
            self.not_finite.set(true);
        }
        let mut bytes = vec![0; 4 * values.len()];
        let (slots, _) = bytes.as_chunks_mut::<4>();
        match &self.values {
            // The file's rows are the tensor's columns. Transposing here, in the cache, is many times
            // faster than reading a transposed tensor from a backend.
            Values::Factor(_) if !values.is_empty() => {
                let rows = self.shape[0];
                for (row, slots) in slots.chunks_mut(values.len() / rows).enumerate() {
                    for (slot, value) in slots.iter_mut().zip(values[row..].iter().step_by(rows)) {
                        *slot = value.to_le_bytes();
                    }
                }
            }
            _ => slots.iter_mut().zip(&values).for_each(|(slot, it)| *slot = it.to_le_bytes()),
        }
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        4 * self.shape.iter().product::<usize>()
    }
}

pub(super) fn write<Bk: Backend>(set: &LoraAdapters<Bk>, path: &Path) -> Result<(), LoraError> {
    let not_finite = Cell::new(false);
    let factor = |tensor: Tensor<Bk, 2>, shape| Outgoing {
        values: Values::Factor(tensor),
        shape,
        not_finite: &not_finite,
    };
    let flat =
        |tensor, shape| Outgoing { values: Values::Flat(tensor), shape, not_finite: &not_finite };
    let any_bias = set.adapters.values().any(|adapter| adapter.bias.is_some());
    let mut tensors = BTreeMap::new();
    for (path, adapter) in set.iter() {
        let ([d_input, d_output], rank) = (adapter.shape(), adapter.rank());
        let (mut a_shape, mut b_shape) = (vec![rank, d_input], vec![d_output, rank]);
        let (a_name, b_name) = match &adapter.layout {
            WeightLayout::Embedding => (EMBEDDING_A, EMBEDDING_B),
            _ => (A, B),
        };
        if let WeightLayout::Conv { kernel, .. } = &adapter.layout {
            a_shape[1] = d_input / kernel.iter().product::<usize>();
            a_shape.extend(kernel);
            b_shape.extend(vec![1; kernel.len()]);
        }
        tensors.insert(format!("{PREFIX}{path}{a_name}"), factor(adapter.a.val(), a_shape));
        tensors.insert(format!("{PREFIX}{path}{b_name}"), factor(adapter.b.val(), b_shape));
        if any_bias {
            // In PEFT all adapters of a file have a bias, or none has one.
            let bias = match &adapter.bias {
                Some(bias) => bias.val(),
                None => Tensor::zeros([d_output], &adapter.a.device()),
            };
            tensors.insert(format!("{PREFIX}{path}{B_BIAS}"), flat(bias, vec![d_output]));
        }
    }
    for (name, extra) in &set.extras {
        let (path, parameter) = name.rsplit_once('.').unwrap_or(("", name));
        let key = match set.adapters.contains_key(path) {
            true => format!("{PREFIX}{path}.base_layer.{parameter}"),
            false => format!("{PREFIX}{name}"),
        };
        tensors.insert(key, flat(extra.values.clone(), extra.shape.clone()));
    }
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(tensors, Some(metadata), path).map_err(|error| {
        LoraError::Io { path: path.to_owned(), source: std::io::Error::other(error) }
    })?;
    if not_finite.get() {
        let problem = "the adapters hold NaN or infinite values; nothing was saved".to_owned();
        return Err(LoraError::InvalidFile { file: path.display().to_string(), problem });
    }
    Ok(())
}

fn host<Bk: Backend, const D: usize>(tensor: Tensor<Bk, D>) -> Vec<f32> {
    // The product with 1 has the same bits and is not shared. burn-ndarray returns the memory of an
    // unshared tensor as it is, but reads a shared one element by element, which is ten times slower.
    let data = tensor.mul_scalar(1.0).into_data().convert::<f32>();
    data.into_vec().expect("the data was converted to this type")
}
