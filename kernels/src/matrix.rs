//! What can be multiplied: anything whose rows can be written in bf16.

use half::{bf16, f16};

use crate::round::{all, normal, round};

/// A matrix whose rows can be written in bf16.
///
/// Numbers that are nearer to zero than the smallest normal `f32`, 2⁻¹²⁶, are to be zero.
pub trait Rows: Sync {
    /// The numbers of rows and of columns.
    fn dims(&self) -> [usize; 2];

    /// Writes the numbers of a row from the column `start` on, as the bits of bf16. The row has as many as the slice
    /// is long. `start` is a multiple of 32, and so is the end if it is not that of the row.
    fn write(&self, row: usize, start: usize, to: &mut [u16]);
}

impl<R: Rows + ?Sized> Rows for &R {
    fn dims(&self) -> [usize; 2] {
        (**self).dims()
    }

    fn write(&self, row: usize, start: usize, to: &mut [u16]) {
        (**self).write(row, start, to);
    }
}

/// A number that can be rounded to bf16.
pub trait Number: Copy + Sync {
    /// The bits of the nearest bf16 number, ties to even, and zero for what is not a normal number.
    fn round(self) -> u16;

    /// [`round`](Self::round) of each number of a slice, to one of the same length.
    fn round_all(numbers: &[Self], to: &mut [u16]) {
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || {
                for (to, &number) in to.iter_mut().zip(numbers) {
                    *to = number.round();
                }
            },
        );
    }
}

impl Number for f32 {
    #[inline(always)]
    fn round(self) -> u16 {
        round(self)
    }

    fn round_all(numbers: &[Self], to: &mut [u16]) {
        all::round(numbers, to);
    }
}

impl Number for bf16 {
    #[inline(always)]
    fn round(self) -> u16 {
        normal(self.to_bits())
    }
}

impl Number for f16 {
    #[inline(always)]
    fn round(self) -> u16 {
        round(self.to_f32_const())
    }
}

/// A matrix in a slice. The numbers of a row lie next to each other.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a, T> {
    numbers: &'a [T],
    dims: [usize; 2],
    stride: usize,
}

impl<'a, T> Matrix<'a, T> {
    /// A matrix `[rows, columns]` whose rows lie one after the other.
    ///
    /// # Panics
    ///
    /// If the slice is shorter.
    pub fn new(numbers: &'a [T], dims: [usize; 2]) -> Self {
        Self::strided(numbers, dims, dims[1])
    }

    /// The same with rows that begin `stride` numbers apart.
    ///
    /// # Panics
    ///
    /// If the slice is shorter, or rows overlap.
    pub fn strided(numbers: &'a [T], dims: [usize; 2], stride: usize) -> Self {
        check_strided(numbers.len(), dims, stride);
        Self { numbers, dims, stride }
    }
}

/// Panics if so many numbers are too few for rows that begin `stride` apart, or if these overlap.
#[track_caller]
pub(crate) fn check_strided(found: usize, [rows, columns]: [usize; 2], stride: usize) {
    assert!(stride >= columns, "rows of {columns} numbers cannot begin {stride} apart");
    let needed = if rows == 0 { 0 } else { (rows - 1) * stride + columns };
    assert!(found >= needed, "{rows} x {columns} numbers expected, {stride} apart, got {found}");
}

impl<T: Number> Rows for Matrix<'_, T> {
    fn dims(&self) -> [usize; 2] {
        self.dims
    }

    fn write(&self, row: usize, start: usize, to: &mut [u16]) {
        let row = &self.numbers[row * self.stride..][..self.dims[1]];
        round_all(&row[start..start + to.len()], to);
    }
}

/// Rounds each number of a slice to bf16.
///
/// # Panics
///
/// If the slices differ in length.
pub fn round_all<T: Number>(numbers: &[T], to: &mut [u16]) {
    assert_eq!(numbers.len(), to.len());
    T::round_all(numbers, to);
}
