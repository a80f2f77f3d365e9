//! Weights that are held in 4 or 8 bits, and their formats. `crate::products` multiplies with them.

mod doubled;
mod format;
mod pack;
mod record;
mod weight;
mod words;

use std::fmt;

use burn::{
    module::{Content, ModuleDisplay, ModuleDisplayDefault},
    tensor::{
        DType, ElementConversion, Int, Tensor, TensorData,
        backend::{AutodiffBackend, Backend},
    },
};

use crate::error::LoraError;
use half::f16;
use pack::{Packed, pack};
use words::{bytes, to_words};

pub(crate) use doubled::{Doubled, unpack as unpack_scales};
pub(crate) use format::{APART, Format, Levels};
pub use pack::Quantization;
pub use record::QuantizedWeightItem;
pub(crate) use weight::Weight;

/// A matrix `[rows, columns]` in 4 or 8 bits: the base's weight in a quantized
/// [`LoraLinear`](crate::LoraLinear) or [`LoraEmbedding`](crate::nn::LoraEmbedding).
///
/// The numbers of a row are divided into blocks, which share a scale. A row holds what one output of a
/// linear layer is computed from, as in PyTorch: the shape is `[d_output, d_input]`. Of a table of
/// embeddings it is a row, `[n_embedding, d_model]`.
///
/// The matrix is a constant: nothing of it trains, and visitors of a model do not see it.
#[derive(Clone, Debug)]
pub struct QuantizedWeight<B: Backend> {
    pub(crate) format: Format,
    pub(crate) columns: usize,
    /// The bytes of the codes, four in each word: `[rows, words]`.
    pub(crate) codes: Tensor<B, 2, Int>,
    pub(crate) scales: Scales<B>,
    /// The smallest number of each block, in some formats: `[rows, blocks]`.
    pub(crate) minima: Option<Tensor<B, 2>>,
}

/// The scales of all blocks.
#[derive(Clone, Debug)]
pub(crate) enum Scales<B: Backend> {
    /// `[rows, blocks]`.
    Full(Tensor<B, 2>),
    /// Quantized in turn.
    Doubled(Doubled<B>),
}

/// How a GGUF file holds a matrix. The names are the file's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[allow(non_camel_case_types, reason = "these are the names that GGUF's users know")]
pub enum GgufType {
    /// 8 bits.
    Q8_0,
    /// 4 bits, around zero.
    Q4_0,
    /// 4 bits, from the smallest number of each block on.
    Q4_1,
}

impl<B: Backend> QuantizedWeight<B> {
    /// Rounds a matrix `[rows, columns]`, in blocks along its rows.
    ///
    /// # Panics
    ///
    /// If a number is not finite, or there is none.
    pub fn new(matrix: Tensor<B, 2>, to: Quantization) -> Self {
        let (shape, device) = (matrix.dims(), matrix.device());
        assert!(!shape.contains(&0), "the matrix must not be empty, got {shape:?}");
        let numbers = host(matrix);
        assert!(numbers.iter().all(|it| it.is_finite()), "the matrix must be finite");
        Self::on_device(pack(&numbers, shape, to), to == Quantization::Nf4, &device)
    }

    /// A matrix as a GGUF file holds it, to the bit: `data` are the bytes of its rows, one after the other.
    ///
    /// # Errors
    ///
    /// [`LoraError::InvalidFile`] if the length of `data` is not that of so many rows, if the columns are
    /// no whole blocks of 32, or if a scale is not finite.
    pub fn from_gguf(
        kind: GgufType,
        shape: [usize; 2],
        data: &[u8],
        device: &B::Device,
    ) -> Result<Self, LoraError> {
        let (format, head) = match kind {
            GgufType::Q8_0 => (Format::Q8_0, 2),
            GgufType::Q4_0 => (Format::Q4_0, 2),
            GgufType::Q4_1 => (Format::Q4_1, 4),
        };
        let [rows, columns] = shape;
        let invalid = |problem: String| LoraError::InvalidFile {
            file: format!("a matrix of {kind:?}"),
            problem,
        };
        if columns == 0 || !columns.is_multiple_of(format.block()) {
            let block = format.block();
            return Err(invalid(format!("{columns} columns are no blocks of {block}")));
        }
        let size = head + format.block_bytes();
        let row = (columns / format.block()).checked_mul(size);
        let expected = row.and_then(|row| row.checked_mul(rows));
        if rows == 0 || expected != Some(data.len()) {
            let found = data.len();
            return Err(invalid(format!("{found} bytes cannot be {rows} x {columns} numbers")));
        }
        let mut bytes = Vec::with_capacity(rows * format.row_bytes(columns));
        let (mut scales, mut minima) = (Vec::new(), Vec::new());
        for block in data.chunks_exact(size) {
            let (numbers, codes) = block.split_at(head);
            let mut numbers =
                numbers.chunks_exact(2).map(|it| f16::from_le_bytes([it[0], it[1]]).to_f32());
            scales.extend(numbers.next());
            minima.extend(numbers.next());
            // The file's are signed, and ours are counted from -128.
            let flip = if format.bits() == 8 { 128 } else { 0 };
            bytes.extend(codes.iter().map(|code| code ^ flip));
        }
        if scales.iter().chain(&minima).any(|it| !it.is_finite()) {
            return Err(invalid("a scale is not finite".to_owned()));
        }
        let minima = (head == 4).then_some(minima);
        Ok(Self::on_device(Packed { format, shape, bytes, scales, minima }, false, device))
    }

    fn on_device(packed: Packed, doubles: bool, device: &B::Device) -> Self {
        let Packed { format, shape: [rows, columns], bytes, scales, minima } = packed;
        let blocks = columns.div_ceil(format.block());
        let numbers = |numbers: Vec<f32>| {
            Tensor::from_data(TensorData::new(numbers, [rows, blocks]), (device, DType::F32))
        };
        let scales = match doubles {
            true => Scales::Doubled(Doubled::new(&scales, device)),
            false => Scales::Full(numbers(scales)),
        };
        Self {
            format,
            columns,
            codes: to_words(&bytes, [rows, format.row_bytes(columns) / 4], device),
            scales,
            minima: minima.map(numbers),
        }
    }

    /// The shape, `[rows, columns]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.codes.dims()[0], self.columns]
    }

    /// The bytes that the matrix takes.
    pub fn num_bytes(&self) -> usize {
        let size = |dims: &[usize]| 4 * dims.iter().product::<usize>();
        let scales = match &self.scales {
            Scales::Full(scales) => size(&scales.dims()),
            Scales::Doubled(Doubled { codes, scales, .. }) => {
                size(&codes.dims()) + size(&scales.dims())
            }
        };
        size(&self.codes.dims()) + scales + self.minima.as_ref().map_or(0, |it| size(&it.dims()))
    }

    /// The tensors that hold it, and what else it takes to read them, to tell it from others.
    pub(crate) fn to_data(&self) -> (Vec<TensorData>, impl fmt::Debug) {
        let mut tensors = vec![self.codes.to_data()];
        let mut offset = None;
        match &self.scales {
            Scales::Full(scales) => tensors.push(scales.to_data()),
            Scales::Doubled(doubled) => {
                tensors.extend([doubled.codes.to_data(), doubled.scales.to_data()]);
                offset = Some(doubled.offset);
            }
        }
        tensors.extend(self.minima.as_ref().map(Tensor::to_data));
        (tensors, (self.format, offset))
    }

    /// The numbers that the codes stand for, in `f32`, by Burn's operations: `[rows, columns]`.
    pub(crate) fn unpacked(&self) -> Tensor<B, 2> {
        let ([rows, words], device) = (self.codes.dims(), self.codes.device());
        let codes = bytes(self.codes.clone().reshape([rows * words]));
        let codes = match self.format.bits() {
            8 => codes,
            _ => {
                let codes = codes.reshape([rows * words * 4 / APART, APART]);
                let lower = codes.clone().bitwise_and_scalar(15.elem());
                let upper = codes.bitwise_right_shift_scalar(4.elem());
                Tensor::cat(vec![lower, upper], 1).reshape([rows * words * 8])
            }
        };
        let numbers = match self.format.levels() {
            Levels::Minus(zero) => codes.float().cast(DType::F32) - f32::from(zero),
            Levels::Of(levels) => {
                let levels = TensorData::new(levels.to_vec(), [levels.len()]);
                Tensor::<B, 1>::from_data(levels, (&device, DType::F32)).select(0, codes)
            }
        };
        let block = self.format.block();
        let blocks = self.columns.div_ceil(block);
        let mut numbers =
            numbers.reshape([rows, blocks, block]) * self.scales().reshape([rows, blocks, 1]);
        if let Some(minima) = &self.minima {
            numbers = numbers + minima.clone().reshape([rows, blocks, 1]);
        }
        numbers.reshape([rows, blocks * block]).narrow(1, 0, self.columns)
    }

    /// The scales, not quantized: `[rows, blocks]`.
    fn scales(&self) -> Tensor<B, 2> {
        let blocks = self.columns.div_ceil(self.format.block());
        match &self.scales {
            Scales::Full(scales) => scales.clone(),
            Scales::Doubled(doubled) => doubled.dense().reshape([self.shape()[0], blocks]),
        }
    }

    /// The rows with these numbers, as a matrix.
    pub(crate) fn select(&self, rows: Tensor<B, 1, Int>) -> Self {
        Self {
            format: self.format,
            columns: self.columns,
            codes: self.codes.clone().select(0, rows.clone()),
            scales: Scales::Full(self.scales().select(0, rows.clone())),
            minima: self.minima.clone().map(|it| it.select(0, rows)),
        }
    }

    pub(crate) fn device(&self) -> B::Device {
        self.codes.device()
    }

    pub(crate) fn to_device(&self, device: &B::Device) -> Self {
        self.clone().carried(|float| float.to_device(device), |int| int.to_device(device))
    }

    /// The same with its tensors carried elsewhere, to another backend perhaps.
    pub(crate) fn carried<Other: Backend>(
        self,
        float: impl Fn(Tensor<B, 2>) -> Tensor<Other, 2>,
        int: impl Fn(Tensor<B, 2, Int>) -> Tensor<Other, 2, Int>,
    ) -> QuantizedWeight<Other> {
        let scales = match self.scales {
            Scales::Full(scales) => Scales::Full(float(scales)),
            Scales::Doubled(Doubled { codes, scales, offset }) => {
                Scales::Doubled(Doubled { codes: int(codes), scales: float(scales), offset })
            }
        };
        QuantizedWeight {
            format: self.format,
            columns: self.columns,
            codes: int(self.codes),
            scales,
            minima: self.minima.map(float),
        }
    }
}

impl<B: AutodiffBackend> QuantizedWeight<B> {
    pub(crate) fn valid(&self) -> QuantizedWeight<B::InnerBackend> {
        self.clone().carried(Tensor::inner, Tensor::inner)
    }

    pub(crate) fn from_inner(inner: QuantizedWeight<B::InnerBackend>) -> Self {
        inner.carried(Tensor::from_inner, Tensor::from_inner)
    }
}

/// Its shape and how it is held.
impl<B: Backend> fmt::Display for QuantizedWeight<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [rows, columns] = self.shape();
        write!(f, "{rows} x {columns}, {:?}", self.format)
    }
}

impl<B: Backend> ModuleDisplayDefault for QuantizedWeight<B> {
    fn content(&self, content: Content) -> Option<Content> {
        content.add_single(&self.to_string()).optional()
    }
}

impl<B: Backend> ModuleDisplay for QuantizedWeight<B> {}

/// The numbers of a matrix in the memory of the host, row by row.
fn host<B: Backend>(matrix: Tensor<B, 2>) -> Vec<f32> {
    matrix.into_data().convert::<f32>().into_vec().expect("it was converted")
}
