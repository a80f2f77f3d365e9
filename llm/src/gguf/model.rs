//! A decoder in a GGUF file, as Hugging Face would have it: the same names, sizes and order of values.

use std::{collections::BTreeMap, path::Path, rc::Rc};

use burn::{
    module::ParamId,
    tensor::{DType, TensorData, backend::Backend},
};
use burn_lora::{
    gguf::{Gguf, Packing, pairs_to_halves},
    quantize::{GgufType, QuantizedWeight},
};

use super::{
    architecture::renamed,
    config::{DIVISORS, POSITIONS, architecture, config, values},
    open,
};
use crate::config::LlamaConfig;
use burn_store::{TensorSnapshot, TensorSnapshotError};

/// The configuration and the tensors of a decoder.
pub struct Model {
    /// The sizes.
    pub config: LlamaConfig,
    /// The tensors that are not quantized, by the paths of the parameters.
    pub tensors: BTreeMap<String, TensorSnapshot>,
    /// The matrices whose numbers have 2 to 8 bits, or 16. They are among the tensors, too.
    pub matrices: BTreeMap<String, Matrix>,
    /// How the values of each tensor are packed.
    pub packings: BTreeMap<String, Packing>,
    /// The name of each tensor in the file.
    pub names: BTreeMap<String, String>,
}

/// A matrix whose numbers have 2 to 8 bits, or 16.
pub struct Matrix {
    file: Rc<Gguf>,
    name: String,
    kind: GgufType,
    shape: [usize; 2],
    /// The number of heads, if its rows are in GGUF's own order.
    heads: Option<usize>,
}

impl Matrix {
    /// Whether its numbers have 16 bits.
    pub fn has_16_bits(&self) -> bool {
        matches!(self.kind, GgufType::BF16 | GgufType::F16)
    }

    /// Reads the matrix as it is.
    ///
    /// # Errors
    ///
    /// If the file cannot be read, or a scale in it, or a number of 16 bits, is not finite.
    pub fn read<B: Backend>(&self, device: &B::Device) -> Result<QuantizedWeight<B>, String> {
        let mut bytes = self.file.bytes(&self.name).map_err(|error| error.to_string())?;
        if let Some(heads) = self.heads {
            bytes = pairs_to_halves(&bytes, heads, self.shape[0]);
        }
        QuantizedWeight::from_gguf(self.kind, self.shape, &bytes, device)
            .map_err(|error| format!("`{}`: {error}", self.name))
    }
}

/// Reads a GGUF file. The values of its tensors are read when they are needed.
///
/// # Errors
///
/// If the file cannot be read, or describes a model that the decoder is not.
pub fn read(path: &Path) -> Result<Model, String> {
    let file = open(path)?;
    let told = |problem: String| format!("{}: {problem}", path.display());
    let family = architecture(&file).map_err(told)?;
    let divisors = match file.tensors.contains_key(DIVISORS) {
        true => Some(values(&file, DIVISORS)?),
        false => None,
    };
    let config = LlamaConfig::from_json(config(&file).map_err(told)?).map_err(told)?;
    let config = config.with_divided_frequencies(divisors.as_deref()).map_err(told)?;
    let head_dim = config.head_dim();
    let (file, modules) = (Rc::new(file), family.modules());
    let (mut tensors, mut matrices) = (BTreeMap::new(), BTreeMap::new());
    let (mut packings, mut names) = (BTreeMap::new(), BTreeMap::new());
    for (name, tensor) in &file.tensors {
        if POSITIONS.contains(&name.as_str()) {
            continue;
        }
        let new_name = renamed(name, &modules);
        // What is added to a number there is not at Hugging Face.
        let added = if family.adds_one(name) { 1.0 } else { 0.0 };
        let heads = family.heads(&config, &new_name);
        let rows = tensor.shape.first().copied().unwrap_or(0);
        if let Some(expected) = heads.map(|it| it.saturating_mul(head_dim))
            && rows != expected
        {
            return Err(told(format!(
                "`{name}` must have {expected} rows by the heads in its fields, and has {rows}"
            )));
        }
        packings.insert(new_name.clone(), tensor.packing);
        names.insert(new_name.clone(), name.clone());
        let shape = tensor.shape.clone();
        if let (Some(kind), &[rows, columns]) = (tensor.packing.held(), &shape[..]) {
            let (file, name) = (file.clone(), name.clone());
            let matrix = Matrix { file, name, kind, shape: [rows, columns], heads };
            matrices.insert(new_name.clone(), matrix);
        }
        let (file, name) = (file.clone(), name.clone());
        let values = {
            let shape = shape.clone();
            move || {
                let mut values = values(&file, &name).map_err(TensorSnapshotError::IoError)?;
                if let Some(heads) = heads {
                    values = pairs_to_halves(&values, heads, shape[0]);
                }
                values.iter_mut().for_each(|it| *it -= added);
                Ok(TensorData::new(values, shape.clone()))
            }
        };
        let (path, containers) = (vec![new_name.clone()], Vec::new());
        let (values, id) = (Rc::new(values), ParamId::new());
        let tensor =
            TensorSnapshot::from_closure(values, DType::F32, shape.into(), path, containers, id);
        tensors.insert(new_name, tensor);
    }
    Ok(Model { config, tensors, matrices, packings, names })
}
