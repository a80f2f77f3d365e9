//! Writes adapters for llama.cpp.

use std::path::Path;

use burn::tensor::backend::Backend;

use super::{
    super::{outgoing::host, tensors::transposed},
    A, ADAPTER_TYPE, ALPHA, ARCHITECTURE, B, BASE, BASES, Family, GENERAL_TYPE, TABLE,
};
use crate::{
    adapter::{LoraAdapter, WeightLayout},
    adapters::LoraAdapters,
    error::{LoraError, quoted},
    gguf_file::{Field, NewTensor, Packing, halves_to_pairs, write},
};

impl<Bk: Backend> LoraAdapters<Bk> {
    /// Writes the adapters as a file that llama.cpp loads (`--lora FILE`), and Ollama (`ADAPTER FILE`), in `f32`.
    ///
    /// llama.cpp divides one alpha by the rank of each layer. If the scales of all layers are such, that alpha is
    /// written, also for rsLoRA ([`Scaling::AlphaOverSqrtRank`](crate::Scaling::AlphaOverSqrtRank)); otherwise each
    /// layer's scale is multiplied into its B.
    ///
    /// # Errors
    ///
    /// [`LoraError::Unsupported`] if such files have no place for something in the set: magnitudes (DoRA), biases,
    /// modules that were trained in full, convolutions, layers that the family does not name, an embedding that is also
    /// the head. If a factor is not finite, or the file cannot be written. An old file then stays as it was.
    pub fn save_gguf(&self, path: impl AsRef<Path>, family: &Family) -> Result<(), LoraError> {
        let path = path.as_ref();
        let set = self.standalone();
        let layers = layers(&set, family, &path.display().to_string())?;
        let alpha = common_alpha(&set);
        let mut fields = vec![
            (ARCHITECTURE, Field::from(family.architecture.as_str())),
            (GENERAL_TYPE, "adapter".into()),
            (ADAPTER_TYPE, "lora".into()),
            // With 0 the factors are multiplied as they are.
            (ALPHA, (alpha.unwrap_or(0.0) as f32).into()),
        ];
        if let Some(base) = set.base_model() {
            fields.extend([(BASES, 1_u32.into()), (BASE, base.into())]);
        }
        let fields = fields.into_iter().map(|(name, field)| (name.to_owned(), field)).collect();
        let factors = layers.iter().flat_map(|it| it.factors(alpha.is_none(), path));
        write(path, fields, factors.collect())
    }
}

/// A layer that is written.
struct Layer<'a, Bk: Backend> {
    /// Its name in the file.
    name: String,
    path: &'a str,
    adapter: &'a LoraAdapter<Bk>,
    /// The number of heads whose pairs of rows are next to each other in the file.
    heads: Option<usize>,
}

impl<Bk: Backend> Layer<'_, Bk> {
    /// A and B as the file at `path` has them, with the scale in B or without it.
    fn factors<'f>(&'f self, is_scaled: bool, path: &'f Path) -> [NewTensor<'f>; 2] {
        let [a, b] = self.adapter.constant_factors();
        let ([d_input, d_output], rank) = (self.adapter.shape(), self.adapter.rank());
        let scale = if is_scaled { self.adapter.scale() } else { 1.0 };
        let is_table = self.name == TABLE;
        let a_shape = if is_table { [d_input, rank] } else { [rank, d_input] };
        let a_rows = move || match is_table {
            true => host(a),
            false => transposed(&host(a), d_input, rank),
        };
        let b_rows = move || {
            let rows = transposed(&host(b.mul_scalar(scale)), rank, d_output);
            match self.heads {
                Some(heads) => halves_to_pairs(&rows, heads, d_output),
                None => rows,
            }
        };
        [self.factor(A, a_shape, a_rows, path), self.factor(B, [d_output, rank], b_rows, path)]
    }

    fn factor<'f>(
        &'f self,
        end: &str,
        shape: [usize; 2],
        rows: impl FnOnce() -> Vec<f32> + 'f,
        path: &'f Path,
    ) -> NewTensor<'f> {
        let bytes = move || {
            let rows = rows();
            match rows.iter().all(|it| it.is_finite()) {
                true => Ok(Packing::F32.pack(&rows).expect("it can be written")),
                false => Err(LoraError::InvalidFile {
                    file: path.display().to_string(),
                    problem: format!("`{}` holds NaN or infinite values", self.path),
                }),
            }
        };
        NewTensor {
            name: format!("{}{end}", self.name),
            shape: shape.into(),
            packing: Packing::F32,
            bytes: Box::new(bytes),
        }
    }
}

/// The layers that are written.
fn layers<'a, Bk: Backend>(
    set: &'a LoraAdapters<Bk>,
    family: &Family,
    file: &str,
) -> Result<Vec<Layer<'a, Bk>>, LoraError> {
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
    let mut layers = Vec::new();
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
            _ if name.as_ref().is_some_and(|it| !family.fits(it, adapter.shape()[1])) => {
                "its outputs cannot be divided into the family's heads; the family is of another model"
            }
            _ => {
                layers.extend(name.map(|name| {
                    let heads = family.heads(&name);
                    Layer { name, path, adapter, heads }
                }));
                continue;
            }
        };
        return Err(unsupported(path, reason));
    }
    Ok(layers)
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
