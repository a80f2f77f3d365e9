//! Matrices in block formats.

use super::{BlockFormat, DotMemory, Dots, Vector8, layout::BLOCK};
use crate::matrix::{Rows, round_all};

/// A matrix `[rows, columns]` in a block format, whose rows lie one after the other, as in GGUF files.
#[derive(Clone, Copy, Debug)]
pub struct Blocks<'a> {
    format: BlockFormat,
    bytes: &'a [u8],
    dims: [usize; 2],
}

impl<'a> Blocks<'a> {
    /// The matrix in these bytes.
    ///
    /// # Panics
    ///
    /// If there are not as many bytes as rows need, or the columns are no whole blocks.
    pub fn new(format: BlockFormat, bytes: &'a [u8], dims: [usize; 2]) -> Self {
        let [rows, columns] = dims;
        let block = format.block();
        assert!(columns.is_multiple_of(block), "{columns} columns are no blocks of {block}");
        let (found, expected) = (bytes.len(), rows * format.row_bytes(columns));
        assert_eq!(found, expected, "bytes of {rows} x {columns} numbers in {format:?}");
        Self { format, bytes, dims }
    }

    /// The format.
    pub fn format(&self) -> BlockFormat {
        self.format
    }

    /// The bytes of a row.
    ///
    /// # Panics
    ///
    /// If there is no such row.
    pub fn row(&self, row: usize) -> &'a [u8] {
        let [rows, columns] = self.dims;
        assert!(row < rows, "there are {rows} rows, and none with the number {row}");
        let length = self.format.row_bytes(columns);
        &self.bytes[row * length..][..length]
    }

    /// The products of all rows with a vector, one after the other.
    ///
    /// # Panics
    ///
    /// If the vector is not as long as rows are, if `to` is not as long as there are rows, or if the processor does not
    /// have the instructions.
    pub fn times(&self, by: Dots, x: &Vector8, to: &mut [f32]) {
        let [rows, columns] = self.dims;
        assert_eq!([to.len(), x.len()], [rows, columns], "numbers of the result and of the vector");
        let mut memory = DotMemory::new();
        for (row, to) in to.iter_mut().enumerate() {
            [*to] = self.format.dots(by, self.row(row), [x], &mut memory);
        }
    }
}

impl Rows for Blocks<'_> {
    fn dims(&self) -> [usize; 2] {
        self.dims
    }

    fn write(&self, row: usize, start: usize, to: &mut [u16]) {
        /// What is unpacked at once. All formats have whole blocks in it.
        const PIECE: usize = 8 * BLOCK;

        let (block, bytes, row) = (self.format.block(), self.format.bytes(), self.row(row));
        let mut numbers = [0.0; PIECE];
        let (mut place, end) = (start, start + to.len());
        while place < end {
            // Parts begin at multiples of 32, and so within long blocks.
            let first = place / block * block;
            let last = end.min(first + PIECE);
            let numbers = &mut numbers[..last - first];
            let of = first / block * bytes..last.div_ceil(block) * bytes;
            self.format.unpack(&row[of], numbers);
            round_all(&numbers[place - first..], &mut to[place - start..last - start]);
            place = last;
        }
    }
}
