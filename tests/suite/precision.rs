//! Products in bf16: outputs and gradients are the plain formulas of the rounded factors, in double precision. How far
//! they may be from that is computed along with them. Backends that ignore the setting have nothing rounded.

mod base;
mod conv;
mod embedding;
mod gradients;
mod linear;
mod models;
mod multiplied;
mod portable;
mod same;
mod training;

use burn::tensor::{
    Tensor,
    backend::{AutodiffBackend, Backend},
};
use half::bf16;

use crate::{
    model::{Plain, Train, device},
    oracle::{Matrix, Problem},
};

type Gradients = <Train as AutodiffBackend>::Gradients;

/// Whether the backend of the tests multiplies in bf16.
const THERE: bool = !cfg!(feature = "wgpu");

/// Products of up to so many rows are in `f32`.
const FEW: usize = 4;

/// The error of one rounding to `f32`.
const STEP: f64 = 1.0 / (1 << 24) as f64;

/// How many roundings, of the sum of all magnitudes, a sum of products may have.
const ROUNDINGS: f64 = 8.0;

/// Whether products of so many rows are in bf16.
fn rounds(rows: usize) -> bool {
    THERE && rows > FEW
}

fn to_bf16(number: f64) -> f64 {
    f64::from(bf16::from_f32(number as f32))
}

/// Numbers, and how far from them rounding in `f32` may have taken a result.
#[derive(Clone, Debug)]
struct Near {
    values: Matrix,
    errors: Matrix,
}

impl Near {
    fn exact(values: &Matrix) -> Self {
        Self { values: values.clone(), errors: values.scaled(0.0) }
    }

    /// The numbers as factors of a product, which are rounded if `rounds`. A number that is near to the middle of
    /// two may be rounded to either.
    fn factor(&self, rounds: bool) -> Self {
        if !rounds {
            return self.clone();
        }
        let values = self.values.map(to_bf16);
        let (rows, cols) = (values.rows, values.cols);
        let errors = Matrix::from_fn(rows, cols, |row, col| {
            let (number, error) = (self.values.at(row, col), self.errors.at(row, col));
            let off = |other: f64| (to_bf16(other) - values.at(row, col)).abs();
            off(number - error).max(off(number + error))
        });
        Self { values, errors }
    }

    fn times(&self, other: &Self) -> Self {
        let [left, right] = [self, other].map(|it| it.values.map(f64::abs));
        let rounding = left.times(&right).scaled(ROUNDINGS * STEP);
        let from_left = self.errors.times(&right.plus(&other.errors));
        let errors = rounding.plus(&from_left).plus(&left.times(&other.errors));
        Self { values: self.values.times(&other.values), errors }
    }

    fn plus(&self, other: &Self) -> Self {
        let values = self.values.plus(&other.values);
        let rounding = values.map(|it| 2.0 * STEP * it.abs());
        Self { values, errors: self.errors.plus(&other.errors).plus(&rounding) }
    }

    /// Adds the same row to each.
    fn plus_row(&self, row: &Matrix) -> Self {
        self.plus(&Self::exact(&Matrix::from_fn(self.values.rows, row.cols, |_, col| {
            row.data[col]
        })))
    }

    fn scaled(&self, by: f64) -> Self {
        self.times_row(&Matrix::from_fn(1, self.values.cols, |_, _| by))
    }

    /// Multiplies each column by a number, which is rounded to `f32`.
    fn times_row(&self, row: &Matrix) -> Self {
        let of = |matrix: &Matrix, more: f64| {
            Matrix::from_fn(matrix.rows, matrix.cols, |at, col| {
                matrix.at(at, col) * row.data[col] * more
            })
        };
        let rounding = of(&self.values, 2.0 * STEP).map(f64::abs);
        Self {
            values: of(&self.values, 1.0),
            errors: of(&self.errors, 1.0).map(f64::abs).plus(&rounding),
        }
    }

    fn transpose(&self) -> Self {
        Self { values: self.values.transpose(), errors: self.errors.transpose() }
    }
}

/// Fails unless each number is as near as it is to be.
#[track_caller]
fn assert_near<B: Backend, const D: usize>(of: &str, actual: Tensor<B, D>, expected: &Near) {
    let actual: Vec<_> = actual.into_data().iter::<f64>().collect();
    assert_eq!(actual.len(), expected.values.data.len(), "{of}: the number of elements");
    let expected = expected.values.data.iter().zip(&expected.errors.data);
    for (index, (actual, (expected, error))) in actual.iter().zip(expected).enumerate() {
        let found = (actual - expected).abs();
        assert!(
            found <= *error,
            "{of}, {index}: {actual} is {found} from {expected}, and may be {error}"
        );
    }
}

/// The layer's formula with rounded factors, as far as products of so many rows have them.
#[derive(Clone, Copy)]
struct Formula<'a> {
    problem: &'a Problem,
    rounds: bool,
}

impl<'a> Formula<'a> {
    fn of(problem: &'a Problem) -> Self {
        Self { problem, rounds: rounds(problem.x.rows) }
    }

    fn factor(&self, matrix: &Matrix) -> Near {
        Near::exact(matrix).factor(self.rounds)
    }

    /// `x·W`
    fn base(&self) -> Near {
        self.factor(&self.problem.x).times(&self.factor(&self.problem.w))
    }

    /// `s·(x·A)`, of what the adapter reads.
    fn hidden(&self, read: &Matrix) -> Near {
        self.factor(read).times(&self.factor(&self.problem.a)).scaled(self.problem.scale)
    }

    /// What the adapter adds, without its bias.
    fn update(&self, read: &Matrix) -> Near {
        self.hidden(read).factor(self.rounds).times(&self.factor(&self.problem.b))
    }

    fn with_bias(&self, y: Near) -> Near {
        let y = self.problem.bias.iter().fold(y, |y, bias| y.plus_row(bias));
        let bias = self.problem.adapter_bias.as_ref();
        bias.iter().fold(y, |y, bias| y.plus_row(&bias.scaled(self.problem.scale)))
    }

    fn output(&self) -> Near {
        self.with_bias(self.base().plus(&self.update(&self.problem.x)))
    }

    /// `dy·Wᵀ`
    fn dx_of_base(&self, dy: &Matrix) -> Near {
        self.factor(dy).times(&self.factor(&self.problem.w).transpose())
    }

    /// `dh = s·(dy·Bᵀ)`
    fn d_hidden(&self, dy: &Matrix) -> Near {
        let b = self.factor(&self.problem.b).transpose();
        self.factor(dy).times(&b).scaled(self.problem.scale)
    }

    /// `dh·Aᵀ`, which is the gradient of what the adapter reads.
    fn dx_of_update(&self, dy: &Matrix) -> Near {
        let a = self.factor(&self.problem.a).transpose();
        self.d_hidden(dy).factor(self.rounds).times(&a)
    }

    fn da(&self, read: &Matrix, dy: &Matrix) -> Near {
        Near::exact(&read.transpose()).times(&self.d_hidden(dy))
    }

    fn db(&self, read: &Matrix, dy: &Matrix) -> Near {
        self.hidden(read).transpose().times(&Near::exact(dy))
    }
}

/// A layer of this size and its input, for rounding to matter in each factor.
fn problem(rows: usize, [d_input, d_output]: [usize; 2], rank: usize, seed: u64) -> Problem {
    let random = |rows, cols, of| Matrix::random(rows, cols, 10 * seed + of);
    Problem {
        x: random(rows, d_input, 1),
        w: random(d_input, d_output, 2),
        bias: Some(random(1, d_output, 3)),
        a: random(d_input, rank, 4),
        b: random(rank, d_output, 5),
        adapter_bias: None,
        scale: 0.7,
    }
}

/// Sizes with several rows, odd ones, and some for several tiles and threads.
const SIZES: [(usize, [usize; 2], usize); 6] = [
    (5, [3, 7], 2),
    (6, [1, 2], 1),
    (33, [70, 31], 4),
    (40, [32, 65], 5),
    (200, [96, 130], 8),
    (FEW, [9, 5], 2),
];

fn random<B: Backend, const D: usize>(shape: [usize; D], seed: u64) -> Tensor<B, D> {
    Matrix::random(1, shape.iter().product(), seed).tensor(shape, &device::<B>())
}

/// The output, the gradient of `Σ dy·y` with respect to x, and those of the parameters.
fn backward<const D: usize, const E: usize>(
    x: Tensor<Train, D>,
    dy: Tensor<Train, E>,
    layer: impl Fn(Tensor<Train, D>) -> Tensor<Train, E>,
) -> (Tensor<Plain, E>, Tensor<Plain, D>, Gradients) {
    let x = x.require_grad();
    let y = layer(x.clone());
    let grads = (y.clone() * dy).sum().backward();
    (y.inner(), x.grad(&grads).expect("x has a gradient"), grads)
}
