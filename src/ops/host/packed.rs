//! Weights in 2 to 16 bits.

use std::{borrow::Cow, ops::Range};

use burn::tensor::ops::{FloatTensor, IntTensor};
use burn_lora_kernels::{BlockFormat, Codes, DotMemory, Floats, SplitRow, Vector8, dots};

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
        !matches!(self.weight.format.levels(), Levels::Upper | Levels::Half)
    }

    /// The products by numbers in `f32`: a row is unpacked to a core's cache, and multiplied with all vectors.
    pub fn times(&self, x: &[f32], outputs: Range<usize>, to: &mut [&mut [f32]]) {
        let columns = self.weight.columns;
        let mut numbers = vec![0.0; columns];
        for (place, output) in outputs.enumerate() {
            self.row(output, &mut numbers);
            for (to, x) in to.iter_mut().zip(x.chunks_exact(columns)) {
                to[place] = widest(
                    #[inline(always)]
                    || sum_of_pairs(&numbers, x, |weight, x| weight * x),
                );
            }
        }
    }

    /// The products by vectors in 8 bits.
    pub fn times_rounded(&self, x: &[Vector8], outputs: Range<usize>, to: &mut [&mut [f32]]) {
        let (mut x, mut to) = (x, to);
        // A row is read once for so many vectors.
        while let Some((eight, others)) = x.split_first_chunk::<8>() {
            let (first, rest) = to.split_at_mut(8);
            self.times_some(eight, outputs.clone(), first);
            (x, to) = (others, rest);
        }
        if let Some((four, others)) = x.split_first_chunk::<4>() {
            let (first, rest) = to.split_at_mut(4);
            self.times_some(four, outputs.clone(), first);
            (x, to) = (others, rest);
        }
        match x {
            [one] => self.times_some(&[one], outputs, to),
            [one, two] => self.times_some(&[one, two], outputs, to),
            [one, two, three] => self.times_some(&[one, two, three], outputs, to),
            _ => {}
        }
    }

    fn times_some<const N: usize, V: AsVector>(
        &self,
        x: &[V; N],
        outputs: Range<usize>,
        to: &mut [&mut [f32]],
    ) {
        let x = x.each_ref().map(AsVector::as_vector);
        let (mut memory, by) = (DotMemory::new(), dots());
        let mut write = |place: usize, products: [f32; N]| {
            to.iter_mut().zip(products).for_each(|(to, product)| to[place] = product);
        };
        match self.weight.format.levels() {
            Levels::Blocks(format) => {
                for (place, output) in outputs.enumerate() {
                    write(place, format.dots(by, self.blocks(format, output), x, &mut memory));
                }
            }
            _ => {
                for (place, output) in outputs.enumerate() {
                    write(place, self.split_row(output).dots(by, x, &mut memory));
                }
            }
        }
    }

    /// The bytes of a row, which may be filled up to whole words.
    fn bytes(&self, row: usize) -> &[u8] {
        let size = self.weight.format.row_bytes(self.weight.columns);
        &bytes_of::<K>(&self.codes)[row * size..][..size]
    }

    fn blocks(&self, format: BlockFormat, row: usize) -> &[u8] {
        &self.bytes(row)[..format.row_bytes(self.weight.columns)]
    }

    /// A row whose scales lie apart.
    fn split_row(&self, row: usize) -> SplitRow<'_> {
        let format = self.weight.format;
        let codes = match (format, format.levels()) {
            (Format::Q4_0, _) => Codes::Nibbles,
            (Format::Q4_1, _) => Codes::NibblesFromZero,
            (_, Levels::Of(_)) => Codes::Nf4,
            _ => Codes::Bytes,
        };
        let blocks = self.weight.columns.div_ceil(format.block());
        let of_row = row * blocks..(row + 1) * blocks;
        let full = |numbers| Floats::Full(&rows::<K>(numbers)[of_row.clone()]);
        let mut minima = self.minima.as_ref().map(full);
        let scales = match &self.scales {
            HeldScales::None => unreachable!("its scales are not among the codes"),
            HeldScales::Full(scales) => full(scales),
            HeldScales::Unpacked(scales) => Floats::Full(&scales[of_row]),
            HeldScales::Halves(halves) => {
                let all = bytes_of::<K>(halves).as_chunks::<2>().0;
                let [count, _] = self.weight.shape();
                let halves = &all[row * (all.len() / count)..];
                if format.has_minima() {
                    minima = Some(Floats::Halves(&halves[blocks..2 * blocks]));
                }
                Floats::Halves(&halves[..blocks])
            }
        };
        let bytes = &self.bytes(row)[..blocks * format.block_bytes()];
        SplitRow { codes, bytes, block: format.block(), scales, minima }
    }

    /// The numbers of a row.
    pub fn row(&self, row: usize, to: &mut [f32]) {
        let format = self.weight.format;
        let mut unpack = |bytes: &[u8], scales: &[f32], minima: Option<&[f32]>| {
            widest(
                #[inline(always)]
                || unpack_row(format, bytes, scales, minima, to),
            );
        };
        if !format.is_scaled() {
            return unpack(self.bytes(row), &[], None);
        }
        let row = self.split_row(row);
        let minima = row.minima.map(in_full);
        unpack(row.bytes, &in_full(row.scales), minima.as_deref());
    }
}

fn in_full(numbers: Floats<'_>) -> Cow<'_, [f32]> {
    match numbers {
        Floats::Full(numbers) => numbers.into(),
        Floats::Halves(halves) => halves.iter().map(|&it| of_half(it)).collect(),
    }
}

/// A vector, or a reference to one.
trait AsVector {
    fn as_vector(&self) -> &Vector8;
}

impl AsVector for Vector8 {
    fn as_vector(&self) -> &Vector8 {
        self
    }
}

impl AsVector for &Vector8 {
    fn as_vector(&self) -> &Vector8 {
        self
    }
}
