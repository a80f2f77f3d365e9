//! Writes a decoder as a GGUF file, which llama.cpp and what is built on it run.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::Path,
};

use burn::tensor::{DType, backend::Backend};
use burn_lora::{
    LoraError,
    gguf::{Field, Gguf, NewTensor, Packing, halves_to_pairs, write},
    quantize::GgufType,
};
use burn_store::{BurnToPyTorchAdapter, ModuleSnapshot, TensorSnapshot};

use super::{Rounding, of_base};
use crate::{
    chat::Chat,
    config::LlamaConfig,
    error::{Context, Result},
    files::is_gguf,
    gguf::{
        self,
        architecture::{Architecture, renamed},
        config::POSITIONS,
        fields::{Description, describe},
        model,
    },
    llama::Llama,
    pretrained::{self, HEAD, TABLE, check_finite, dtypes, python_name},
};

/// How the matrices of a GGUF file are packed. What has one dimension is in single precision.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[cfg_attr(feature = "cli", value(rename_all = "snake_case"))]
pub enum GgufKind {
    /// Each as in the base. What nothing changed keeps its bytes; what was changed and has a type that cannot be written,
    /// such as those of K-quants, becomes Q8_0.
    #[default]
    Keep,
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// The upper half of single precision.
    #[cfg_attr(feature = "cli", value(name = "bf16"))]
    BF16,
    /// 8 bits.
    #[cfg_attr(feature = "cli", value(name = "q8_0"))]
    Q8_0,
    /// 5 bits, from the smallest number of each block on. Here, and in 4 bits, the head has 8 bits.
    #[cfg_attr(feature = "cli", value(name = "q5_1"))]
    Q5_1,
    /// 5 bits, around zero.
    #[cfg_attr(feature = "cli", value(name = "q5_0"))]
    Q5_0,
    /// 4 bits, from the smallest number of each block on.
    #[cfg_attr(feature = "cli", value(name = "q4_1"))]
    Q4_1,
    /// 4 bits, around zero.
    #[cfg_attr(feature = "cli", value(name = "q4_0"))]
    Q4_0,
}

/// The version of the types of blocks, which there is only one of.
const VERSION: &str = "general.quantization_version";

const Q8_0: Packing = Packing::Blocks(GgufType::Q8_0);

impl GgufKind {
    /// The type of matrices; none if it is that of the base.
    fn packing(self) -> Option<Packing> {
        Some(match self {
            Self::Keep => return None,
            Self::F32 => Packing::F32,
            Self::F16 => Packing::F16,
            Self::BF16 => Packing::BF16,
            Self::Q8_0 => Q8_0,
            Self::Q5_1 => Packing::Blocks(GgufType::Q5_1),
            Self::Q5_0 => Packing::Blocks(GgufType::Q5_0),
            Self::Q4_1 => Packing::Blocks(GgufType::Q4_1),
            Self::Q4_0 => Packing::Blocks(GgufType::Q4_0),
        })
    }
}

/// What was written.
#[derive(Debug)]
pub struct SavedGguf {
    /// The size of the weights.
    pub bytes: u64,
    /// How each weight is packed, by its name at Hugging Face.
    pub packings: BTreeMap<String, Packing>,
    /// What rounding changed in the weights that are not in single precision.
    pub rounding: BTreeMap<String, Rounding>,
    /// The weights whose bytes are those of the base.
    pub kept: BTreeSet<String>,
    /// The weights that were changed and whose type cannot be written, with the type in which they were written in its
    /// place.
    pub replaced: BTreeMap<String, [Packing; 2]>,
}

/// Writes the model to the file at `out`, with the fields of `base`, a GGUF file, or those that say the same as the files
/// of `base`, a Hugging Face directory.
///
/// # Errors
///
/// If a file of the base cannot be read, or if llama.cpp has no such decoder or tokenizer; if a weight is not finite or too
/// large for its type; if the file cannot be written. An old one then stays as it was.
pub fn save_gguf<B: Backend>(
    llama: &Llama<B>,
    chat: &Chat,
    base: &Path,
    out: &Path,
    kind: GgufKind,
) -> Result<SavedGguf> {
    let config = pretrained::config(base)?;
    let family = family_of(&config)?;
    let source = Source::open(base)?;
    // Before weights are unpacked, which takes long.
    let (mut fields, others) = source.description(base, chat, &config, family, llama.is_tied())?;
    let tensors = llama.collect(None, Some(Box::new(BurnToPyTorchAdapter)), false);
    let written = RefCell::new(SavedGguf {
        bytes: 0,
        packings: BTreeMap::new(),
        rounding: BTreeMap::new(),
        kept: BTreeSet::new(),
        replaced: BTreeMap::new(),
    });
    let modules = family.modules().inverse();
    let mut new = Vec::new();
    for tensor in tensors {
        let name = python_name(&tensor.full_path());
        let file_name = renamed(&name, &modules);
        if file_name == name {
            return Err(format!("llama.cpp's `{}` models have no `{name}`", family.name));
        }
        let outgoing = Outgoing {
            heads: family.heads(&config, &name),
            adds_one: family.adds_one(&file_name),
            is_head: name == HEAD || name == TABLE && llama.is_tied(),
            name,
            tensor,
            source: &source,
            written: &written,
        };
        let packing = outgoing.packing(kind)?;
        let shape = outgoing.tensor.shape.to_vec();
        written.borrow_mut().packings.insert(outgoing.name.clone(), packing);
        written.borrow_mut().bytes += packing.size(&shape).unwrap_or(0);
        let path = out.display().to_string();
        let bytes = move || {
            let invalid = |problem| LoraError::InvalidFile { file: path, problem };
            outgoing.bytes(packing).map_err(invalid)
        };
        new.push(NewTensor { name: file_name, shape, packing, bytes: Box::new(bytes) });
    }
    new.extend(others);
    if kind != GgufKind::Keep || source.file.is_none() {
        set(&mut fields, "general.file_type", file_type(&new).into());
        set(&mut fields, VERSION, 2_u32.into());
    }
    write(out, fields, new).map_err(|error| error.to_string())?;
    Ok(written.into_inner())
}

/// The fields of a file, by their names.
type Fields = Vec<(String, Field)>;

/// The base, whose fields and bytes may be kept.
struct Source {
    file: Option<(Gguf, model::Model)>,
    /// The types of the weights in a directory.
    dtypes: BTreeMap<String, DType>,
}

impl Source {
    fn open(base: &Path) -> Result<Self> {
        Ok(match is_gguf(base) {
            true => Self {
                file: Some((gguf::open(base)?, model::read(base)?)),
                dtypes: BTreeMap::new(),
            },
            false => Self { file: None, dtypes: dtypes(base)? },
        })
    }

    /// The fields of the file, and its tensors that are no weights.
    fn description(
        &self,
        base: &Path,
        chat: &Chat,
        config: &LlamaConfig,
        family: &Architecture,
        is_tied: bool,
    ) -> Result<(Fields, Vec<NewTensor<'_>>)> {
        if let Some((file, _)) = &self.file {
            let others = POSITIONS.into_iter().filter_map(|name| {
                let tensor = file.tensors.get(name)?;
                Some(NewTensor {
                    name: name.to_owned(),
                    shape: tensor.shape.clone(),
                    packing: tensor.packing,
                    bytes: Box::new(move || file.bytes(name)),
                })
            });
            let fields = file.copied_fields().map_err(|error| error.to_string())?;
            return Ok((fields, others.collect()));
        }
        let Description { mut fields, tensors } = describe(config, family, is_tied)?;
        let dir = base.canonicalize().context(base.display())?;
        let name = dir.file_name().map(|it| it.to_string_lossy().into_owned());
        fields.insert(2, ("general.name".to_owned(), name.unwrap_or_default().into()));
        fields.extend(chat.gguf_fields(config.vocab_size)?);
        let others = tensors.into_iter().map(|(name, values)| {
            let bytes = Packing::F32.pack(&values).expect("it can be written");
            NewTensor {
                name: name.to_owned(),
                shape: vec![values.len()],
                packing: Packing::F32,
                bytes: Box::new(|| Ok(bytes)),
            }
        });
        Ok((fields, others.collect()))
    }
}

/// Fails if the model at `base` cannot be written as a GGUF file, whatever its weights are. Only the beginnings of its files
/// are read.
///
/// # Errors
///
/// As for [`save_gguf`].
pub fn check_gguf(chat: &Chat, base: &Path) -> Result<()> {
    let config = pretrained::config(base)?;
    let family = family_of(&config)?;
    let is_tied = config.tie_word_embeddings;
    Source::open(base)?.description(base, chat, &config, family, is_tied).map(drop)
}

fn family_of(config: &LlamaConfig) -> Result<&'static Architecture> {
    let model_type = config.model_type();
    Architecture::of_model_type(&model_type)
        .ok_or_else(|| format!("llama.cpp has no models of `{model_type}`"))
}

/// A weight on its way into the file.
struct Outgoing<'a> {
    name: String,
    tensor: TensorSnapshot,
    heads: Option<usize>,
    adds_one: bool,
    is_head: bool,
    source: &'a Source,
    written: &'a RefCell<SavedGguf>,
}

impl Outgoing<'_> {
    fn values(&self) -> Result<Vec<f32>> {
        let data = self.tensor.to_data().context(format!("`{}`", self.name))?;
        let values = data.convert::<f32>().into_vec::<f32>();
        let values = values.map_err(|error| format!("`{}`: {error:?}", self.name))?;
        check_finite(&self.name, &values)?;
        Ok(values)
    }

    /// How it is packed in the base, if that is a GGUF file.
    fn in_base(&self) -> Option<Packing> {
        let (_, model) = self.source.file.as_ref()?;
        model.packings.get(&self.name).copied()
    }

    /// Whether the base has the same numbers.
    fn is_unchanged(&self, values: &[f32]) -> Result<bool> {
        let Some((_, model)) = &self.source.file else { return Ok(false) };
        let Some(tensor) = model.tensors.get(&self.name) else { return Ok(false) };
        let base = tensor.to_data().context(format!("`{}`", self.name))?;
        Ok(base.as_slice::<f32>().is_ok_and(|base| base == values))
    }

    /// How it is written.
    fn packing(&self, kind: GgufKind) -> Result<Packing> {
        let shape = self.tensor.shape.to_vec();
        let wanted = match (kind.packing(), self.in_base()) {
            (None, Some(packing)) => packing,
            _ if shape.len() < 2 => Packing::F32,
            // A head that is no longer the table.
            (None, None) if self.source.file.is_some() => Q8_0,
            (None, None) => match of_base(&self.source.dtypes, &self.name) {
                super::Precision::F32 => Packing::F32,
                super::Precision::F16 => Packing::F16,
                super::Precision::BF16 => Packing::BF16,
            },
            // As llama.cpp does it, which has 6 bits there.
            (Some(Packing::Blocks(_)), _) if self.is_head => Q8_0,
            (Some(packing), _) => packing,
        };
        let fits = |packing: Packing| packing.size(&shape).is_some();
        // Rows of some sizes are no whole blocks.
        let other = if fits(Q8_0) { Q8_0 } else { Packing::F16 };
        match (fits(wanted), is_writable(wanted)) {
            (false, _) => Ok(other),
            (_, true) => Ok(wanted),
            (_, false) if self.is_unchanged(&self.values()?)? => Ok(wanted),
            (_, false) => {
                let mut written = self.written.borrow_mut();
                written.replaced.insert(self.name.clone(), [wanted, other]);
                Ok(other)
            }
        }
    }

    /// The bytes in the file.
    fn bytes(self, packing: Packing) -> Result<Vec<u8>> {
        // What cannot be written is kept, and was compared before.
        let values = if is_writable(packing) { self.values()? } else { Vec::new() };
        let is_kept = !is_writable(packing)
            || self.in_base() == Some(packing) && self.is_unchanged(&values)?;
        if is_kept {
            let (file, model) = self.source.file.as_ref().expect("it is in the base");
            let name = &model.names[&self.name];
            self.written.borrow_mut().kept.insert(self.name);
            return file.bytes(name).map_err(|error| error.to_string());
        }
        let rows = self.tensor.shape.to_vec()[0];
        let mut own = match self.heads {
            Some(heads) => halves_to_pairs(&values, heads, rows),
            None => values,
        };
        if self.adds_one {
            own.iter_mut().for_each(|it| *it += 1.0);
        }
        let bytes = packing.pack(&own).expect("it was checked that it can be written");
        if packing != Packing::F32 {
            let rounded = packing.unpack(&bytes);
            if let Some((number, _)) = own.iter().zip(&rounded).find(|(_, it)| !it.is_finite()) {
                return Err(format!(
                    "`{}`: {number} is too large for {packing}; write it in another type",
                    self.name
                ));
            }
            let pairs = own.iter().copied().zip(rounded);
            let rounding = Rounding::of(pairs);
            self.written.borrow_mut().rounding.insert(self.name, rounding);
        }
        Ok(bytes)
    }
}

/// Whether numbers can be rounded to the type.
fn is_writable(packing: Packing) -> bool {
    packing.pack(&[]).is_some()
}

/// Sets a field, in its place if it is there.
fn set(fields: &mut Fields, name: &str, value: Field) {
    match fields.iter_mut().find(|(it, _)| it == name) {
        Some((_, field)) => *field = value,
        None => fields.push((name.to_owned(), value)),
    }
}

/// The number that llama.cpp has for a file in which most is packed so.
fn file_type(tensors: &[NewTensor<'_>]) -> u32 {
    let mut sizes = BTreeMap::new();
    for tensor in tensors {
        *sizes.entry(tensor.packing).or_insert(0) +=
            tensor.packing.size(&tensor.shape).unwrap_or(0);
    }
    let most = sizes.into_iter().max_by_key(|(_, size)| *size).map(|(packing, _)| packing);
    match most.unwrap_or(Packing::F32) {
        Packing::F32 => 0,
        Packing::F16 => 1,
        Packing::BF16 => 32,
        Packing::Blocks(kind) => match kind {
            GgufType::Q4_0 => 2,
            GgufType::Q4_1 => 3,
            GgufType::Q5_0 => 8,
            GgufType::Q5_1 => 9,
            // Others are only in files whose own number is kept.
            _ => 7,
        },
    }
}

impl fmt::Display for GgufKind {
    /// As it is given as an argument.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", format!("{self:?}").to_lowercase())
    }
}
