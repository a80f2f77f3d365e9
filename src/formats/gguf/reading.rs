//! Reads adapters of llama.cpp.

use std::{collections::BTreeMap, path::Path};

use burn::tensor::{Tensor, TensorData, backend::Backend};

use super::{
    super::tensors::transposed, A, ADAPTER_TYPE, ALPHA, ARCHITECTURE, B, BASE, BASE_ADDRESS,
    Family, GENERAL_TYPE, HUB, INVOCATION, TABLE, WEIGHT,
};
use crate::{
    adapter::{LoraAdapter, Tie},
    adapters::LoraAdapters,
    config::Scaling,
    error::{LoraError, shown},
    gguf_file::{Gguf, pairs_to_halves},
};

impl<Bk: Backend> LoraAdapters<Bk> {
    /// Reads a file of llama.cpp's adapters: one that [`save_gguf`](Self::save_gguf) wrote, or llama.cpp's own converter.
    /// Factors in any [`Packing`](crate::gguf::Packing) are converted to the backend's default type.
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
        let text = |name| gguf.fields.get(name).and_then(|it| it.as_str());
        // llama.cpp's converter has a title as the name.
        let hub = text(BASE_ADDRESS).and_then(|it| it.strip_prefix(HUB));
        Ok(match hub.or(text(BASE)) {
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
        if !family.fits(layer, d_output) {
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
            // The head is another tensor, or the same in llama.cpp, too.
            true => {
                let tie = if family.is_tied { Tie::Moves } else { Tie::Leaves };
                LoraAdapter { tie, ..adapter.of_embedding() }
            }
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
