//! Matrices as GGUF files hold them.

use std::borrow::Cow;

use burn::tensor::backend::Backend;
use burn_lora_kernels::BlockFormat;
use half::{bf16, f16};

use super::{
    Format, Levels, QuantizedWeight, Scales, rounding,
    words::{self, to_words},
};
use crate::error::LoraError;

/// How a GGUF file holds a matrix. The names are the file's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
#[allow(non_camel_case_types, reason = "these are the names that GGUF's users know")]
pub enum GgufType {
    /// 8 bits.
    Q8_0,
    /// 4 bits, around zero.
    Q4_0,
    /// 4 bits, from the smallest number of each block on.
    Q4_1,
    /// 16 bits: the upper half of an `f32`. Tensors in bf16 of a safetensors file have the same bytes.
    BF16,
    /// 5 bits, around zero.
    Q5_0,
    /// 5 bits, from the smallest number of each block on.
    Q5_1,
    /// 4 bits, in blocks of 256. Each 32 have a scale and a smallest number.
    Q4_K,
    /// 5 bits, in blocks of 256. Each 32 have a scale and a smallest number.
    Q5_K,
    /// 6 bits, around zero, in blocks of 256. Each 16 have a scale.
    Q6_K,
    /// 2 bits, in blocks of 256. Each 16 have a scale and a smallest number.
    Q2_K,
    /// 3 bits, around zero, in blocks of 256. Each 16 have a scale.
    Q3_K,
    /// One of 16 levels.
    IQ4_NL,
    /// One of 16 levels, in blocks of 256. Each 32 have a scale.
    IQ4_XS,
    /// 16 bits: half precision. Tensors in f16 of a safetensors file have the same bytes.
    F16,
}

impl GgufType {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
        Self::BF16,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
        Self::Q2_K,
        Self::Q3_K,
        Self::IQ4_NL,
        Self::IQ4_XS,
        Self::F16,
    ];

    /// How many numbers are a block, 32 unless the type says otherwise and 1 in bf16 and f16, and how many bytes they fill.
    pub fn block(self) -> [usize; 2] {
        self.blocks().map_or([1, 2], |it| [it.block(), it.bytes()])
    }

    /// The numbers in whole blocks, exactly as GGUF's own package reads them.
    ///
    /// # Panics
    ///
    /// If the bytes are no whole blocks.
    pub fn unpack(self, bytes: &[u8]) -> Vec<f32> {
        let [block, size] = self.block();
        let found = bytes.len();
        assert!(found.is_multiple_of(size), "{found} bytes are no blocks of {size} in {self:?}");
        match self.blocks() {
            Some(format) => {
                let mut numbers = vec![0.0; found / size * block];
                format.unpack(bytes, &mut numbers);
                numbers
            }
            None => bytes.as_chunks().0.iter().map(|&it| self.number(it)).collect(),
        }
    }

    /// The numbers rounded to this type, in whole blocks, to the bit as GGUF's own package rounds them. None for types in
    /// blocks of 256 and for [`IQ4_NL`](Self::IQ4_NL), which that does not write.
    ///
    /// Numbers that are too large become infinite.
    ///
    /// # Panics
    ///
    /// If the numbers are no whole [blocks](Self::block).
    pub fn pack(self, numbers: &[f32]) -> Option<Vec<u8>> {
        let ([block, _], found) = (self.block(), numbers.len());
        assert!(
            found.is_multiple_of(block),
            "{found} numbers are no blocks of {block} in {self:?}"
        );
        rounding::pack(self, numbers)
    }

    /// The number of 16 bits.
    fn number(self, bytes: [u8; 2]) -> f32 {
        match self {
            Self::F16 => f16::from_le_bytes(bytes).to_f32(),
            _ => bf16::from_le_bytes(bytes).to_f32(),
        }
    }

    /// The blocks of the file, unless each number is by itself.
    fn blocks(self) -> Option<BlockFormat> {
        match (self, self.format().levels()) {
            (Self::Q8_0, _) => Some(BlockFormat::Q8_0),
            (Self::Q4_0, _) => Some(BlockFormat::Q4_0),
            (Self::Q4_1, _) => Some(BlockFormat::Q4_1),
            (_, Levels::Blocks(format)) => Some(format),
            _ => None,
        }
    }

    /// How it is held here.
    fn format(self) -> Format {
        match self {
            Self::Q8_0 => Format::Q8_0,
            Self::Q4_0 => Format::Q4_0,
            Self::Q4_1 => Format::Q4_1,
            Self::BF16 => Format::Bf16,
            Self::Q5_0 => Format::Q5_0,
            Self::Q5_1 => Format::Q5_1,
            Self::Q4_K => Format::Q4_K,
            Self::Q5_K => Format::Q5_K,
            Self::Q6_K => Format::Q6_K,
            Self::Q2_K => Format::Q2_K,
            Self::Q3_K => Format::Q3_K,
            Self::IQ4_NL => Format::IQ4_NL,
            Self::IQ4_XS => Format::IQ4_XS,
            Self::F16 => Format::F16,
        }
    }
}

impl<B: Backend> QuantizedWeight<B> {
    /// A matrix as a GGUF file holds it, to the bit: `data` are the bytes of its rows, one after the other.
    ///
    /// # Errors
    ///
    /// [`LoraError::InvalidFile`] if the length of `data` is not that of so many rows, if the columns are
    /// no whole [blocks](GgufType::block), or if a scale, or a number of 16 bits, is not finite.
    pub fn from_gguf(
        kind: GgufType,
        shape: [usize; 2],
        data: &[u8],
        device: &B::Device,
    ) -> Result<Self, LoraError> {
        let ([rows, columns], [block, size]) = (shape, kind.block());
        if !columns.is_multiple_of(block) {
            return Err(invalid(kind, format!("{columns} columns are no blocks of {block}")));
        }
        let row = (columns / block).checked_mul(size);
        let expected = row.and_then(|row| row.checked_mul(rows));
        if rows == 0 || columns == 0 || expected != Some(data.len()) {
            let found = data.len();
            let problem = format!("{found} bytes cannot be {rows} x {columns} numbers");
            return Err(invalid(kind, problem));
        }
        match kind.blocks() {
            Some(format) if !format.is_finite(data) => {
                return Err(invalid(kind, "a scale is not finite".to_owned()));
            }
            None if !data.as_chunks().0.iter().all(|&it| kind.number(it).is_finite()) => {
                return Err(invalid(kind, "a number is not finite".to_owned()));
            }
            _ => {}
        }
        let format = kind.format();
        match format.is_scaled() {
            true => Ok(Self::with_scales_apart(format, shape, data, size, device)),
            false => Ok(Self::as_it_is(format, shape, data, device)),
        }
    }

    /// The bytes of the file, with each row filled up to whole words.
    fn as_it_is(format: Format, shape: [usize; 2], data: &[u8], device: &B::Device) -> Self {
        let [rows, columns] = shape;
        let (row, whole) = (data.len() / rows, format.row_bytes(columns));
        // Not copied if it need not be: a table of embeddings is large.
        let bytes = match row == whole {
            true => Cow::Borrowed(data),
            false => {
                let end = &[0; words::SIZE][..whole - row];
                let rows = data.chunks_exact(row);
                Cow::Owned(rows.flat_map(|row| [row, end]).flatten().copied().collect())
            }
        };
        let codes = to_words(&bytes, [rows, whole / words::SIZE], device);
        Self { format, columns, codes, scales: Scales::None, minima: None }
    }

    /// Takes blocks of so many bytes apart: the scales, the smallest numbers in some formats, and the codes.
    fn with_scales_apart(
        format: Format,
        shape: [usize; 2],
        data: &[u8],
        size: usize,
        device: &B::Device,
    ) -> Self {
        let ([rows, columns], head) = (shape, size - format.block_bytes());
        let whole = (columns / format.block() * head).next_multiple_of(words::SIZE);
        let mut bytes = Vec::with_capacity(rows * format.row_bytes(columns));
        let mut halves = Vec::with_capacity(rows * whole);
        for (row, data) in data.chunks_exact(data.len() / rows).enumerate() {
            for part in (0..head).step_by(2) {
                halves.extend(data.chunks_exact(size).flat_map(|block| &block[part..part + 2]));
            }
            halves.resize((row + 1) * whole, 0);
            // The file's are signed, and ours are counted from -128.
            let flip = if format.packs_two() { 0 } else { 128 };
            let codes = data.chunks_exact(size).flat_map(|block| &block[head..]);
            bytes.extend(codes.map(|code| code ^ flip));
        }
        let codes = to_words(&bytes, [rows, format.row_bytes(columns) / words::SIZE], device);
        let halves = to_words(&halves, [rows, whole / words::SIZE], device);
        Self { format, columns, codes, scales: Scales::Halves(halves), minima: None }
    }
}

fn invalid(kind: GgufType, problem: String) -> LoraError {
    LoraError::InvalidFile { file: format!("a matrix of {kind:?}"), problem }
}
