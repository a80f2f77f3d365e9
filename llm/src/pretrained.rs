//! Reads a decoder from a directory in Hugging Face's format, with `config.json`, and `model.safetensors` or
//! several files with `model.safetensors.index.json`; or from a GGUF file.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Display,
    fs,
    path::{Component, Path},
    rc::Rc,
};

use burn::{
    module::Initializer,
    tensor::{DType, Tensor, backend::Backend},
};
use burn_lora::{
    LoraModule,
    quantize::{Quantization, QuantizedWeight},
};

use super::{config::LlamaConfig, llama::Llama};
use crate::gguf::model::{self, Matrix, Model};
use burn_store::{
    BurnToPyTorchAdapter, ModuleSnapshot, ModuleStore, PyTorchToBurnAdapter, SafetensorsStore,
    TensorSnapshot,
};
use serde::Deserialize;

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The linear layers of a block, by the ends of their names. These are quantized: the table of embeddings, the
/// head and the norms stay.
const QUANTIZED: [&str; 7] =
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// A decoder that was read.
pub struct Pretrained<B: Backend> {
    /// The decoder.
    pub llama: Llama<B>,
    /// The types of the weights in the file, if they are not all `f32`.
    pub stored: Option<String>,
}

type Tensors = BTreeMap<String, TensorSnapshot>;

/// The decoder in `path`, a directory or a GGUF file. Its linear layers are quantized as they are read, if
/// `quantize` says to what. What has 4 or 8 bits in a GGUF file stays as it is. So there is never a model in
/// full if it is not wanted.
///
/// # Errors
///
/// If a file cannot be read or is not of a decoder that [`Llama`] is; if a tensor is missing, unexpected,
/// or has another shape. The error lists all of them.
pub fn load<B: Backend>(
    path: &Path,
    quantize: Option<Quantization>,
    device: &B::Device,
) -> Result<Pretrained<B>, String> {
    let (config, mut tensors, matrices, types) = match is_gguf(path) {
        true => {
            let Model { config, tensors, matrices, packings } = model::read(path)?;
            let types = packings.iter().map(|it| format!("{it:?}")).collect();
            (config, tensors, matrices, types)
        }
        false => {
            let config = LlamaConfig::read(&path.join("config.json"))?;
            let tensors = read_tensors(path)?;
            let types = tensors.values().map(|it| format!("{:?}", it.dtype));
            let types: BTreeSet<_> = types.collect();
            (config, tensors, BTreeMap::new(), Vec::from_iter(types))
        }
    };
    let told = |problem: &dyn Display| format!("{}: {problem}", path.display());
    check_sizes(&config, &tensors).map_err(|problem| told(&problem))?;
    let llama = config.init(&Initializer::Zeros, device);
    let weights = quantized(&mut tensors, &matrices, quantize, device);
    let llama = llama.with_quantized(weights.map_err(|problem| told(&problem))?);
    let mut llama = llama.map_err(|error| told(&error))?;
    let found = match_up(&llama, &config, &mut tensors);
    let found = found.map_err(|problems| told(&problems.join("; ")))?;
    let result = llama.apply(found, None, Some(Box::new(PyTorchToBurnAdapter)), false);
    let types: Vec<_> = types.into_iter().filter(|it| it != "F32").collect();
    let stored = (!types.is_empty()).then(|| types.join(", "));
    match result.errors.is_empty() && result.missing.is_empty() {
        true => Ok(Pretrained { llama, stored }),
        false => Err(told(&format!("{:?}, {:?}", result.errors, result.missing))),
    }
}

/// The configuration of the decoder in `path`, a directory or a GGUF file. Its weights are not read.
///
/// # Errors
///
/// If the file cannot be read, or describes a model that [`Llama`] is not.
pub fn config(path: &Path) -> Result<LlamaConfig, String> {
    match is_gguf(path) {
        true => Ok(model::read(path)?.config),
        false => LlamaConfig::read(&path.join("config.json")),
    }
}

/// Takes the weights that are quantized out of the tensors, by the paths of their layers.
fn quantized<B: Backend>(
    tensors: &mut Tensors,
    matrices: &BTreeMap<String, Matrix>,
    to: Option<Quantization>,
    device: &B::Device,
) -> Result<BTreeMap<String, QuantizedWeight<B>>, String> {
    let mut weights = BTreeMap::new();
    let names: Vec<_> = tensors.keys().cloned().collect();
    for name in names {
        let Some(path) = name.strip_suffix(".weight") else { continue };
        let is_linear = path.rsplit('.').next().is_some_and(|it| QUANTIZED.contains(&it));
        let weight = match (matrices.get(&name), to.filter(|_| is_linear)) {
            (Some(matrix), _) => matrix.read(device)?,
            (None, Some(to)) => rounded(&tensors[&name], to, device)
                .map_err(|problem| format!("`{name}`: {problem}"))?,
            (None, None) => continue,
        };
        weights.insert(path.to_owned(), weight);
        tensors.remove(&name);
    }
    Ok(weights)
}

/// A matrix of the file, rounded.
fn rounded<B: Backend>(
    tensor: &TensorSnapshot,
    to: Quantization,
    device: &B::Device,
) -> Result<QuantizedWeight<B>, String> {
    let &[rows, columns] = &tensor.shape.to_vec()[..] else {
        return Err(format!("{:?} is not the shape of a matrix", tensor.shape.to_vec()));
    };
    let data = tensor.to_data().map_err(|error| error.to_string())?.convert::<f32>();
    let numbers = data.as_slice::<f32>().map_err(|error| format!("{error:?}"))?;
    if rows * columns == 0 || !numbers.iter().all(|it| it.is_finite()) {
        return Err("a number is not finite, or there is none".to_owned());
    }
    Ok(QuantizedWeight::new(Tensor::from_data(data, device), to))
}

/// Whether the path is that of a GGUF file.
pub fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|it| it.eq_ignore_ascii_case("gguf"))
}

/// All tensors of the directory, by name. Their values are read when they are needed.
fn read_tensors(dir: &Path) -> Result<Tensors, String> {
    let index = dir.join(INDEX);
    if !index.exists() {
        return read_file(&dir.join(WEIGHTS));
    }
    let told = |error: &dyn Display| format!("{}: {error}", index.display());
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = fs::read_to_string(&index).map_err(|error| told(&error))?;
    let index: Index = serde_json::from_str(&text).map_err(|error| told(&error))?;
    let files: BTreeSet<_> = index.weight_map.values().collect();
    let mut tensors = Tensors::new();
    for file in files {
        let mut parts = Path::new(file).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
            return Err(told(&format!("`{file}` is not the name of a file in the directory")));
        }
        tensors.extend(read_file(&dir.join(file))?);
    }
    let listed = index.weight_map.into_keys().collect::<BTreeSet<_>>();
    let found = tensors.keys().cloned().collect();
    match listed.symmetric_difference(&found).next() {
        Some(name) => Err(told(&format!("`{name}` is only in the index, or only in the files"))),
        None => Ok(tensors),
    }
}

fn read_file(path: &Path) -> Result<Tensors, String> {
    let told = |error: &dyn Display| format!("{}: {error}", path.display());
    // burn-store would not name the file.
    fs::File::open(path).map_err(|error| told(&error))?;
    let mut file = SafetensorsStore::from_file(path);
    Ok(file.get_all_snapshots().map_err(|error| told(&error))?.clone())
}

/// Checks that the files have the sizes in the configuration, before memory is allocated for them.
fn check_sizes(config: &LlamaConfig, tensors: &Tensors) -> Result<(), String> {
    let (width, head) = (config.hidden_size, config.head_dim());
    let rows = |heads: usize| heads.saturating_mul(head);
    for (name, shape) in [
        ("model.embed_tokens.weight", [config.vocab_size, width]),
        ("model.layers.0.self_attn.q_proj.weight", [rows(config.num_attention_heads), width]),
        ("model.layers.0.self_attn.k_proj.weight", [rows(config.key_value_heads()), width]),
        ("model.layers.0.mlp.gate_proj.weight", [config.intermediate_size, width]),
    ] {
        let found = tensors.get(name).map(|tensor| tensor.shape.to_vec());
        if found.as_deref() != Some(&shape) {
            let found = found.map_or("missing".to_owned(), |found| format!("{found:?}"));
            return Err(format!("by the configuration `{name}` is {shape:?}, and it is {found}"));
        }
    }
    let ends = |name: &&String| name.ends_with(".mlp.gate_proj.weight");
    let (layers, found) = (config.num_hidden_layers, tensors.keys().filter(ends).count());
    match layers == found {
        true => Ok(()),
        false => Err(format!("by the configuration it has {layers} layers, and it has {found}")),
    }
}

/// The decoder's tensors, or a list of problems.
fn match_up<B: Backend>(
    llama: &Llama<B>,
    config: &LlamaConfig,
    tensors: &mut Tensors,
) -> Result<Vec<TensorSnapshot>, Vec<String>> {
    let (mut found, mut problems) = (Vec::new(), Vec::new());
    for wanted in llama.collect(None, Some(Box::new(BurnToPyTorchAdapter)), false) {
        let name = python_name(&wanted.full_path());
        let Some(tensor) = tensors.remove(&name) else {
            problems.push(format!("`{name}` is missing"));
            continue;
        };
        if tensor.shape != wanted.shape {
            let [expected, shape] = [&wanted.shape, &tensor.shape].map(|it| it.to_vec());
            problems.push(format!("`{name}` must be of shape {expected:?}, and is {shape:?}"));
        } else if !matches!(tensor.dtype, DType::F32 | DType::F16 | DType::BF16) {
            let expected = "F32, F16 or BF16";
            problems
                .push(format!("`{name}` must be of type {expected}, and is {:?}", tensor.dtype));
        }
        found.push(in_f32(tensor, wanted));
    }
    tensors.retain(|name, _| {
        // Written by old versions, and computed here.
        let computed = name.ends_with(".rotary_emb.inv_freq");
        // The same table again.
        let tied = config.tie_word_embeddings && name == "lm_head.weight";
        !computed && !tied
    });
    problems.extend(tensors.keys().map(|name| format!("`{name}` belongs to nothing")));
    if problems.is_empty() { Ok(found) } else { Err(problems) }
}

/// Hugging Face's name of a parameter: what is `gamma` in Burn's norms is `weight` there.
pub fn python_name(path: &str) -> String {
    path.strip_suffix(".gamma").map_or(path.to_owned(), |norm| format!("{norm}.weight"))
}

/// The values of `tensor` in the place of `wanted`, converted when they are read.
fn in_f32(tensor: TensorSnapshot, wanted: TensorSnapshot) -> TensorSnapshot {
    let shape = tensor.shape.clone();
    let values = Rc::new(move || Ok(tensor.to_data()?.convert_dtype(DType::F32)));
    let path = wanted.path_stack.unwrap_or_default();
    let containers = wanted.container_stack.unwrap_or_default();
    let id = wanted.tensor_id.unwrap_or_default();
    TensorSnapshot::from_closure(values, DType::F32, shape, path, containers, id)
}
