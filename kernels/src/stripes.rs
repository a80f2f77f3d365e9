//! Products in `f32` of many rows with weights that are unpacked on the way.
//!
//! A weight of few bits is small in memory, and eight times as large in `f32`. So it is never written there as a whole: some
//! of its rows at a time are unpacked to where the core's cache holds them, and multiplied with all rows before the next.

use std::{cell::Cell, ops::Range};

use pulp::{Scalar, Simd, WithSimd};

use crate::{instructions::Instructions, tile::SIDE};

/// Rows `[rows, inner]` in `f32`, in stripes of 32, in which the numbers of a column lie next to each other. Its memory is
/// used again when it is filled again.
#[derive(Clone, Debug, Default)]
pub struct Stripes {
    rows: usize,
    inner: usize,
    /// The columns of each stripe, with zeros after the last row.
    columns: Vec<Column>,
}

/// The numbers of 32 rows. It is as aligned as vectors want it.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Column([f32; SIDE]);

impl Stripes {
    /// Takes rows of `inner` numbers.
    ///
    /// # Panics
    ///
    /// If the rows are not whole.
    pub fn fill(&mut self, rows: &[f32], inner: usize) {
        /// The columns that are written at once. They stay in the nearest cache until they are complete.
        const PART: usize = 64;

        assert!(rows.len().is_multiple_of(inner), "{} numbers in rows of {inner}", rows.len());
        (self.rows, self.inner) = (rows.len() / inner, inner);
        self.columns.resize(self.rows.div_ceil(SIDE) * inner, Column([0.0; SIDE]));
        let stripes = self.columns.chunks_exact_mut(inner.max(1));
        for (columns, rows) in stripes.zip(rows.chunks(SIDE * inner)) {
            let count = rows.len() / inner;
            for (part, columns) in columns.chunks_mut(PART).enumerate() {
                for (place, row) in rows.chunks_exact(inner).enumerate() {
                    let numbers = &row[part * PART..][..columns.len()];
                    columns.iter_mut().zip(numbers).for_each(|(to, it)| to.0[place] = *it);
                }
                columns.iter_mut().for_each(|column| column.0[count..].fill(0.0));
            }
        }
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The numbers of a row.
    pub fn inner(&self) -> usize {
        self.inner
    }

    /// The products of all rows with `outputs` others: output o of a row comes to place o of its slice. `unpack` writes some of
    /// the others, which begin as far apart as it is told. The result of a row does not depend on the others.
    ///
    /// # Panics
    ///
    /// If there is not a slice of `outputs` numbers for each row, or if the processor does not have the instructions.
    pub fn times(
        &self,
        by: Instructions,
        outputs: usize,
        unpack: impl FnMut(Range<usize>, usize, &mut [f32]),
        to: &mut [&mut [f32]],
    ) {
        assert!(by.are_there(), "this processor has no {by}");
        assert_eq!(to.len(), self.rows, "slices for rows");
        assert!(to.iter().all(|it| it.len() == outputs), "slices of {outputs} numbers expected");
        let product = Product { stripes: self, outputs, unpack, to };
        match by {
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx2 => {
                let simd = pulp::x86::V3::try_new().expect("the instructions are there");
                pulp::Simd::vectorize(simd, product);
            }
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 | Instructions::Avx512Bf16 | Instructions::Amx => {
                let simd = pulp::x86::V4::try_new().expect("the instructions are there");
                pulp::Simd::vectorize(simd, product);
            }
            #[cfg(target_arch = "aarch64")]
            Instructions::Neon => {
                let simd = pulp::aarch64::Neon::try_new().expect("the instructions are there");
                pulp::Simd::vectorize(simd, product);
            }
            _ => pulp::Simd::vectorize(Scalar::new(), product),
        }
    }
}

struct Product<'a, 'y, F> {
    stripes: &'a Stripes,
    outputs: usize,
    unpack: F,
    to: &'a mut [&'y mut [f32]],
}

impl<F: FnMut(Range<usize>, usize, &mut [f32])> WithSimd for Product<'_, '_, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // As many sums as there are registers for, with some left for the factors.
        match S::F32_LANES {
            16 => self.by::<S, 12, 2>(simd),
            8 => self.by::<S, 6, 2>(simd),
            4 => self.by::<S, 6, 4>(simd),
            _ => self.by::<S, 2, 4>(simd),
        }
    }
}

/// The unpacked numbers that are multiplied with all rows before the next: half of what the cache of a core holds.
const HELD: usize = 1 << 16;

impl<F: FnMut(Range<usize>, usize, &mut [f32])> Product<'_, '_, F> {
    #[inline(always)]
    fn by<S: Simd, const OUTPUTS: usize, const VECTORS: usize>(mut self, simd: S) {
        let inner = self.stripes.inner;
        if self.outputs == 0 || inner == 0 {
            return;
        }
        // Rows that are a multiple of a page apart would all want the same places of the cache.
        let stride = inner.next_multiple_of(2 * LINE) + LINE;
        let held = (HELD / stride).max(1).next_multiple_of(OUTPUTS);
        let held = held.min(self.outputs.next_multiple_of(OUTPUTS));
        let mut numbers = UNPACKED.take();
        numbers.resize(numbers.len().max(held * stride), 0.0);
        for start in (0..self.outputs).step_by(held) {
            let count = held.min(self.outputs - start);
            (self.unpack)(start..start + count, stride, &mut numbers[..count * stride]);
            let stripes = self.stripes.columns.chunks_exact(inner);
            for (columns, to) in stripes.zip(self.to.chunks_mut(SIDE)) {
                for first in (0..count).step_by(OUTPUTS) {
                    let rows: [&[f32]; OUTPUTS] =
                        std::array::from_fn(|it| &numbers[(first + it) * stride..][..inner]);
                    let sums = match to.len() <= S::F32_LANES {
                        true => tile::<S, OUTPUTS, 1>(simd, columns, to.len(), rows),
                        false => tile::<S, OUTPUTS, VECTORS>(simd, columns, to.len(), rows),
                    };
                    let sums = &sums[..OUTPUTS.min(count - first)];
                    for (place, to) in to.iter_mut().enumerate() {
                        let to = &mut to[start + first..][..sums.len()];
                        to.iter_mut().zip(sums).for_each(|(to, sums)| *to = sums.0[place]);
                    }
                }
            }
        }
        UNPACKED.set(numbers);
    }
}

thread_local! {
    /// Where the thread unpacks rows to. New memory would have to be cleared for each product.
    static UNPACKED: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// The numbers in a line of the cache.
const LINE: usize = 16;

/// The products of some rows with the first `count` of a stripe.
#[inline(always)]
fn tile<S: Simd, const OUTPUTS: usize, const VECTORS: usize>(
    simd: S,
    columns: &[Column],
    count: usize,
    rows: [&[f32]; OUTPUTS],
) -> [Column; OUTPUTS] {
    let mut tile = [Column([0.0; SIDE]); OUTPUTS];
    let rows = rows.map(|it| &it[..columns.len()]);
    for from in (0..count.div_ceil(S::F32_LANES)).step_by(VECTORS) {
        let mut sums = [[simd.splat_f32s(0.0); VECTORS]; OUTPUTS];
        for (place, column) in columns.iter().enumerate() {
            let (numbers, _) = S::as_simd_f32s(&column.0);
            for output in 0..OUTPUTS {
                let weight = simd.splat_f32s(rows[output][place]);
                for vector in 0..VECTORS {
                    let sum = sums[output][vector];
                    sums[output][vector] = simd.mul_add_e_f32s(weight, numbers[from + vector], sum);
                }
            }
        }
        for (sums, to) in sums.iter().zip(&mut tile) {
            let (to, _) = S::as_mut_simd_f32s(&mut to.0);
            to[from..from + VECTORS].copy_from_slice(sums);
        }
    }
    tile
}
