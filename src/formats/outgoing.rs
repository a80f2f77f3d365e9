//! Tensors on their way into a file of safetensors.

use std::{
    borrow::Cow,
    cell::Cell,
    collections::{BTreeMap, HashMap},
    path::Path,
};

use burn::tensor::{Tensor, backend::Backend};
use safetensors::{Dtype, View};

use crate::{
    adapter::{LoraAdapter, WeightLayout},
    error::LoraError,
};

/// The tensors of a file, by their keys. Their elements are copied to the host only when they are written,
/// so that the host does not hold all tensors at once.
pub(super) struct Outgoing<Bk: Backend> {
    tensors: BTreeMap<String, (Values<Bk>, Vec<usize>)>,
}

enum Values<Bk: Backend> {
    /// A factor. The file holds its transpose.
    Factor(Tensor<Bk, 2>),
    Flat(Tensor<Bk, 1>),
    Number(f64),
}

impl<Bk: Backend> Outgoing<Bk> {
    pub fn new() -> Self {
        Self { tensors: BTreeMap::new() }
    }

    /// Adds a factor, which has this shape in the file.
    pub fn factor(&mut self, key: String, factor: Tensor<Bk, 2>, shape: Vec<usize>) {
        self.tensors.insert(key, (Values::Factor(factor), shape));
    }

    /// Adds a tensor of this shape, by its elements.
    pub fn flat(&mut self, key: String, elements: Tensor<Bk, 1>, shape: Vec<usize>) {
        self.tensors.insert(key, (Values::Flat(elements), shape));
    }

    /// Adds a number, as a tensor without dimensions.
    pub fn number(&mut self, key: String, number: f64) {
        self.tensors.insert(key, (Values::Number(number), Vec::new()));
    }

    /// Writes the file at `path`. Errors in what is to be saved call it `file`.
    pub fn write(
        self,
        metadata: HashMap<String, String>,
        path: &Path,
        file: &Path,
    ) -> Result<(), LoraError> {
        self.store(file, |tensors| {
            let io = |error| LoraError::Io {
                path: path.to_owned(),
                source: std::io::Error::other(error),
            };
            safetensors::serialize_to_file(tensors, Some(metadata), path).map_err(io)
        })
    }

    /// What the file would hold, which errors call `file`.
    pub fn into_bytes(
        self,
        metadata: HashMap<String, String>,
        file: &Path,
    ) -> Result<Vec<u8>, LoraError> {
        self.store(file, |tensors| {
            safetensors::serialize(tensors, Some(metadata)).map_err(|error| {
                LoraError::InvalidFile {
                    file: file.display().to_string(),
                    problem: error.to_string(),
                }
            })
        })
    }

    fn store<R>(
        self,
        file: &Path,
        store: impl FnOnce(BTreeMap<String, Stored<'_, Bk>>) -> Result<R, LoraError>,
    ) -> Result<R, LoraError> {
        let not_finite = Cell::new(false);
        let tensors = self
            .tensors
            .into_iter()
            .map(|(key, (values, shape))| (key, Stored { values, shape, not_finite: &not_finite }));
        let stored = store(tensors.collect())?;
        if not_finite.get() {
            let problem = "the adapters hold NaN or infinite values; nothing was saved".to_owned();
            return Err(LoraError::InvalidFile { file: file.display().to_string(), problem });
        }
        Ok(stored)
    }
}

/// The shapes of A and B in a file, as PyTorch's layers have them: `[rank, d_input]` and `[d_output, rank]`, or those
/// of kernels.
pub(super) fn factor_shapes<Bk: Backend>(adapter: &LoraAdapter<Bk>) -> [Vec<usize>; 2] {
    let ([d_input, d_output], rank) = (adapter.shape(), adapter.rank());
    let (mut a, mut b) = (vec![rank, d_input], vec![d_output, rank]);
    if let WeightLayout::Conv { kernel, .. } = &adapter.layout {
        a[1] = d_input / kernel.iter().product::<usize>();
        a.extend(kernel);
        b.extend(vec![1; kernel.len()]);
    }
    [a, b]
}

/// The shape in which PEFT keeps the magnitudes: that of a convolution's output has the dimensions of an image.
pub(super) fn magnitude_shape<Bk: Backend>(adapter: &LoraAdapter<Bk>) -> Vec<usize> {
    let [_, d_output] = adapter.shape();
    match &adapter.layout {
        WeightLayout::Conv { kernel, .. } => [vec![1, d_output], vec![1; kernel.len()]].concat(),
        _ => vec![d_output],
    }
}

/// Whether all values are finite. A branch per element would take as long as reading the values.
pub(super) fn all_finite(values: &[f32]) -> bool {
    values.chunks(4096).all(|chunk| chunk.iter().fold(true, |all, it| all & it.is_finite()))
}

/// A tensor that is being written.
struct Stored<'a, Bk: Backend> {
    values: Values<Bk>,
    /// The shape in the file.
    shape: Vec<usize>,
    /// Whether an element of any tensor was not finite.
    not_finite: &'a Cell<bool>,
}

impl<Bk: Backend> View for Stored<'_, Bk> {
    /// A number is in `f64` where `f32` would round it.
    fn dtype(&self) -> Dtype {
        match self.values {
            Values::Number(number) if f64::from(number as f32) != number => Dtype::F64,
            _ => Dtype::F32,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let values = match &self.values {
            Values::Factor(tensor) => host(tensor.clone()),
            Values::Flat(tensor) => host(tensor.clone()),
            Values::Number(number) => {
                return Cow::Owned(match self.dtype() {
                    Dtype::F64 => number.to_le_bytes().to_vec(),
                    _ => (*number as f32).to_le_bytes().to_vec(),
                });
            }
        };
        if !all_finite(&values) {
            self.not_finite.set(true);
        }
        let mut bytes = vec![0; 4 * values.len()];
        let (slots, _) = bytes.as_chunks_mut::<4>();
        match &self.values {
            // The file's rows are the tensor's columns. Transposing here, in the cache, is many times
            // faster than reading a transposed tensor from a backend.
            Values::Factor(_) if !values.is_empty() => {
                let rows = self.shape[0];
                for (row, slots) in slots.chunks_mut(values.len() / rows).enumerate() {
                    for (slot, value) in slots.iter_mut().zip(values[row..].iter().step_by(rows)) {
                        *slot = value.to_le_bytes();
                    }
                }
            }
            _ => slots.iter_mut().zip(&values).for_each(|(slot, it)| *slot = it.to_le_bytes()),
        }
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype().bitsize() / 8
    }
}

pub(super) fn host<Bk: Backend, const D: usize>(tensor: Tensor<Bk, D>) -> Vec<f32> {
    // The product with 1 has the same bits and is not shared. burn-ndarray returns the memory of an
    // unshared tensor as it is, but reads a shared one element by element, which is ten times slower.
    let data = tensor.mul_scalar(1.0).into_data().convert::<f32>();
    data.into_vec().expect("the data was converted to this type")
}
