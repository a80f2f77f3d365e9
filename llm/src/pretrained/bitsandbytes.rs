//! Matrices in 4 bits as [bitsandbytes](https://github.com/bitsandbytes-foundation/bitsandbytes) writes them: the codes
//! under the name of the weight, and what they stand for under names that begin with it.

use std::rc::Rc;

use burn::{
    module::ParamId,
    tensor::{DType, TensorData, backend::Backend},
};
use burn_lora::quantize::QuantizedWeight;
use burn_store::{TensorSnapshot, TensorSnapshotError};
use serde::Deserialize;

use super::tensors::Tensors;
use crate::error::{Context, Result};

/// What the description of a matrix in NF4 is called, after the name of the weight.
const DESCRIPTION: &str = ".quant_state.bitsandbytes__nf4";

/// The numbers that share a scale.
const BLOCK: usize = 64;

/// A matrix in NF4. Its parts are read when they are needed.
pub(super) struct Matrix {
    name: String,
    shape: [usize; 2],
    codes: TensorSnapshot,
    /// What the 16 codes stand for.
    levels: TensorSnapshot,
    scales: Scales,
}

/// One scale for each block.
enum Scales {
    Full(TensorSnapshot),
    /// Quantized in turn.
    Doubled(Box<Doubled>),
}

/// A scale is a level times the scale of a group of them, plus the mean of all.
struct Doubled {
    codes: TensorSnapshot,
    levels: TensorSnapshot,
    of_groups: TensorSnapshot,
    group: usize,
    mean: f32,
}

/// The description of a matrix.
#[derive(Deserialize)]
struct Description {
    blocksize: usize,
    /// The type that the matrix had.
    dtype: String,
    shape: [usize; 2],
    nested_blocksize: Option<usize>,
    nested_offset: Option<f32>,
}

/// Takes the parts of the matrices in NF4 out of the tensors, and puts the matrices themselves there, which are unpacked
/// when they are read. Returns them packed, too, by their names.
///
/// # Errors
///
/// If there are matrices in other formats of bitsandbytes, or parts that are missing or do not fit.
pub(super) fn take(tensors: &mut Tensors) -> Result<Vec<(String, Rc<Matrix>)>> {
    refuse_others(tensors)?;
    let ends: Vec<_> = tensors.keys().filter_map(|name| name.strip_suffix(DESCRIPTION)).collect();
    let names: Vec<_> = ends.into_iter().map(str::to_owned).collect();
    let mut matrices = Vec::new();
    for name in names {
        let (matrix, dtype) = Matrix::take(&name, tensors).context(format!("`{name}`"))?;
        let matrix = Rc::new(matrix);
        tensors.insert(name.clone(), matrix.unpacked(dtype));
        matrices.push((name, matrix));
    }
    Ok(matrices)
}

/// Fails if there are matrices in formats that are not read.
fn refuse_others(tensors: &Tensors) -> Result<()> {
    for name in tensors.keys() {
        if let Some(name) = name.strip_suffix(".SCB") {
            return Err(format!(
                "`{name}.weight` has 8 bits of bitsandbytes, which are not read; give the model that it was made \
                 from, with `--quantize int8`"
            ));
        }
        if let Some((name, format)) = name.split_once(".quant_state.bitsandbytes__")
            && format != "nf4"
        {
            return Err(format!(
                "`{name}` is in bitsandbytes' {}, which is not read, only NF4 is; give the model that it was made \
                 from, with `--quantize nf4`",
                format.to_uppercase(),
            ));
        }
    }
    Ok(())
}

impl Matrix {
    fn take(name: &str, tensors: &mut Tensors) -> Result<(Self, DType)> {
        let mut part = |end: &str, dtype: DType| {
            let tensor = tensors.remove(&format!("{name}{end}"));
            let tensor = tensor.ok_or_else(|| format!("`{name}{end}` is missing"))?;
            match tensor.dtype == dtype {
                true => Ok(tensor),
                false => {
                    Err(format!("`{name}{end}` must be of type {dtype:?}, not {:?}", tensor.dtype))
                }
            }
        };
        let description = read(&part(DESCRIPTION, DType::U8)?)?;
        let Description { blocksize, dtype, shape, nested_blocksize, nested_offset } =
            serde_json::from_slice(description.as_bytes()).context("its description")?;
        if blocksize != BLOCK {
            return Err(format!(
                "blocks of {blocksize} numbers are not supported, only of {BLOCK}"
            ));
        }
        let dtype = match dtype.as_str() {
            "float32" => DType::F32,
            "float16" => DType::F16,
            "bfloat16" => DType::BF16,
            other => return Err(format!("`dtype` \"{other}\" is not supported")),
        };
        let scales = match (nested_blocksize, nested_offset) {
            (None, None) => Scales::Full(part(".absmax", DType::F32)?),
            (Some(group), Some(mean)) if group > 0 => Scales::Doubled(Box::new(Doubled {
                codes: part(".absmax", DType::U8)?,
                levels: part(".nested_quant_map", DType::F32)?,
                of_groups: part(".nested_absmax", DType::F32)?,
                group,
                mean,
            })),
            _ => return Err("its scales are described in part, or in groups of 0".to_owned()),
        };
        let levels = part(".quant_map", DType::F32)?;
        let matrix =
            Self { name: name.to_owned(), shape, codes: part("", DType::U8)?, levels, scales };
        matrix.check_sizes()?;
        Ok((matrix, dtype))
    }

    /// Checks that the parts have the sizes that follow from the shape.
    fn check_sizes(&self) -> Result<()> {
        let [rows, columns] = self.shape;
        let numbers = rows.checked_mul(columns).filter(|it| *it > 0);
        let numbers = numbers.ok_or_else(|| format!("its shape is {:?}", self.shape))?;
        let blocks = numbers.div_ceil(BLOCK);
        let mut parts = vec![(&self.codes, numbers.div_ceil(2)), (&self.levels, 16)];
        match &self.scales {
            Scales::Full(scales) => parts.push((scales, blocks)),
            Scales::Doubled(doubled) => {
                let Doubled { codes, levels, of_groups, group, .. } = &**doubled;
                parts.extend([
                    (codes, blocks),
                    (levels, 256),
                    (of_groups, blocks.div_ceil(*group)),
                ]);
            }
        }
        for (part, expected) in parts {
            let found = part.shape.num_elements();
            if found != expected {
                let part = part.full_path();
                return Err(format!("`{part}` must have {expected} numbers, and has {found}"));
            }
        }
        Ok(())
    }

    /// Whether its rows are whole blocks.
    pub fn has_whole_blocks(&self) -> bool {
        self.shape[1].is_multiple_of(BLOCK)
    }

    /// Reads the matrix as it is. Its rows must be whole blocks.
    ///
    /// # Errors
    ///
    /// If a file cannot be read, the levels are not those of NF4, or a scale is not finite.
    pub fn read<B: Backend>(&self, device: &B::Device) -> Result<QuantizedWeight<B>> {
        let (codes, levels) = (read(&self.codes)?, floats(&self.levels)?);
        QuantizedWeight::from_nf4(
            self.shape,
            &levels,
            codes.as_bytes(),
            self.scales.read()?,
            device,
        )
        .context(format!("`{}`", self.name))
    }

    /// The numbers, row by row.
    fn numbers(&self) -> Result<Vec<f32>> {
        let (codes, levels, scales) =
            (read(&self.codes)?, floats(&self.levels)?, self.scales.read()?);
        let codes = codes.as_bytes().iter().flat_map(|byte| [byte >> 4, byte & 15]);
        let numbers =
            codes.enumerate().map(|(at, code)| levels[usize::from(code)] * scales[at / BLOCK]);
        Ok(numbers.take(self.shape[0] * self.shape[1]).collect())
    }

    /// The matrix as a tensor of the type that it had.
    fn unpacked(self: &Rc<Self>, dtype: DType) -> TensorSnapshot {
        let (matrix, shape) = (self.clone(), self.shape);
        let values = move || {
            let numbers = matrix.numbers().map_err(TensorSnapshotError::DataError)?;
            Ok(TensorData::new(numbers, shape).convert_dtype(dtype))
        };
        let (path, containers) = (vec![self.name.clone()], Vec::new());
        let (values, id) = (Rc::new(values), ParamId::new());
        TensorSnapshot::from_closure(values, dtype, shape.into(), path, containers, id)
    }
}

impl Scales {
    fn read(&self) -> Result<Vec<f32>> {
        match self {
            Self::Full(scales) => floats(scales),
            Self::Doubled(doubled) => {
                let Doubled { codes, levels, of_groups, group, mean } = &**doubled;
                let (codes, levels, of_groups) =
                    (read(codes)?, floats(levels)?, floats(of_groups)?);
                let groups = codes.as_bytes().chunks(*group).zip(of_groups);
                let scales = groups.flat_map(|(codes, scale)| {
                    let levels = &levels;
                    codes.iter().map(move |&code| levels[usize::from(code)] * scale + mean)
                });
                Ok(scales.collect())
            }
        }
    }
}

fn read(tensor: &TensorSnapshot) -> Result<TensorData> {
    tensor.to_data().context(format!("`{}`", tensor.full_path()))
}

fn floats(tensor: &TensorSnapshot) -> Result<Vec<f32>> {
    let data = read(tensor)?;
    data.into_vec().map_err(|error| format!("`{}`: {error:?}", tensor.full_path()))
}
