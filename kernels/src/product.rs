//! Sums of products of matrices in bf16, in parallel, in blocks that fit a core's caches.

#[forbid(unsafe_code)]
mod store;
#[forbid(unsafe_code)]
mod task;

use rayon::prelude::*;

use crate::{
    instructions::{Instructions, instructions},
    left::Left,
    matrix::{Rows, check_strided},
    right::Right,
};
use store::Sum;
use task::{INNER, tasks};

/// A product, of which a result is the sum: `left·right`.
#[derive(Clone, Copy)]
pub struct Term<'a> {
    /// `[rows, inner]`.
    pub left: &'a Left,
    /// `[inner, columns]`.
    pub right: Right<&'a dyn Rows>,
}

/// Where a result is written: rows of numbers that begin `stride` apart.
#[derive(Debug)]
pub struct Output<'a> {
    numbers: &'a mut [f32],
    dims: [usize; 2],
    stride: usize,
    adds: bool,
    bias: Option<&'a [f32]>,
}

impl<'a> Output<'a> {
    /// A matrix `[rows, columns]` whose rows lie one after the other. What is in it is replaced.
    ///
    /// # Panics
    ///
    /// If the slice is shorter.
    pub fn new(numbers: &'a mut [f32], dims: [usize; 2]) -> Self {
        Self::strided(numbers, dims, dims[1])
    }

    /// The same with rows that begin `stride` numbers apart. What lies between them stays.
    ///
    /// # Panics
    ///
    /// If the slice is shorter, or rows overlap.
    pub fn strided(numbers: &'a mut [f32], dims: [usize; 2], stride: usize) -> Self {
        check_strided(numbers.len(), dims, stride);
        Self { numbers, dims, stride, adds: false, bias: None }
    }

    /// The result is added to what is there.
    pub fn adding(self) -> Self {
        Self { adds: true, ..self }
    }

    /// The result is the sum of the products plus this in each row: `[columns]`.
    ///
    /// # Panics
    ///
    /// If the slice has another length.
    pub fn with_bias(self, bias: &'a [f32]) -> Self {
        let ([_, columns], found) = (self.dims, bias.len());
        assert!(found == columns, "a bias of {columns} numbers expected, got {found}");
        Self { bias: Some(bias), ..self }
    }
}

/// The sum of the products, whose factors are in bf16, as are the sums in `f32`.
///
/// Each result is computed in the same order for any number of threads. Sums that are nearer to zero than the smallest
/// normal number, 2⁻¹²⁶, may be zero.
///
/// # Panics
///
/// If shapes do not fit.
pub fn multiply(terms: &[Term], output: Output) {
    multiply_by(instructions(), terms, output);
}

/// [`multiply`] by instructions of one's choice.
///
/// # Panics
///
/// If shapes do not fit, or if the processor does not have the instructions.
pub fn multiply_by(by: Instructions, terms: &[Term], output: Output) {
    check(by, terms, output.dims);
    let Output { numbers, dims, stride, adds, bias } = output;
    into(by, terms, Target { numbers, dims, stride, adds, bias });
}

/// The same as new memory, row by row, plus a bias in each row: `[rows, columns]`.
///
/// # Panics
///
/// If there is no term, or shapes do not fit.
pub fn sum_of_products(terms: &[Term], bias: Option<&[f32]>) -> Vec<f32> {
    let ([rows, _], [_, columns]) = (terms[0].left.dims(), terms[0].right.dims());
    let (by, dims) = (instructions(), [rows, columns]);
    let bias = bias.inspect(|it| assert_eq!(it.len(), columns, "a bias of so many numbers"));
    check(by, terms, dims);
    let inner: usize = terms.iter().map(|it| it.left.dims()[1].next_multiple_of(32)).sum();
    if inner > INNER {
        let mut numbers = vec![0.0; rows * columns];
        let target = Target { numbers: &mut numbers[..], dims, stride: columns, adds: false, bias };
        into(by, terms, target);
        return numbers;
    }
    let mut numbers: Vec<f32> = Vec::with_capacity(rows * columns);
    let target = Target {
        numbers: &mut numbers.spare_capacity_mut()[..rows * columns],
        dims,
        stride: columns,
        adds: false,
        bias,
    };
    into(by, terms, target);
    // SAFETY: the result was written to all of them: its rows lie one after the other. To clear the memory before would
    // take a third as long as a product.
    unsafe { numbers.set_len(rows * columns) }
    numbers
}

/// Where a result is written, which may be memory that was never written to.
struct Target<'a, S> {
    numbers: &'a mut [S],
    dims: [usize; 2],
    stride: usize,
    adds: bool,
    bias: Option<&'a [f32]>,
}

fn check(by: Instructions, terms: &[Term], dims: [usize; 2]) {
    assert!(by.are_there(), "this processor has no {by}");
    let [rows, columns] = dims;
    for Term { left, right } in terms {
        let ([left_rows, inner], [right_rows, right_columns]) = (left.dims(), right.dims());
        assert!(
            [left_rows, right_columns] == dims && inner == right_rows,
            "a product of {left_rows} x {inner} with {right_rows} x {right_columns} numbers cannot be {rows} x {columns}"
        );
    }
}

fn into<S: Sum>(by: Instructions, terms: &[Term], target: Target<S>) {
    let [rows, columns] = target.dims;
    if rows == 0 || columns == 0 {
        return;
    }
    let inner: usize = terms.iter().map(|it| it.left.dims()[1]).sum();
    let multiplications = inner.saturating_mul(rows).saturating_mul(columns);
    let threads = if multiplications < WORTH_THREADS { 1 } else { rayon::current_num_threads() };
    let mut tasks = tasks(target, threads);
    match &mut tasks[..] {
        [task] => task.run(by, terms),
        tasks => tasks.par_iter_mut().for_each(|task| task.run(by, terms)),
    }
}

/// From this number of multiplications on, several threads are faster than one.
const WORTH_THREADS: usize = 1 << 20;
