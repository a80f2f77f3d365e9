//! How the weights of a decoder are held in memory.

use std::{collections::BTreeMap, rc::Rc};

use burn::tensor::{DType, Tensor, TensorData, backend::Backend};
use burn_lora::quantize::{GgufType, Quantization, QuantizedWeight};
use burn_store::TensorSnapshot;

use super::{
    bitsandbytes,
    tensors::{Tensors, check_finite},
};
use crate::{
    error::{Context, Result},
    gguf::model,
    llama::LINEAR,
};

/// How the weights of a model are held in memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct Holding {
    /// What the linear layers are quantized to; they are not by default.
    pub quantize: Option<Quantization>,
    /// Matrices that are bf16 or f16 in the file stay so, unless they are quantized, in half the memory, and do not train.
    /// With bf16 this suits [`nn::Precision::Bf16`](burn_lora::nn::Precision::Bf16), which multiplies with their own
    /// numbers.
    pub keep_16_bits: bool,
}

/// A matrix that can be held as the files have it.
pub(super) enum Matrix {
    /// In a GGUF file.
    Gguf(model::Matrix),
    /// In 4 bits, in safetensors files.
    Nf4(Rc<bitsandbytes::Matrix>),
}

impl Matrix {
    fn has_16_bits(&self) -> bool {
        match self {
            Self::Gguf(matrix) => matrix.has_16_bits(),
            Self::Nf4(_) => false,
        }
    }

    fn read<B: Backend>(&self, device: &B::Device) -> Result<QuantizedWeight<B>> {
        match self {
            Self::Gguf(matrix) => matrix.read(device),
            Self::Nf4(matrix) => matrix.read(device),
        }
    }
}

/// Takes the weights that are quantized out of the tensors, by the paths of their layers. Returns the bytes of those in
/// 16 bits, too.
pub(super) fn quantized<B: Backend>(
    tensors: &mut Tensors,
    matrices: &BTreeMap<String, Matrix>,
    holding: Holding,
    device: &B::Device,
) -> Result<(BTreeMap<String, QuantizedWeight<B>>, usize)> {
    let (mut weights, mut bytes_in_16_bits) = (BTreeMap::new(), 0);
    let names: Vec<_> = tensors.keys().cloned().collect();
    for name in names {
        let Some(path) = name.strip_suffix(".weight") else { continue };
        // The table of embeddings, the head and the norms stay.
        let is_linear = path.rsplit('.').next().is_some_and(|it| LINEAR.contains(&it));
        let tensor = &tensors[&name];
        let to = holding.quantize.filter(|_| is_linear);
        let keeps = holding.keep_16_bits && to.is_none();
        let kind = match tensor.dtype {
            DType::BF16 => Some(GgufType::BF16),
            DType::F16 => Some(GgufType::F16),
            _ => None,
        };
        let kind = kind.filter(|_| keeps && tensor.shape.len() == 2);
        // What has 2 to 8 bits in the file is used as it is, and what has 16 only if that is wanted.
        let packed = matrices.get(&name).filter(|it| keeps || !it.has_16_bits());
        let (weight, in_16_bits) = match (packed, to, kind) {
            (Some(matrix), ..) => (matrix.read(device)?, matrix.has_16_bits()),
            (None, Some(to), _) => (rounded(&name, tensor, to, device)?, to == Quantization::Bf16),
            (None, None, Some(kind)) => (kept(&name, tensor, kind, device)?, true),
            (None, None, None) => continue,
        };
        bytes_in_16_bits += if in_16_bits { weight.num_bytes() } else { 0 };
        weights.insert(path.to_owned(), weight);
        tensors.remove(&name);
    }
    Ok((weights, bytes_in_16_bits))
}

/// A matrix of the file, rounded.
fn rounded<B: Backend>(
    name: &str,
    tensor: &TensorSnapshot,
    to: Quantization,
    device: &B::Device,
) -> Result<QuantizedWeight<B>> {
    let shape = tensor.shape.to_vec();
    if shape.len() != 2 || shape.contains(&0) {
        return Err(format!("`{name}`: {shape:?} is not the shape of a matrix"));
    }
    let data = tensor.to_data().context(format!("`{name}`"))?.convert::<f32>();
    let numbers = data.as_slice::<f32>().map_err(|error| format!("`{name}`: {error:?}"))?;
    check_finite(name, numbers)?;
    Ok(QuantizedWeight::new(Tensor::from_data(data, device), to))
}

/// A matrix of 16 bits as the file has it.
fn kept<B: Backend>(
    name: &str,
    tensor: &TensorSnapshot,
    kind: GgufType,
    device: &B::Device,
) -> Result<QuantizedWeight<B>> {
    let data = tensor.to_data().context(format!("`{name}`"))?;
    let shape = tensor.shape.dims();
    QuantizedWeight::from_gguf(kind, shape, data.as_bytes(), device)
        .map_err(|_| numbers_of(name, data))
}

/// What is wrong with a matrix that was refused.
fn numbers_of(name: &str, data: TensorData) -> String {
    let data = data.convert::<f32>();
    let problem = data.as_slice().map(|numbers| check_finite(name, numbers).err());
    problem.ok().flatten().unwrap_or_else(|| format!("`{name}`: it is not a matrix"))
}
