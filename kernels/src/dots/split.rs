//! Rows whose scales lie apart from their codes.

use std::ops::Range;

use super::{
    Dots, Vector8, formats,
    layout::{BLOCK, Format, Layout},
    row::{DotMemory, Row},
    scales::{CHUNK, widened},
};

#[cfg(target_arch = "x86_64")]
use super::{avx2, vnni};

/// What codes stand for, before they are multiplied by a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Codes {
    /// A byte for each code, from which 128 is subtracted.
    Bytes,
    /// Two codes in a byte, from which 8 is subtracted: the lower halves of 16 bytes are 16 numbers, and the upper
    /// halves the next 16.
    Nibbles,
    /// The same, and nothing is subtracted.
    NibblesFromZero,
    /// The 16 levels of NF4, packed as nibbles. Levels are rounded to multiples of 1/127, which moves them by 0.0037 at
    /// most and by 0.0022 in the root of the mean of squares, where 1 is the largest.
    Nf4,
}

impl Codes {
    fn layout(self) -> Layout {
        match self {
            Self::Bytes => formats::Bytes::LAYOUT,
            Self::Nibbles => formats::Nibbles::LAYOUT,
            Self::NibblesFromZero => formats::NibblesFromZero::LAYOUT,
            Self::Nf4 => formats::Nf4::LAYOUT,
        }
    }
}

/// Numbers of blocks, next to each other.
#[derive(Clone, Copy, Debug)]
pub enum Floats<'a> {
    /// In 32 bits.
    Full(&'a [f32]),
    /// In half precision, with the lower byte first.
    Halves(&'a [[u8; 2]]),
}

impl Floats<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Full(numbers) => numbers.len(),
            Self::Halves(numbers) => numbers.len(),
        }
    }

    /// Writes the numbers of some blocks of 32, of which `1 << shift` share one, to both halves of each, times a unit.
    #[inline(always)]
    fn write(&self, blocks: Range<usize>, shift: u32, unit: f32, to: &mut [[f32; 2]; CHUNK]) {
        match self {
            Self::Full(numbers) => {
                for (to, block) in to.iter_mut().zip(blocks) {
                    *to = [numbers[block >> shift] * unit; 2];
                }
            }
            Self::Halves(numbers) => {
                // So many are widened at once.
                const COUNT: usize = 16;

                let mut next = blocks.start;
                for to in to.as_chunks_mut::<COUNT>().0 {
                    let count = COUNT.min(blocks.end - next);
                    let mut bits = [0; COUNT];
                    match numbers[next >> shift..].first_chunk::<COUNT>() {
                        Some(numbers) if shift == 0 => bits = numbers.map(u16::from_le_bytes),
                        _ => {
                            for (bits, block) in bits.iter_mut().zip(next..next + count) {
                                *bits = u16::from_le_bytes(numbers[block >> shift]);
                            }
                        }
                    }
                    for (to, bits) in to.iter_mut().zip(bits) {
                        *to = [widened(bits) * unit; 2];
                    }
                    next += count;
                    if next == blocks.end {
                        break;
                    }
                }
            }
        }
    }
}

/// A row whose scales lie apart from its codes.
#[derive(Clone, Copy, Debug)]
pub struct SplitRow<'a> {
    /// What the codes stand for.
    pub codes: Codes,
    /// The codes of whole blocks.
    pub bytes: &'a [u8],
    /// The numbers of a block: 32, 64, 128 or 256.
    pub block: usize,
    /// What the codes of each block are multiplied by.
    pub scales: Floats<'a>,
    /// What is added to the numbers of each block, if anything.
    pub minima: Option<Floats<'a>>,
}

impl SplitRow<'_> {
    /// The product with a vector that is as long, the same by all instructions, to the bit.
    ///
    /// # Panics
    ///
    /// If there are not as many codes, scales and minima as the vector has blocks, if blocks have another length, or if
    /// the processor does not have the instructions.
    pub fn dot(&self, by: Dots, x: &Vector8) -> f32 {
        let [product] = self.dots(by, [x], &mut DotMemory::new());
        product
    }

    /// The products with some vectors, each as [`dot`](Self::dot) computes it. The row is read from memory once.
    ///
    /// # Panics
    ///
    /// As `dot`, or if the vectors differ in length.
    pub fn dots<const N: usize>(
        &self,
        by: Dots,
        x: [&Vector8; N],
        memory: &mut DotMemory<N>,
    ) -> [f32; N] {
        let Self { codes, bytes, block, scales, minima } = *self;
        let Some(first) = x.first() else { return [0.0; N] };
        let columns = first.len();
        assert!(x.iter().all(|it| it.len() == columns), "vectors differ in length");
        assert!([32, 64, 128, 256].contains(&block), "blocks of {block} numbers");
        let (blocks, of, layout) = (columns.div_ceil(block), block / BLOCK, codes.layout());
        let found = [bytes.len(), scales.len(), minima.map_or(blocks, |it| it.len())];
        let expected = [blocks * of * layout.stride, blocks, blocks];
        assert_eq!(found, expected, "bytes, scales and minima of a row of {columns} numbers");
        match codes {
            Codes::Bytes => self.dots_of::<formats::Bytes, N>(by, x, memory, 1.0),
            Codes::Nibbles => self.dots_of::<formats::Nibbles, N>(by, x, memory, 1.0),
            Codes::NibblesFromZero => {
                self.dots_of::<formats::NibblesFromZero, N>(by, x, memory, 1.0)
            }
            Codes::Nf4 => self.dots_of::<formats::Nf4, N>(by, x, memory, 1.0 / 127.0),
        }
    }

    /// The row, if its blocks have 32 numbers and all scales are in half precision.
    fn with_halves(&self) -> Option<HalvesRow<'_>> {
        let Floats::Halves(scales) = self.scales else { return None };
        let minima = match self.minima {
            None => None,
            Some(Floats::Halves(minima)) => Some(minima),
            Some(Floats::Full(_)) => return None,
        };
        (self.block == BLOCK && self.codes != Codes::Nf4).then_some(HalvesRow {
            bytes: self.bytes,
            scales,
            minima,
        })
    }

    /// The same for one kind of codes, which are counted in units.
    fn dots_of<F: Format, const N: usize>(
        &self,
        by: Dots,
        x: [&Vector8; N],
        memory: &mut DotMemory<N>,
        unit: f32,
    ) -> [f32; N] {
        let Self { bytes, block, scales, minima, .. } = *self;
        if let Some(row) = self.with_halves()
            && let Some(products) = of_halves::<F, N>(by, row, x)
        {
            return products;
        }
        // A shift is faster than a division.
        let shift = (block / BLOCK).ilog2();
        let row = Row { bytes, blocks: scales.len() << shift, minima: minima.is_some() };
        row.dots::<F, N>(
            by,
            x,
            memory,
            #[inline(always)]
            |range, to| {
                scales.write(range.clone(), shift, unit, &mut to.scales);
                if let Some(minima) = minima {
                    minima.write(range, shift, 1.0, &mut to.minima);
                }
            },
        )
    }
}

/// A row of blocks of 32, each with a scale of 16 bits, and a smallest number perhaps.
#[derive(Clone, Copy)]
pub(super) struct HalvesRow<'a> {
    pub bytes: &'a [u8],
    pub scales: &'a [[u8; 2]],
    pub minima: Option<&'a [[u8; 2]]>,
}

/// The products of such a row, whose scales need not be written to memory; `None` without instructions for it.
fn of_halves<F: Format, const N: usize>(
    by: Dots,
    row: HalvesRow,
    x: [&Vector8; N],
) -> Option<[f32; N]> {
    assert!(by.are_there(), "this processor has no {by}");
    match by {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: they are there.
        Dots::Vnni => Some(unsafe { vnni::halves::<F, N>(row, x) }),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Dots::Avx2 => Some(unsafe { avx2::halves::<F, N>(row, x) }),
        _ => None,
    }
}
