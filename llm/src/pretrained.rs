//! Reads a decoder from a directory in Hugging Face's format, with `config.json`, and `model.safetensors` or
//! several files, with `model.safetensors.index.json` or without it; or from a GGUF file.

mod bitsandbytes;
mod holding;
mod tensors;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use burn::{
    module::Initializer,
    tensor::{DType, backend::Backend},
};
use burn_lora::{
    LoraModule,
    gguf::{Packing, paths},
    quantize::Quantization,
};
use burn_store::{BurnToPyTorchAdapter, ModuleSnapshot, PyTorchToBurnAdapter, TensorSnapshot};

use super::{config::LlamaConfig, llama::Llama};
use crate::{
    error::{Context, Result},
    files::{check_model, is_gguf, is_there},
    gguf::model::{self, Model},
};
use holding::{Matrix, quantized};
use tensors::{Tensors, read_tensors};

pub use holding::Holding;
pub(crate) use tensors::{INDEX, Problems, WEIGHTS, check_finite, placed, read_file};

/// The table of embeddings, and the head.
pub(crate) const TABLE: &str = "model.embed_tokens.weight";
pub(crate) const HEAD: &str = "lm_head.weight";

/// A decoder that was read.
pub struct Pretrained<B: Backend> {
    /// The decoder.
    pub llama: Llama<B>,
    /// The types of the weights in the file, if they are not all `f32`.
    pub stored: Option<String>,
    /// The bytes of the weights that are held in 16 bits.
    pub bytes_in_16_bits: usize,
}

/// What the files of a model hold. The values are read when they are needed.
struct Files {
    config: LlamaConfig,
    tensors: Tensors,
    /// The matrices with 2 to 8 bits, and those of a GGUF file with 16. They are among the tensors, too.
    matrices: BTreeMap<String, Matrix>,
    /// How the tensors are packed, if they are in a GGUF file.
    packings: BTreeMap<String, Packing>,
}

impl Files {
    fn open(path: &Path) -> Result<Self> {
        check_model(path)?;
        if is_gguf(path) {
            let Model { config, tensors, matrices, packings, .. } = model::read(path)?;
            let matrices =
                matrices.into_iter().map(|(name, it)| (name, Matrix::Gguf(it))).collect();
            return Ok(Self { config, tensors, matrices, packings });
        }
        let config = LlamaConfig::read(&path.join("config.json"))?;
        let mut tensors = read_tensors(path)?;
        if config.tie_word_embeddings
            && !tensors.contains_key(TABLE)
            && let Some(table) = tensors.remove(HEAD)
        {
            // Both are the same, and may have either name.
            tensors.insert(TABLE.to_owned(), table);
        }
        let packed = bitsandbytes::take(&mut tensors).context(path.display())?.into_iter();
        // Others are read in full.
        let packed = packed.filter(|(_, matrix)| matrix.has_whole_blocks());
        let matrices = packed.map(|(name, matrix)| (name, Matrix::Nf4(matrix))).collect();
        Ok(Self { config, tensors, matrices, packings: BTreeMap::new() })
    }

    /// A head beside the table counts, whatever the configuration says, unless it is the table again.
    fn settle_head(&mut self) -> Result<()> {
        if self.config.tie_word_embeddings
            && let (Some(table), Some(head)) = (self.tensors.get(TABLE), self.tensors.get(HEAD))
        {
            let (mut one, mut other) =
                (table.to_data().context(TABLE)?, head.to_data().context(HEAD)?);
            // Both are large, so they are not converted if they need not be.
            if one.dtype != other.dtype {
                [one, other] = [one, other].map(|it| it.convert_dtype(DType::F32));
            }
            if one == other {
                self.tensors.remove(HEAD);
            } else {
                self.config.tie_word_embeddings = false;
            }
        }
        Ok(())
    }

    /// The type of a tensor in the files. One with 2 to 8 bits counts as the halves that its scales are.
    fn dtype(&self, name: &str) -> DType {
        match self.packings.get(name) {
            Some(Packing::F32) => DType::F32,
            Some(Packing::BF16) => DType::BF16,
            Some(Packing::F16 | Packing::Blocks(_)) => DType::F16,
            None => self.tensors[name].dtype,
        }
    }

    /// The types of the weights, if they are not all `f32`.
    fn stored(&self) -> Option<String> {
        let types: Vec<_> = match self.packings.is_empty() {
            true => {
                let types = self.tensors.iter().map(|(name, it)| match self.matrices.get(name) {
                    Some(_) => "NF4".to_owned(),
                    None => format!("{:?}", it.dtype),
                });
                types.collect::<BTreeSet<_>>().into_iter().collect()
            }
            false => {
                let packings: BTreeSet<_> = self.packings.values().collect();
                packings.into_iter().map(|it| it.to_string()).collect()
            }
        };
        let types: Vec<_> = types.into_iter().filter(|it| it != "F32").collect();
        (!types.is_empty()).then(|| types.join(", "))
    }
}

/// The files that the weights of the model at `path`, a directory or a GGUF file, are read from, as far as they are
/// there.
///
/// # Errors
///
/// If there is an index of several files, and it cannot be read.
pub fn weight_files(path: &Path) -> Result<Vec<PathBuf>> {
    let mut files = if is_gguf(path) { paths(path) } else { tensors::files(path)? };
    files.retain(|file| is_there(file));
    Ok(files)
}

/// The type of each weight in the files, by its name at Hugging Face. Weights with 2 to 8 bits count as the halves
/// that their scales are.
pub(crate) fn dtypes(path: &Path) -> Result<BTreeMap<String, DType>> {
    let files = Files::open(path)?;
    Ok(files.tensors.keys().map(|name| (name.clone(), files.dtype(name))).collect())
}

/// The shape of each weight in the files of the model at `path`, by its name at Hugging Face. Only the beginnings of the
/// files are read.
///
/// # Errors
///
/// If a file cannot be read, or describes a model that [`Llama`] is not.
pub fn shapes(path: &Path) -> Result<BTreeMap<String, Vec<usize>>> {
    let files = Files::open(path)?;
    Ok(files.tensors.into_iter().map(|(name, it)| (name, it.shape.to_vec())).collect())
}

/// Whether more than half of the numbers in the matrices of the model at `path`, a directory or a GGUF file, are bf16
/// there. Only the beginnings of the files are read.
///
/// # Errors
///
/// If a file cannot be read, or describes a model that [`Llama`] is not.
pub fn is_mostly_bf16(path: &Path) -> Result<bool> {
    let files = Files::open(path)?;
    let (mut bf16, mut all) = (0, 0);
    for (name, tensor) in files.tensors.iter().filter(|(_, tensor)| tensor.shape.len() == 2) {
        let count = tensor.shape.num_elements();
        all += count;
        bf16 += if files.dtype(name) == DType::BF16 { count } else { 0 };
    }
    Ok(2 * bf16 > all)
}

/// The decoder in `path`, a directory or a GGUF file. Its linear layers are quantized as they are read, if
/// `quantize` says to what. What has 2 to 8 bits in a GGUF file stays as it is. So there is never a model in
/// full if it is not wanted.
///
/// A head in the files is used also if the configuration says that the table of embeddings is the head.
///
/// # Errors
///
/// If a file cannot be read or is not of a decoder that [`Llama`] is; if a tensor is missing, unexpected,
/// has another shape, or a number that is not finite. The error lists all of them.
pub fn load<B: Backend>(
    path: &Path,
    quantize: Option<Quantization>,
    device: &B::Device,
) -> Result<Pretrained<B>> {
    load_held(path, Holding { quantize, keep_16_bits: false }, device)
}

/// [`load`], where the weights are held as one says.
///
/// # Errors
///
/// As for [`load`].
pub fn load_held<B: Backend>(
    path: &Path,
    holding: Holding,
    device: &B::Device,
) -> Result<Pretrained<B>> {
    let mut files = Files::open(path)?;
    let stored = files.stored();
    check_sizes(&files.config, &files.tensors).context(path.display())?;
    files.settle_head().context(path.display())?;
    let Files { config, mut tensors, matrices, .. } = files;
    let llama = config.init(&Initializer::Zeros, device);
    let (weights, bytes_in_16_bits) =
        quantized(&mut tensors, &matrices, holding, device).context(path.display())?;
    let mut llama = llama.with_quantized(weights).context(path.display())?;
    let problems = Problems::default();
    let found = match_up(&llama, tensors, &problems).context(path.display())?;
    let result = llama.apply(found, None, Some(Box::new(PyTorchToBurnAdapter)), false);
    let problems = match &problems.borrow()[..] {
        [] if result.errors.is_empty() && result.missing.is_empty() => {
            return Ok(Pretrained { llama, stored, bytes_in_16_bits });
        }
        [] => format!("{:?}, {:?}", result.errors, result.missing),
        problems => problems.join("; "),
    };
    Err(problems).context(path.display())
}

/// The configuration of the decoder in `path`, a directory or a GGUF file. Its weights are not read.
///
/// # Errors
///
/// If the file cannot be read, or describes a model that [`Llama`] is not.
pub fn config(path: &Path) -> Result<LlamaConfig> {
    match is_gguf(path) {
        true => Ok(model::read(path)?.config),
        false => LlamaConfig::read(&path.join("config.json")),
    }
}

/// Checks that the files have the sizes in the configuration, before memory is allocated for them.
fn check_sizes(config: &LlamaConfig, tensors: &Tensors) -> Result<()> {
    let (width, head) = (config.hidden_size, config.head_dim());
    let rows = |heads: usize| heads.saturating_mul(head);
    let [queries, keys] = [config.num_attention_heads, config.key_value_heads()].map(rows);
    let inner = config.intermediate_size;
    let of_layer = match config.design().fused {
        true => vec![
            ("self_attn.qkv_proj", keys.saturating_mul(2).saturating_add(queries)),
            ("mlp.gate_up_proj", inner.saturating_mul(2)),
        ],
        false => vec![
            ("self_attn.q_proj", queries),
            ("self_attn.k_proj", keys),
            ("mlp.gate_proj", inner),
        ],
    };
    let of_layer = of_layer
        .into_iter()
        .map(|(name, rows)| (format!("model.layers.0.{name}.weight"), [rows, width]));
    let all = [(TABLE.to_owned(), [config.vocab_size, width])].into_iter().chain(of_layer);
    for (name, shape) in all {
        let found = tensors.get(&name).map(|tensor| tensor.shape.to_vec());
        if found.as_deref() != Some(&shape) {
            let found = found.map_or("missing".to_owned(), |found| format!("{found:?}"));
            return Err(format!("by the configuration `{name}` is {shape:?}, and it is {found}"));
        }
    }
    let ends = |name: &&String| name.ends_with(".mlp.down_proj.weight");
    let (layers, found) = (config.num_hidden_layers, tensors.keys().filter(ends).count());
    match layers == found {
        true => Ok(()),
        false => Err(format!("by the configuration it has {layers} layers, and it has {found}")),
    }
}

/// The decoder's tensors.
///
/// # Errors
///
/// If some do not fit. The error lists all of them.
fn match_up<B: Backend>(
    llama: &Llama<B>,
    mut tensors: Tensors,
    reading: &Problems,
) -> Result<Vec<TensorSnapshot>> {
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
        found.push(placed(name, tensor, wanted, reading));
    }
    // Written by old versions, and computed here.
    tensors.retain(|name, _| !name.ends_with(".rotary_emb.inv_freq"));
    problems.extend(tensors.keys().map(|name| format!("`{name}` belongs to nothing")));
    if problems.is_empty() { Ok(found) } else { Err(problems.join("; ")) }
}

/// Hugging Face's name of a parameter: what is `gamma` in Burn's norms is `weight` there.
pub fn python_name(path: &str) -> String {
    path.strip_suffix(".gamma").map_or(path.to_owned(), |norm| format!("{norm}.weight"))
}
