//! The left factor of a product, packed.

use rayon::prelude::*;

use crate::{
    matrix::{Rows, round_all},
    tile::{SIDE, Tile},
};

/// A matrix `[rows, columns]` in bf16, as products read their left factor. It can be multiplied several times.
#[derive(Debug)]
pub struct Left {
    /// Row by row, from `start` on. There are zeros after the last row, up to whole tiles, and after each row.
    numbers: Vec<u16>,
    /// Where the first line of the cache begins.
    start: usize,
    dims: [usize; 2],
    stride: usize,
}

/// The bytes of a line of the cache: 32 numbers.
const LINE: usize = 64;

/// From so many numbers on, several threads pack faster than one.
const WORTH_THREADS: usize = 1 << 16;

impl Left {
    /// Rounds the numbers.
    pub fn new(matrix: &impl Rows) -> Self {
        let dims @ [rows, columns] = matrix.dims();
        let stride = stride(columns);
        let mut numbers = vec![0; rows.next_multiple_of(SIDE) * stride + SIDE];
        let start = numbers.as_ptr().align_offset(LINE);
        let write = |(row, to): (usize, &mut [u16])| matrix.write(row, 0, &mut to[..columns]);
        let to = &mut numbers[start..][..rows * stride];
        if columns == 0 {
        } else if rows * columns < WORTH_THREADS {
            to.chunks_exact_mut(stride).enumerate().for_each(write);
        } else {
            to.par_chunks_exact_mut(stride).enumerate().for_each(write);
        }
        Self { numbers, start, dims, stride }
    }

    /// A matrix of zeros, to be filled by [`set_tile`](Self::set_tile).
    pub fn zeros(dims: [usize; 2]) -> Self {
        struct Zeros([usize; 2]);

        impl Rows for Zeros {
            fn dims(&self) -> [usize; 2] {
                self.0
            }

            fn write(&self, _: usize, _: usize, _: &mut [u16]) {}
        }

        Self::new(&Zeros(dims))
    }

    /// Rounds the rows of a tile, and writes them from `row` and `column` on. What of the tile is beyond the matrix must be
    /// zeros, as what fills it up to whole tiles is.
    ///
    /// # Panics
    ///
    /// If the two are no multiples of 32, or the matrix has not so many rows and columns, filled up to whole tiles.
    pub fn set_tile(&mut self, [row, column]: [usize; 2], tile: &Tile) {
        let [rows, columns] = self.dims.map(|it| it.next_multiple_of(SIDE));
        let is_whole = [row, column].iter().all(|it| it.is_multiple_of(SIDE));
        assert!(
            is_whole && row + SIDE <= rows && column + SIDE <= columns,
            "a tile from {row}, {column} on is none of {} x {} numbers",
            self.dims[0],
            self.dims[1],
        );
        for (place, numbers) in tile.0.iter().enumerate() {
            let start = self.start + (row + place) * self.stride + column;
            round_all(numbers, &mut self.numbers[start..start + SIDE]);
        }
    }

    /// The numbers of rows and of columns.
    pub fn dims(&self) -> [usize; 2] {
        self.dims
    }

    /// The numbers from a row on, and from a column on.
    pub(crate) fn from(&self, row: usize, column: usize) -> &[u16] {
        &self.numbers[self.start + row * self.stride + column..]
    }

    pub(crate) fn stride(&self) -> usize {
        self.stride
    }
}

/// From the beginning of one row to that of the next: whole steps of 32 numbers, but no multiple of 4,096 bytes, since
/// a cache holds only few lines that are so far apart.
fn stride(columns: usize) -> usize {
    let stride = columns.next_multiple_of(SIDE);
    if stride.is_multiple_of(512) { stride + SIDE } else { stride }
}
