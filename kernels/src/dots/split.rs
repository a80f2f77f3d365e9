//! Rows whose scales lie apart from their codes.

use super::{
    Dots, Vector8, formats,
    layout::{BLOCK, Format, Layout},
    row::Row,
};

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
    pub scales: &'a [f32],
    /// What is added to the numbers of each block, if anything.
    pub minima: Option<&'a [f32]>,
}

impl SplitRow<'_> {
    /// The product with a vector that is as long, the same by all instructions, to the bit.
    ///
    /// # Panics
    ///
    /// If there are not as many codes, scales and minima as the vector has blocks, if blocks have another length, or if
    /// the processor does not have the instructions.
    pub fn dot(&self, by: Dots, x: &Vector8) -> f32 {
        let [product] = self.dots(by, [x]);
        product
    }

    /// The products with some vectors, each as [`dot`](Self::dot) computes it. The row is read from memory once.
    ///
    /// # Panics
    ///
    /// As `dot`, or if the vectors differ in length.
    pub fn dots<const N: usize>(&self, by: Dots, x: [&Vector8; N]) -> [f32; N] {
        let Self { codes, bytes, block, scales, minima } = *self;
        let Some(first) = x.first() else { return [0.0; N] };
        let columns = first.len();
        assert!(x.iter().all(|it| it.len() == columns), "vectors differ in length");
        assert!([32, 64, 128, 256].contains(&block), "blocks of {block} numbers");
        let (blocks, of, layout) = (columns.div_ceil(block), block / BLOCK, codes.layout());
        let found = [bytes.len(), scales.len(), minima.map_or(blocks, <[f32]>::len)];
        let expected = [blocks * of * layout.stride, blocks, blocks];
        assert_eq!(found, expected, "bytes, scales and minima of a row of {columns} numbers");
        match codes {
            Codes::Bytes => self.dots_of::<formats::Bytes, N>(by, x, 1.0),
            Codes::Nibbles => self.dots_of::<formats::Nibbles, N>(by, x, 1.0),
            Codes::NibblesFromZero => self.dots_of::<formats::NibblesFromZero, N>(by, x, 1.0),
            Codes::Nf4 => self.dots_of::<formats::Nf4, N>(by, x, 1.0 / 127.0),
        }
    }

    /// The same for one kind of codes, which are counted in units.
    fn dots_of<F: Format, const N: usize>(
        &self,
        by: Dots,
        x: [&Vector8; N],
        unit: f32,
    ) -> [f32; N] {
        let Self { bytes, block, scales, minima, .. } = *self;
        // A shift is faster than a division.
        let shift = (block / BLOCK).ilog2();
        let row = Row { bytes, blocks: scales.len() << shift, minima: minima.is_some() };
        row.dots::<F, N>(
            by,
            x,
            #[inline(always)]
            |range, to| {
                for (to, number) in to.scales.iter_mut().zip(range.clone()) {
                    *to = [scales[number >> shift] * unit; 2];
                }
                if let Some(minima) = minima {
                    for (to, number) in to.minima.iter_mut().zip(range) {
                        *to = [minima[number >> shift]; 2];
                    }
                }
            },
        )
    }
}
