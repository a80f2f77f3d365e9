//! The right factor of a product, packed in panels of 32 columns.

use std::ops::Range;

use crate::{
    instructions::Instructions,
    matrix::Rows,
    tile::{Pair, SIDE},
    transpose::transpose,
};

/// A matrix as the right factor of a product.
#[derive(Clone, Copy, Debug)]
pub enum Right<R> {
    /// The matrix itself: `[inner, columns]`.
    Plain(R),
    /// Its transpose: the matrix is `[columns, inner]`.
    Transposed(R),
}

/// The pairs of so many rows, with zeros up to whole steps of a tile.
pub(crate) fn pairs(inner: usize) -> usize {
    inner.next_multiple_of(SIDE) / 2
}

impl<R: Rows> Right<R> {
    /// The numbers of rows and of columns of the factor.
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Self::Plain(matrix) => matrix.dims(),
            Self::Transposed(matrix) => {
                let [columns, inner] = matrix.dims();
                [inner, columns]
            }
        }
    }

    /// Writes some panels one after the other, of the rows `inner` alone, whose start is a multiple of 32.
    pub(crate) fn pack(
        &self,
        by: Instructions,
        panels: Range<usize>,
        inner: Range<usize>,
        to: &mut [Pair],
    ) {
        match self {
            Self::Plain(matrix) => pack(matrix, panels, inner, to),
            Self::Transposed(matrix) => pack_transposed(matrix, by, panels, inner, to),
        }
    }
}

fn pack(matrix: &impl Rows, panels: Range<usize>, inner: Range<usize>, to: &mut [Pair]) {
    let (count, [_, columns]) = (pairs(inner.len()), matrix.dims());
    let (start, width) = (panels.start * SIDE, panels.len() * SIDE);
    let there = width.min(columns - start);
    let mut rows = vec![0; 2 * width];
    let (first, second) = rows.split_at_mut(width);
    for pair in 0..count {
        for (place, row) in [&mut *first, second].into_iter().enumerate() {
            match inner.start + 2 * pair + place {
                number if number < inner.end => matrix.write(number, start, &mut row[..there]),
                _ => row.fill(0),
            }
        }
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || {
                let rows = first.as_chunks::<SIDE>().0.iter().zip(second.as_chunks::<SIDE>().0);
                for (panel, (first, second)) in rows.enumerate() {
                    let words = &mut to[panel * count + pair].0;
                    for column in 0..SIDE {
                        words[column] = u32::from(first[column]) | u32::from(second[column]) << 16;
                    }
                }
            },
        );
    }
}

fn pack_transposed(
    matrix: &impl Rows,
    by: Instructions,
    panels: Range<usize>,
    inner: Range<usize>,
    to: &mut [Pair],
) {
    let (count, [columns, _]) = (pairs(inner.len()), matrix.dims());
    let mut rows = vec![0; 2 * count * SIDE];
    for (panel, to) in panels.zip(to.chunks_exact_mut(count)) {
        let columns = panel * SIDE..columns.min((panel + 1) * SIDE);
        for (place, row) in rows.chunks_exact_mut(2 * count).enumerate() {
            match columns.start + place {
                column if column < columns.end => {
                    matrix.write(column, inner.start, &mut row[..inner.len()]);
                }
                _ => row.fill(0),
            }
        }
        transpose(by, rows.as_chunks().0, to);
    }
}
