//! Weights that are held in 2 to 8 or 16 bits, and their formats. `crate::products` multiplies with them.

mod blocks;
mod doubled;
mod format;
mod gguf;
mod halves;
mod nf4;
mod pack;
mod record;
mod rounding;
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

use pack::{Packed, pack};
use words::{bytes, halves, of_bf16, of_f16, to_words};

pub(crate) use doubled::{Doubled, unpack as unpack_scales};
pub(crate) use format::{APART, Format, Levels};
pub use gguf::GgufType;
pub use pack::Quantization;
pub use record::QuantizedWeightItem;
pub(crate) use weight::{Matrix, Weight};

/// A matrix `[rows, columns]` in 2 to 8 or 16 bits: the base's weight in a quantized
/// [`LoraLinear`](crate::LoraLinear) or [`LoraEmbedding`](crate::nn::LoraEmbedding).
///
/// The numbers of a row are divided into blocks, which share a scale, but for bf16 and f16. A row holds what one output of a
/// linear layer is computed from, as in PyTorch: the shape is `[d_output, d_input]`. Of a table of
/// embeddings it is a row, `[n_embedding, d_model]`.
///
/// The matrix is a constant: nothing of it trains, and visitors of a model do not see it.
#[derive(Clone, Debug)]
pub struct QuantizedWeight<B: Backend> {
    pub(crate) format: Format,
    pub(crate) columns: usize,
    /// The bytes of the codes, four in each word, with the scales among them in some formats: `[rows, words]`.
    pub(crate) codes: Tensor<B, 2, Int>,
    pub(crate) scales: Scales<B>,
    /// The smallest number of each block, in some formats, unless they are halves: `[rows, blocks]`.
    pub(crate) minima: Option<Tensor<B, 2>>,
}

/// The scales of all blocks.
#[derive(Clone, Debug)]
pub(crate) enum Scales<B: Backend> {
    /// The format has none, or they are among the codes.
    None,
    /// `[rows, blocks]`.
    Full(Tensor<B, 2>),
    /// In half precision, two in each word. After the scales of a row come its smallest numbers, if the format has them:
    /// `[rows, words]`.
    Halves(Tensor<B, 2, Int>),
    /// Quantized in turn.
    Doubled(Doubled<B>),
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

    fn on_device(packed: Packed, doubles: bool, device: &B::Device) -> Self {
        let Packed { format, shape: [rows, columns], bytes, scales, minima } = packed;
        let blocks = columns.div_ceil(format.block());
        let numbers = |numbers: Vec<f32>| {
            Tensor::from_data(TensorData::new(numbers, [rows, blocks]), (device, DType::F32))
        };
        let scales = match doubles {
            _ if scales.is_empty() => Scales::None,
            true => Scales::Doubled(Doubled::new(&scales, device)),
            false => Scales::Full(numbers(scales)),
        };
        Self {
            format,
            columns,
            codes: to_words(&bytes, [rows, format.row_bytes(columns) / words::SIZE], device),
            scales,
            minima: minima.map(numbers),
        }
    }

    /// The shape, `[rows, columns]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.codes.dims()[0], self.columns]
    }

    /// Whether its numbers have 16 bits each: bf16 or f16. All others have at most 8.
    pub fn has_16_bits(&self) -> bool {
        matches!(self.format.levels(), Levels::Upper | Levels::Half)
    }

    /// The bytes that the matrix takes.
    pub fn num_bytes(&self) -> usize {
        let size = |dims: &[usize]| 4 * dims.iter().product::<usize>();
        let scales = match &self.scales {
            Scales::None => 0,
            Scales::Full(scales) => size(&scales.dims()),
            Scales::Halves(halves) => size(&halves.dims()),
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
            Scales::None => {}
            Scales::Full(scales) => tensors.push(scales.to_data()),
            Scales::Halves(halves) => tensors.push(halves.to_data()),
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
        let codes = || {
            let codes = bytes(self.codes.clone().reshape([rows * words]));
            if !self.format.packs_two() {
                return codes;
            }
            let codes = codes.reshape([rows * words * 4 / APART, APART]);
            let lower = codes.clone().bitwise_and_scalar(15.elem());
            let upper = codes.bitwise_right_shift_scalar(4.elem());
            Tensor::cat(vec![lower, upper], 1).reshape([rows * words * 8])
        };
        let numbers = match self.format.levels() {
            Levels::Minus(zero) => codes().float().cast(DType::F32) - f32::from(zero),
            Levels::Of(levels) => {
                let levels = TensorData::new(levels.to_vec(), [levels.len()]);
                Tensor::<B, 1>::from_data(levels, (&device, DType::F32)).select(0, codes())
            }
            levels @ (Levels::Upper | Levels::Half) => {
                let halves = halves(self.codes.clone().reshape([rows * words]));
                let numbers = match levels {
                    Levels::Upper => of_bf16(halves),
                    _ => of_f16(halves),
                };
                return numbers.reshape([rows, 2 * words]).narrow(1, 0, self.columns);
            }
            Levels::Blocks(format) => {
                return blocks::unpacked(format, self.codes.clone(), self.columns);
            }
        };
        let block = self.format.block();
        let blocks = self.columns.div_ceil(block);
        let mut numbers = numbers.reshape([rows, blocks, block]);
        if let Some(scales) = self.scales() {
            numbers = numbers * scales.reshape([rows, blocks, 1]);
        }
        if let Some(minima) = self.minima() {
            numbers = numbers + minima.reshape([rows, blocks, 1]);
        }
        numbers.reshape([rows, blocks * block]).narrow(1, 0, self.columns)
    }

    /// The scales, not quantized: `[rows, blocks]`.
    fn scales(&self) -> Option<Tensor<B, 2>> {
        let blocks = self.columns.div_ceil(self.format.block());
        match &self.scales {
            Scales::None => None,
            Scales::Full(scales) => Some(scales.clone()),
            Scales::Halves(_) => Some(self.halves(0)),
            Scales::Doubled(doubled) => Some(doubled.dense().reshape([self.shape()[0], blocks])),
        }
    }

    /// The smallest numbers of all blocks: `[rows, blocks]`.
    fn minima(&self) -> Option<Tensor<B, 2>> {
        let lie_together = matches!(self.scales, Scales::Halves(_)) && self.format.has_minima();
        self.minima.clone().or_else(|| lie_together.then(|| self.halves(1)))
    }

    /// The scales, or the smallest numbers after them, which are in half precision: `[rows, blocks]`.
    fn halves(&self, part: usize) -> Tensor<B, 2> {
        let Scales::Halves(words) = &self.scales else { unreachable!("they are in full") };
        let [rows, width] = words.dims();
        let blocks = self.columns.div_ceil(self.format.block());
        let numbers = halves(words.clone().reshape([rows * width]));
        let numbers = of_f16(numbers);
        numbers.reshape([rows, 2 * width]).narrow(1, part * blocks, blocks)
    }

    /// The rows with these numbers, as a matrix.
    pub(crate) fn select(&self, rows: Tensor<B, 1, Int>) -> Self {
        Self {
            format: self.format,
            columns: self.columns,
            codes: self.codes.clone().select(0, rows.clone()),
            scales: match &self.scales {
                Scales::Halves(halves) => Scales::Halves(halves.clone().select(0, rows.clone())),
                _ => {
                    let scales = self.scales().map(|it| it.select(0, rows.clone()));
                    scales.map_or(Scales::None, Scales::Full)
                }
            },
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
            Scales::None => Scales::None,
            Scales::Full(scales) => Scales::Full(float(scales)),
            Scales::Halves(halves) => Scales::Halves(int(halves)),
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
