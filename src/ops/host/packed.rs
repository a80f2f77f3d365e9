//! Weights in 2 to 16 bits.

use std::{borrow::Cow, ops::Range};

use burn::tensor::ops::{FloatTensor, IntTensor};
use burn_lora_kernels::{Codes, DotMemory, Floats, SplitRow, Stripes, Vector8, dots, instructions};

use crate::{
    ops::{
        backend::Cpu,
        quantized::{bytes_of, of_half, unpack_row},
        rows::{row_by_row, rows},
        simd::{sum_of_pairs, widest},
    },
    quantized::{Format, Levels, QuantizedWeight, Scales, unpack_scales},
};

/// The rows of a matrix, each of which is what an output is computed from.
#[derive(Debug)]
pub(super) struct Packed<K: Cpu> {
    weight: QuantizedWeight<K>,
    codes: IntTensor<K>,
    scales: HeldScales<K>,
    minima: Option<FloatTensor<K>>,
}

#[derive(Debug)]
enum HeldScales<K: Cpu> {
    None,
    Full(FloatTensor<K>),
    /// Of each row first the scales of its blocks, and then the smallest numbers, if there are some.
    Halves(IntTensor<K>),
    /// They were quantized in turn.
    Unpacked(Vec<f32>),
}

impl<K: Cpu> Packed<K> {
    pub fn of(weight: &QuantizedWeight<K>) -> Self {
        let scales = match weight.scales.clone() {
            Scales::None => HeldScales::None,
            Scales::Full(scales) => HeldScales::Full(row_by_row(scales)),
            Scales::Halves(halves) => HeldScales::Halves(halves.into_primitive()),
            Scales::Doubled(doubled) => {
                let codes = doubled.codes.into_primitive();
                let scales = row_by_row(doubled.scales);
                let (codes, scales) = (bytes_of::<K>(&codes), rows::<K>(&scales));
                HeldScales::Unpacked(unpack_scales(codes, scales, doubled.offset))
            }
        };
        Self {
            codes: weight.codes.clone().into_primitive(),
            scales,
            minima: weight.minima.clone().map(row_by_row),
            weight: weight.clone(),
        }
    }

    /// Whether the numbers have at most 8 bits.
    pub fn is_in_8_bits(&self) -> bool {
        !self.weight.has_16_bits()
    }

    /// The rows, to be read one after the other. To ask a tensor for its memory takes as long as a short row.
    fn rows(&self) -> PackedRows<'_> {
        let QuantizedWeight { format, columns, .. } = self.weight;
        let [count, _] = self.weight.shape();
        let mut minima = self.minima.as_ref().map(|it| Stride::full(rows::<K>(it), count));
        let scales = match &self.scales {
            HeldScales::None => None,
            HeldScales::Full(scales) => Some(Stride::full(rows::<K>(scales), count)),
            HeldScales::Unpacked(scales) => Some(Stride::full(scales, count)),
            HeldScales::Halves(halves) => {
                let numbers = bytes_of::<K>(halves).as_chunks::<2>().0;
                let halves = |start| Stride {
                    numbers: Floats::Halves(numbers),
                    each: numbers.len() / count,
                    start,
                };
                minima = format.has_minima().then(|| halves(columns.div_ceil(format.block())));
                Some(halves(0))
            }
        };
        let codes = match (format, format.levels()) {
            (Format::Q4_0, _) => Codes::Nibbles,
            (Format::Q4_1, _) => Codes::NibblesFromZero,
            (_, Levels::Of(_)) => Codes::Nf4,
            _ => Codes::Bytes,
        };
        let (block, blocks) = (format.block(), columns.div_ceil(format.block()));
        // A row may be filled up to whole words.
        let [each, used] = [format.row_bytes(columns), blocks * format.block_bytes()];
        let bytes = bytes_of::<K>(&self.codes);
        PackedRows { format, codes, bytes, each, used, block, blocks, scales, minima }
    }

    /// The products by numbers in `f32`: a row is unpacked to a core's cache, and multiplied with all vectors.
    pub fn times(&self, x: &[f32], outputs: Range<usize>, to: &mut [&mut [f32]]) {
        let (columns, rows) = (self.weight.columns, self.rows());
        let mut numbers = vec![0.0; columns];
        for (place, output) in outputs.enumerate() {
            rows.unpack(output, &mut numbers);
            for (to, x) in to.iter_mut().zip(x.chunks_exact(columns)) {
                to[place] = widest(
                    #[inline(always)]
                    || sum_of_pairs(&numbers, x, |weight, x| weight * x),
                );
            }
        }
    }

    /// The same for many vectors.
    pub fn times_many(&self, x: &Stripes, outputs: Range<usize>, to: &mut [&mut [f32]]) {
        let (rows, first) = (self.rows(), outputs.start);
        let unpack = |places: Range<usize>, stride: usize, to: &mut [f32]| {
            for (place, to) in places.zip(to.chunks_exact_mut(stride)) {
                rows.unpack(first + place, &mut to[..self.weight.columns]);
            }
        };
        x.times(instructions(), outputs.len(), unpack, to);
    }

    /// The products by vectors in 8 bits.
    pub fn times_rounded(&self, x: &[Vector8], outputs: Range<usize>, to: &mut [&mut [f32]]) {
        let (mut x, mut to, rows) = (x, to, self.rows());
        // A row is read once for so many vectors.
        while let Some((eight, others)) = x.split_first_chunk::<8>() {
            let (first, rest) = to.split_at_mut(8);
            rows.times(eight.each_ref(), outputs.clone(), first);
            (x, to) = (others, rest);
        }
        if let Some((four, others)) = x.split_first_chunk::<4>() {
            let (first, rest) = to.split_at_mut(4);
            rows.times(four.each_ref(), outputs.clone(), first);
            (x, to) = (others, rest);
        }
        match x {
            [one] => rows.times([one], outputs, to),
            [one, two] => rows.times([one, two], outputs, to),
            [one, two, three] => rows.times([one, two, three], outputs, to),
            _ => {}
        }
    }

    /// The numbers of a row.
    pub fn row(&self, row: usize, to: &mut [f32]) {
        self.rows().unpack(row, to);
    }
}

/// The memory of all rows.
struct PackedRows<'a> {
    format: Format,
    codes: Codes,
    bytes: &'a [u8],
    /// From the bytes of a row to those of the next, and how many of them are its codes.
    each: usize,
    used: usize,
    /// The numbers of a block, and the blocks of a row.
    block: usize,
    blocks: usize,
    scales: Option<Stride<'a>>,
    minima: Option<Stride<'a>>,
}

/// The numbers of the blocks of all rows.
struct Stride<'a> {
    numbers: Floats<'a>,
    /// From those of a row to those of the next.
    each: usize,
    /// From there to the first of a row.
    start: usize,
}

impl<'a> Stride<'a> {
    fn full(numbers: &'a [f32], rows: usize) -> Self {
        Self { numbers: Floats::Full(numbers), each: numbers.len() / rows, start: 0 }
    }

    #[inline]
    fn row(&self, row: usize, blocks: usize) -> Floats<'a> {
        let start = row * self.each + self.start;
        match self.numbers {
            Floats::Full(numbers) => Floats::Full(&numbers[start..start + blocks]),
            Floats::Halves(numbers) => Floats::Halves(&numbers[start..start + blocks]),
        }
    }
}

impl<'a> PackedRows<'a> {
    #[inline]
    fn bytes(&self, row: usize) -> &'a [u8] {
        &self.bytes[row * self.each..][..self.used]
    }

    /// A row whose scales lie apart.
    #[inline]
    fn split(&self, row: usize) -> SplitRow<'a> {
        let scales = self.scales.as_ref().expect("its scales are not among the codes");
        SplitRow {
            codes: self.codes,
            bytes: self.bytes(row),
            block: self.block,
            scales: scales.row(row, self.blocks),
            minima: self.minima.as_ref().map(|it| it.row(row, self.blocks)),
        }
    }

    fn times<const N: usize>(
        &self,
        x: [&Vector8; N],
        outputs: Range<usize>,
        to: &mut [&mut [f32]],
    ) {
        let (mut memory, by) = (DotMemory::new(), dots());
        let mut write = |place: usize, products: [f32; N]| {
            to.iter_mut().zip(products).for_each(|(to, product)| to[place] = product);
        };
        match self.format.levels() {
            Levels::Blocks(format) => {
                for (place, output) in outputs.enumerate() {
                    write(place, format.dots(by, self.bytes(output), x, &mut memory));
                }
            }
            _ => {
                for (place, output) in outputs.enumerate() {
                    write(place, self.split(output).dots(by, x, &mut memory));
                }
            }
        }
    }

    fn unpack(&self, row: usize, to: &mut [f32]) {
        widest(
            #[inline(always)]
            || {
                if !self.format.is_scaled() {
                    return unpack_row(self.format, self.bytes(row), &[], None, to);
                }
                let row = self.split(row);
                let minima = row.minima.map(in_full);
                unpack_row(self.format, row.bytes, &in_full(row.scales), minima.as_deref(), to);
            },
        );
    }
}

#[inline(always)]
fn in_full(numbers: Floats<'_>) -> Cow<'_, [f32]> {
    match numbers {
        Floats::Full(numbers) => numbers.into(),
        Floats::Halves(halves) => halves.iter().map(|&it| of_half(it)).collect(),
    }
}
