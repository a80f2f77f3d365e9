//! Writes a decoder as a directory that Hugging Face's `transformers` loads, or as a GGUF file.

mod gguf;
mod rounding;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    path::Path,
};

use burn::tensor::{DType, backend::Backend};
use burn_store::{BurnToPyTorchAdapter, ModuleSnapshot};
use half::{bf16, f16};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::Value;

use crate::{
    chat::Chat,
    error::{Context, Result},
    files::{is_gguf, is_there, names_ending, read_json, write_atomically},
    gguf::config::hugging_face_config,
    llama::Llama,
    pretrained::{INDEX, WEIGHTS, check_finite, dtypes, python_name},
};

pub use gguf::{GgufKind, SavedGguf, check_gguf, save_gguf};
pub use rounding::{Rounding, updates};

/// Files of the base that describe the model and its tokens.
const COPIED: [&str; 10] = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// The directory of templates for other purposes than a conversation, in that of the base.
const TEMPLATES: &str = "additional_chat_templates";

/// The type in which weights are written. Numbers are rounded to the nearest, and between two to the even one.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Precision {
    /// Single precision.
    F32,
    /// Half precision: 11 bits, up to 65504.
    F16,
    /// The upper half of single precision: 8 bits.
    BF16,
}

/// What was written.
#[derive(Debug)]
pub struct Saved {
    /// The size of the weights.
    pub bytes: usize,
    /// The types of the weights.
    pub precisions: BTreeSet<Precision>,
    /// What rounding changed, by the names of the weights that were written in 16 bits.
    pub rounding: BTreeMap<String, Rounding>,
}

/// A tensor as it is written.
struct Rounded {
    name: String,
    shape: Vec<usize>,
    precision: Precision,
    bytes: Vec<u8>,
    rounding: Rounding,
}

/// Writes the model to `out`, with the configuration and the tokens of `base`, a Hugging Face directory or
/// a GGUF file. Files of another model in `out` that would be read with it are removed.
///
/// The weights have the given type, or each that of the base. What has 2 to 8 bits there becomes [`Precision::F16`],
/// the type of its scales.
///
/// # Errors
///
/// If `out` is the directory of the base, a file of the base cannot be read or expressed as a Hugging Face directory,
/// or a weight is not finite or too large for its type. Then nothing is written. If a file cannot be written.
pub fn save<B: Backend>(
    llama: &Llama<B>,
    chat: &Chat,
    base: &Path,
    out: &Path,
    precision: Option<Precision>,
) -> Result<Saved> {
    let dir = if base.is_dir() { base } else { base.parent().unwrap_or(Path::new("")) };
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    let same = out.canonicalize().is_ok_and(|out| dir.canonicalize().is_ok_and(|dir| dir == out));
    if same {
        return Err(format!("{}: the base is there, which stays as it is", out.display()));
    }
    // Everything that may be refused comes before the first file.
    let stored = dtypes(base)?;
    let tensors = rounded(llama, |name| precision.unwrap_or_else(|| of_base(&stored, name)))?;
    let mut config = config(base, llama.is_tied(), most(&tensors))?;
    if is_gguf(base) {
        // A GGUF file names some of them, and others are known by their names.
        config["eos_token_id"] = chat.ends().into();
    }
    let config = serde_json::to_vec_pretty(&config).context("config.json")?;
    let mut files: BTreeMap<String, Vec<u8>> = match is_gguf(base) {
        true => chat.files()?.map(|(name, bytes)| (name.to_owned(), bytes)).into(),
        false => {
            let copied = COPIED.map(str::to_owned).into_iter().chain(templates(base));
            let read = |file: String| {
                let path = base.join(&file);
                Ok((file, fs::read(&path).context(path.display())?))
            };
            copied.filter(|file| is_there(&base.join(file))).map(read).collect::<Result<_>>()?
        }
    };
    files.insert("config.json".to_owned(), config);
    files.insert(WEIGHTS.to_owned(), serialized(&tensors)?);
    for (file, bytes) in &files {
        write(&out.join(file), bytes)?;
    }
    let known = COPIED.into_iter().chain([INDEX]).map(str::to_owned).chain(templates(out));
    for file in known.filter(|it| !files.contains_key(it)) {
        let path = out.join(file);
        if is_there(&path) {
            fs::remove_file(&path).context(path.display())?;
        }
    }
    let bytes = tensors.iter().map(|it| it.bytes.len()).sum();
    let precisions = tensors.iter().map(|it| it.precision).collect();
    let rounded = tensors.into_iter().filter(|it| it.precision != Precision::F32);
    let rounding = rounded.map(|it| (it.name, it.rounding)).collect();
    Ok(Saved { bytes, precisions, rounding })
}

/// The names of the templates for other purposes in the directory of a model.
fn templates(dir: &Path) -> impl Iterator<Item = String> + use<> {
    let names = names_ending(&dir.join(TEMPLATES), &[".jinja"]);
    names.into_iter().map(|name| format!("{TEMPLATES}/{name}"))
}

/// The type of a weight in the files of the base.
fn of_base(stored: &BTreeMap<String, DType>, name: &str) -> Precision {
    match stored.get(name) {
        Some(DType::F16) => Precision::F16,
        Some(DType::BF16) => Precision::BF16,
        _ => Precision::F32,
    }
}

/// Writes `model.safetensors` to `dir`, in single precision.
///
/// # Errors
///
/// If a weight is not finite, or the file cannot be written.
pub fn save_weights<B: Backend>(llama: &Llama<B>, dir: &Path) -> Result<()> {
    let tensors = rounded(llama, |_| Precision::F32)?;
    write(&dir.join(WEIGHTS), &serialized(&tensors)?)
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomically(path, bytes).context(path.display())
}

/// The weights in these types, by their names.
fn rounded<B: Backend>(
    llama: &Llama<B>,
    precision: impl Fn(&str) -> Precision,
) -> Result<Vec<Rounded>> {
    let tensors = llama.collect(None, Some(Box::new(BurnToPyTorchAdapter)), false).into_iter();
    let round = tensors.map(|tensor| {
        let name = python_name(&tensor.full_path());
        let data = tensor.to_data().context(format!("`{name}`"))?.convert::<f32>();
        let numbers = data.as_slice().map_err(|error| format!("`{name}`: {error:?}"))?;
        check_finite(&name, numbers)?;
        let precision = precision(&name);
        let (bytes, rounding) = precision.round(numbers).map_err(|number| {
            format!("`{name}`: {number} is too large for {precision}; write it in another type")
        })?;
        Ok(Rounded { name, shape: tensor.shape.to_vec(), precision, bytes, rounding })
    });
    round.collect()
}

impl Precision {
    /// The bytes of the numbers and what rounding changed, or a number that would be infinite.
    fn round(self, numbers: &[f32]) -> std::result::Result<(Vec<u8>, Rounding), f32> {
        let halves = |round: fn(f32) -> ([u8; 2], f32)| {
            let mut bytes = Vec::with_capacity(2 * numbers.len());
            let rounding = Rounding::of(numbers.iter().map(|&number| {
                let (half, rounded) = round(number);
                bytes.extend(half);
                (number, rounded)
            }));
            // Only then is there one that became infinite.
            let too_large = || numbers.iter().copied().find(|&it| !round(it).1.is_finite());
            match rounding.error.is_finite() {
                true => Ok((bytes, rounding)),
                false => Err(too_large().unwrap_or(f32::INFINITY)),
            }
        };
        match self {
            Self::F32 => {
                let bytes = numbers.iter().flat_map(|it| it.to_le_bytes()).collect();
                Ok((bytes, Rounding::of(numbers.iter().map(|&it| (it, it)))))
            }
            Self::F16 => halves(|it| {
                let it = f16::from_f32(it);
                (it.to_le_bytes(), it.to_f32())
            }),
            Self::BF16 => halves(|it| {
                let it = bf16::from_f32(it);
                (it.to_le_bytes(), it.to_f32())
            }),
        }
    }

    /// The name in `config.json`.
    fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, out: &mut fmt::Formatter) -> fmt::Result {
        write!(out, "{self:?}")
    }
}

/// The type that takes the most bytes.
fn most(tensors: &[Rounded]) -> Precision {
    let mut sizes = BTreeMap::new();
    for tensor in tensors {
        *sizes.entry(tensor.precision).or_insert(0) += tensor.bytes.len();
    }
    let largest = sizes.into_iter().max_by_key(|(_, size)| *size);
    largest.map_or(Precision::F32, |(precision, _)| precision)
}

/// The bytes of `model.safetensors`.
fn serialized(tensors: &[Rounded]) -> Result<Vec<u8>> {
    let views = tensors.iter().map(|Rounded { name, shape, precision, bytes, .. }| {
        let dtype = match precision {
            Precision::F32 => Dtype::F32,
            Precision::F16 => Dtype::F16,
            Precision::BF16 => Dtype::BF16,
        };
        Ok((name, TensorView::new(dtype, shape.clone(), bytes).context(name)?))
    });
    let views = views.collect::<Result<Vec<_>>>()?;
    // `transformers` asks for this entry.
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    safetensors::serialize(views, Some(metadata)).context(WEIGHTS)
}

/// The configuration of the base, with what may be otherwise in the weights that are written.
fn config(base: &Path, is_tied: bool, precision: Precision) -> Result<Value> {
    let is_gguf = is_gguf(base);
    let path = base.join("config.json");
    let mut config = if is_gguf { hugging_face_config(base)? } else { read_json(&path)? };
    let fields = config.as_object_mut().ok_or("config.json is no object")?;
    if is_gguf {
        fields.insert("dtype".to_owned(), Value::Null);
    }
    // What is written is not quantized.
    fields.remove("quantization_config");
    for key in ["dtype", "torch_dtype"] {
        if let Some(dtype) = fields.get_mut(key) {
            *dtype = precision.name().into();
        }
    }
    // Also if it is not said there: some families are tied then.
    fields.insert("tie_word_embeddings".to_owned(), is_tied.into());
    Ok(config)
}
