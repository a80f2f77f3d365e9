//! Adapters in files of llama.cpp: `general.type` is `adapter`, and the factors of a layer have the name of its weight
//! with `.lora_a` and `.lora_b` after it.
//!
//! A is `[rank, d_input]` there, and B `[d_output, rank]`, as PyTorch has them. What is multiplied is
//! `adapter.lora.alpha / rank`, or nothing if alpha is 0.

use std::{collections::BTreeMap, path::Path};

use burn::tensor::{Tensor, TensorData, backend::Backend};

use super::tensors::{host, transposed};
use crate::{
    adapter::{LoraAdapter, Tie, WeightLayout},
    adapters::{
        LoraAdapters,
        renaming::{Renaming, is_at},
    },
    config::Scaling,
    error::{LoraError, named, quoted, shown},
    gguf_file::{Field, Gguf, NewTensor, Packing, halves_to_pairs, pairs_to_halves, write},
};

const ARCHITECTURE: &str = "general.architecture";
const GENERAL_TYPE: &str = "general.type";
const ADAPTER_TYPE: &str = "adapter.type";
const ALPHA: &str = "adapter.lora.alpha";
const INVOCATION: &str = "adapter.alora.invocation_tokens";
const BASES: &str = "general.base_model.count";
const BASE: &str = "general.base_model.0.name";

/// The table of embeddings. llama.cpp has its factors the other way round.
const TABLE: &str = "token_embd";

/// What comes after the name of a layer.
const WEIGHT: &str = ".weight";
const A: &str = ".weight.lora_a";
const B: &str = ".weight.lora_b";

/// How a family of language models has its layers in GGUF files.
///
/// ```
/// use burn_lora::{gguf::Family, peft::Renaming};
///
/// let family = Family {
///     architecture: "llama".to_owned(),
///     names: Renaming::new([
///         ("blk.*.attn_q", "layers.*.attention.query"),
///         ("blk.*.attn_k", "layers.*.attention.key"),
///         ("blk.*.ffn_down", "layers.*.feed_forward.down"),
///     ]),
///     // 8 heads of queries share 2 of keys.
///     pairs: vec![("blk.*.attn_q".to_owned(), 8), ("blk.*.attn_k".to_owned(), 2)],
///     is_tied: true,
/// };
/// # assert_eq!(family.names.apply("blk.1.attn_q"), "layers.1.attention.query");
/// ```
#[derive(Clone, Debug)]
pub struct Family {
    /// Its name, `general.architecture`. llama.cpp takes adapters for a model of the same one only.
    pub architecture: String,
    /// From the names of the layers in files, without `.weight`, to their paths in the model. Layers that it does not
    /// name have no adapters in such files.
    pub names: Renaming,
    /// Templates of names in files, each with a number of heads: layers whose rows that RoPE turns together are next to
    /// each other there, and half a head apart in the model. See [`pairs_to_halves`].
    pub pairs: Vec<(String, usize)>,
    /// Whether the table of embeddings is also the head. llama.cpp then takes no adapter of either: it multiplies by the
    /// same tensor in both places, which does not fit, and ends the whole program.
    pub is_tied: bool,
}

impl Family {
    /// The heads of the layer of this name, if the pairs of its rows are next to each other.
    fn heads(&self, name: &str) -> Option<usize> {
        self.pairs.iter().find(|(template, _)| is_at(name, template)).map(|(_, heads)| *heads)
    }
}

impl<Bk: Backend> LoraAdapters<Bk> {
    /// Writes the adapters as a file that llama.cpp loads (`--lora FILE`), and Ollama (`ADAPTER FILE`), in `f32`.
    ///
    /// llama.cpp divides one alpha by the rank of each layer. If the scales of all layers are such, that alpha is
    /// written, also for adapters with [`Scaling::AlphaOverSqrtRank`]; otherwise each layer's scale is multiplied into
    /// its B.
    ///
    /// # Errors
    ///
    /// [`LoraError::Unsupported`] if such files have no place for something in the set: magnitudes (DoRA), biases,
    /// modules that were trained in full, convolutions, layers that the family does not name, an embedding that is also
    /// the head. If a factor is not finite, or the file cannot be written. An old file then stays as it was.
    pub fn save_gguf(&self, path: impl AsRef<Path>, family: &Family) -> Result<(), LoraError> {
        let path = path.as_ref();
        let set = self.standalone();
        let outgoing = outgoing(&set, family, &path.display().to_string())?;
        let one = common_alpha(&set);
        let mut fields = vec![
            (ARCHITECTURE, Field::from(family.architecture.as_str())),
            (GENERAL_TYPE, "adapter".into()),
            (ADAPTER_TYPE, "lora".into()),
            // With 0 the factors are multiplied as they are.
            (ALPHA, (one.unwrap_or(0.0) as f32).into()),
        ];
        if let Some(base) = set.base_model() {
            fields.extend([(BASES, 1_u32.into()), (BASE, base.into())]);
        }
        let fields = fields.into_iter().map(|(name, field)| (name.to_owned(), field)).collect();
        let mut new = Vec::new();
        for (name, layer, adapter) in &outgoing {
            let [a, b] = adapter.constant_factors();
            let ([d_input, d_output], rank) = (adapter.shape(), adapter.rank());
            let scale = if one.is_some() { 1.0 } else { adapter.scale() };
            let b = b.mul_scalar(scale);
            let (a_shape, is_table) = match name == TABLE {
                true => ([d_input, rank], true),
                false => ([rank, d_input], false),
            };
            let heads = family.heads(name);
            let finite = move |values: Vec<f32>| match values.iter().all(|it| it.is_finite()) {
                true => Ok(values.iter().flat_map(|it| it.to_le_bytes()).collect()),
                false => Err(LoraError::InvalidFile {
                    file: path.display().to_string(),
                    problem: format!("{} holds NaN or infinite values", named(layer)),
                }),
            };
            new.push(NewTensor {
                name: format!("{name}{A}"),
                shape: a_shape.into(),
                packing: Packing::F32,
                bytes: Box::new(move || {
                    let values = host(a);
                    finite(match is_table {
                        true => values,
                        false => transposed(&values, d_input, rank),
                    })
                }),
            });
            new.push(NewTensor {
                name: format!("{name}{B}"),
                shape: vec![d_output, rank],
                packing: Packing::F32,
                bytes: Box::new(move || {
                    let values = transposed(&host(b), rank, d_output);
                    finite(match heads {
                        Some(heads) => halves_to_pairs(&values, heads, d_output),
                        None => values,
                    })
                }),
            });
        }
        write(path, fields, new)
    }

    /// Reads a file of llama.cpp's adapters: one that [`save_gguf`](Self::save_gguf) wrote, or llama.cpp's own converter.
    /// Factors in any [`Packing`] are converted to the backend's default type.
    ///
    /// As in llama.cpp, tensors of norms are not [used](Self::unused).
    ///
    /// # Errors
    ///
    /// If the file cannot be read, is no file of adapters, or one of another family; if a factor is missing, does not fit
    /// the other one, is of a layer that the family does not name, or holds NaN or infinite values.
    /// [`LoraError::Unsupported`] if the adapters act from certain tokens on (aLoRA).
    pub fn load_gguf(
        path: impl AsRef<Path>,
        family: &Family,
        device: &Bk::Device,
    ) -> Result<Self, LoraError> {
        let path = path.as_ref();
        let file = path.display().to_string();
        let invalid = |problem| LoraError::InvalidFile { file: file.clone(), problem };
        let gguf = Gguf::open(path)?;
        let alpha = alpha(&gguf, family, &file)?;
        let (mut factors, mut unused) = (BTreeMap::<&str, [Option<&str>; 2]>::new(), Vec::new());
        for name in gguf.tensors.keys() {
            match (name.strip_suffix(A), name.strip_suffix(B)) {
                (Some(layer), _) => factors.entry(layer).or_default()[0] = Some(name),
                (_, Some(layer)) => factors.entry(layer).or_default()[1] = Some(name),
                _ if name.ends_with("_norm.weight") => unused.push(name.clone()),
                _ => {
                    let problem = format!("`{}` is no factor: `{A}` or `{B}`", shown(name));
                    return Err(invalid(format!("{problem} is expected at the end of its name")));
                }
            }
        }
        if factors.is_empty() {
            return Err(invalid("there is no adapter in it".to_owned()));
        }
        let mut adapters = Vec::new();
        for (layer, names) in factors {
            let [Some(a), Some(b)] = names else {
                let missing = if names[0].is_none() { A } else { B };
                return Err(invalid(format!("`{}{missing}` is missing", shown(layer))));
            };
            let adapter = adapter(&gguf, [a, b], layer, family, alpha, device);
            adapters.push(adapter.map_err(|error| match error {
                Wrong::File(error) => error,
                Wrong::Layer(problem) => invalid(format!("`{}{WEIGHT}`: {problem}", shown(layer))),
            })?);
        }
        let mut set = Self::new(adapters);
        set.unused = unused;
        Ok(match gguf.fields.get(BASE).and_then(|it| it.as_str()) {
            Some(base) => set.with_base_model(base),
            None => set,
        })
    }
}

/// Why an adapter cannot be read.
enum Wrong {
    File(LoraError),
    Layer(String),
}

/// The path of a layer and its adapter.
fn adapter<Bk: Backend>(
    gguf: &Gguf,
    [a, b]: [&str; 2],
    layer: &str,
    family: &Family,
    alpha: f64,
    device: &Bk::Device,
) -> Result<(String, LoraAdapter<Bk>), Wrong> {
    let path = family.names.find(layer).ok_or_else(|| {
        Wrong::Layer(format!("`{}` has no such layer that can be adapted", family.architecture))
    })?;
    let shape = |name: &str| match gguf.tensors[name].shape[..] {
        [rows, columns] => Ok([rows, columns]),
        ref other => Err(Wrong::Layer(format!("a factor has the shape {other:?}, not two sizes"))),
    };
    let (a_shape, [d_output, rank]) = (shape(a)?, shape(b)?);
    let is_table = layer == TABLE;
    let [a_rank, d_input] = if is_table { [a_shape[1], a_shape[0]] } else { a_shape };
    if a_rank != rank {
        return Err(Wrong::Layer(format!(
            "A is {a_shape:?} and B is {:?}, which do not agree on the rank",
            [d_output, rank]
        )));
    }
    let values = |name: &str| {
        let values = gguf.values(name).map_err(Wrong::File)?;
        match values.iter().all(|it| it.is_finite()) {
            true => Ok(values),
            false => Err(Wrong::Layer("a factor holds NaN or infinite values".to_owned())),
        }
    };
    let (mut a, mut b) = (values(a)?, values(b)?);
    if !is_table {
        a = transposed(&a, rank, d_input);
    }
    if let Some(heads) = family.heads(layer) {
        if !d_output.is_multiple_of(2 * heads) {
            return Err(Wrong::Layer(format!("{d_output} outputs are not {heads} heads")));
        }
        b = pairs_to_halves(&b, heads, d_output);
    }
    b = transposed(&b, d_output, rank);
    let tensor = |values, shape| Tensor::<Bk, 2>::from_data(TensorData::new(values, shape), device);
    let (a, b) = (tensor(a, [d_input, rank]), tensor(b, [rank, d_output]));
    // Without an alpha nothing is multiplied.
    let (alpha, scaling) = match alpha {
        0.0 => (1.0, Scaling::Alpha),
        alpha => (alpha, Scaling::AlphaOverRank),
    };
    let adapter = LoraAdapter::new(a, b, alpha, scaling);
    Ok((
        path,
        match is_table {
            // The head is another tensor.
            true => LoraAdapter { tie: Tie::Leaves, ..adapter.of_embedding() },
            false => adapter.of_linear(),
        },
    ))
}

/// The alpha of the file, if it is one of adapters of this family that can be used.
fn alpha(gguf: &Gguf, family: &Family, file: &str) -> Result<f64, LoraError> {
    let invalid = |problem| LoraError::InvalidFile { file: file.to_owned(), problem };
    let text = |name: &str| gguf.fields.get(name).and_then(|it| it.as_str());
    if text(GENERAL_TYPE) != Some("adapter") {
        let found = text(GENERAL_TYPE).unwrap_or("missing, as in a model");
        let found = format!("`{GENERAL_TYPE}` is {}", shown(found));
        return Err(invalid(format!("this is no file of adapters: {found}, not adapter")));
    }
    match text(ADAPTER_TYPE) {
        Some("lora") => {}
        other => {
            let found = shown(other.unwrap_or("missing"));
            return Err(invalid(format!("`{ADAPTER_TYPE}` is {found}; lora is expected")));
        }
    }
    if text(ARCHITECTURE) != Some(&family.architecture) {
        let (found, own) = (text(ARCHITECTURE).unwrap_or("missing"), &family.architecture);
        return Err(invalid(format!(
            "`{ARCHITECTURE}` is {}, and the model's is {own}: the adapters are for another model",
            shown(found)
        )));
    }
    if gguf.fields.contains_key(INVOCATION) {
        let reason = "its adapters act from certain tokens on (aLoRA)".to_owned();
        let (file, field) = (file.to_owned(), INVOCATION.to_owned());
        return Err(LoraError::Unsupported { file, field, reason: Some(reason) });
    }
    match gguf.fields.get(ALPHA) {
        None => Ok(0.0),
        Some(alpha) => alpha.as_f64().ok_or_else(|| {
            invalid(format!("`{ALPHA}` is {}; a number is expected", shown(&alpha.to_string())))
        }),
    }
}

/// The layers that are written: their names in the file, their paths and their adapters.
fn outgoing<'a, Bk: Backend>(
    set: &'a LoraAdapters<Bk>,
    family: &Family,
    file: &str,
) -> Result<Vec<(String, &'a str, &'a LoraAdapter<Bk>)>, LoraError> {
    let unsupported = |field: &str, reason: &str| LoraError::Unsupported {
        file: file.to_owned(),
        field: field.to_owned(),
        reason: Some(reason.to_owned()),
    };
    if set.is_empty() {
        return Err(unsupported("an empty set", "there is no adapter to save"));
    }
    let extras: Vec<_> = set.extras.keys().cloned().collect();
    if let Some(first) = extras.first() {
        let reason = format!(
            "the set has parameters that were trained in full ({}), for which llama.cpp's files have no place; merge \
             it into the model",
            quoted(&extras)
        );
        return Err(unsupported(first, &reason));
    }
    let names = family.names.inverse();
    let mut outgoing = Vec::new();
    for (path, adapter) in set.iter() {
        let name = names.find(path);
        let reason = match &adapter.layout {
            _ if adapter.magnitude.is_some() => {
                "llama.cpp's files have no place for DoRA's magnitudes; merge the set into the model, or `extract` \
                 adapters without magnitudes from the merged one"
            }
            _ if adapter.bias.is_some() => {
                "llama.cpp's files have no place for the adapter's bias; merge the set into the model"
            }
            WeightLayout::Conv { .. } | WeightLayout::ConvTranspose { .. } => {
                "llama.cpp has no adapters of convolutions; merge the set into the model"
            }
            WeightLayout::Unknown => {
                "it was put together by hand; say what it is for by `of_linear` or `of_embedding`, or put the set on \
                 its model and save `model.switch(&set)?.adapters()`"
            }
            _ if name.is_none() => {
                "the family has no name for it in llama.cpp's files; leave it out by `excludes`, or merge the set \
                 into the model"
            }
            _ if family.is_tied && is_head_or_table(name.as_deref()) => {
                "the table of embeddings is also the head, and llama.cpp ends with a failed assertion if an adapter \
                 is on it; leave it out by `excludes`, or merge the set into the model"
            }
            _ if name.as_deref() == Some(TABLE) && adapter.layout != WeightLayout::Embedding => {
                "it is an embedding in llama.cpp, and the adapter is one of a linear layer"
            }
            _ => {
                outgoing.extend(name.map(|name| (name, path, adapter)));
                continue;
            }
        };
        return Err(unsupported(path, reason));
    }
    Ok(outgoing)
}

fn is_head_or_table(name: Option<&str>) -> bool {
    name.is_some_and(|name| [TABLE, "output"].contains(&name))
}

/// The alpha which, divided by each rank, gives all scales.
fn common_alpha<Bk: Backend>(set: &LoraAdapters<Bk>) -> Option<f64> {
    let mut alphas = set.iter().map(|(_, it)| it.scale() * it.rank() as f64);
    let first = alphas.next()?;
    let is_same = |alpha: f64| (alpha - first).abs() <= 1e-9 * first.abs();
    // 0 would mean that nothing is multiplied.
    (first as f32 != 0.0 && first.is_finite() && alphas.all(is_same)).then_some(first)
}
