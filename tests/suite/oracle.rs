//! The formulas of LoRA in `f64`, with plain loops: slow, but easy to check.

use burn::tensor::{Tensor, TensorData, backend::Backend};
use rand::{RngExt, SeedableRng, rngs::StdRng};

/// A matrix, row by row.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    pub rows: usize,
    pub cols: usize,
    pub data: Vec<f64>,
}

impl Matrix {
    pub fn from_fn(rows: usize, cols: usize, mut value: impl FnMut(usize, usize) -> f64) -> Self {
        let cells = (0..rows).flat_map(|row| (0..cols).map(move |col| (row, col)));
        Self { rows, cols, data: cells.map(|(row, col)| value(row, col)).collect() }
    }

    /// Values from `[-1, 1)`, rounded to `f32` so that a backend holds exactly the same values.
    pub fn random(rows: usize, cols: usize, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        Self::from_fn(rows, cols, |_, _| f64::from(rng.random_range(-1.0f32..1.0)))
    }

    pub fn at(&self, row: usize, col: usize) -> f64 {
        self.data[row * self.cols + col]
    }

    pub fn transpose(&self) -> Self {
        Self::from_fn(self.cols, self.rows, |row, col| self.at(col, row))
    }

    pub fn times(&self, other: &Self) -> Self {
        assert_eq!(self.cols, other.rows);
        Self::from_fn(self.rows, other.cols, |row, col| {
            (0..self.cols).map(|k| self.at(row, k) * other.at(k, col)).sum()
        })
    }

    pub fn plus(&self, other: &Self) -> Self {
        assert_eq!((self.rows, self.cols), (other.rows, other.cols));
        Self::from_fn(self.rows, self.cols, |row, col| self.at(row, col) + other.at(row, col))
    }

    /// Adds the single row `other` to each row.
    pub fn plus_row(&self, other: &Self) -> Self {
        assert_eq!((1, self.cols), (other.rows, other.cols));
        Self::from_fn(self.rows, self.cols, |row, col| self.at(row, col) + other.at(0, col))
    }

    pub fn map(&self, value: impl Fn(f64) -> f64) -> Self {
        Self { data: self.data.iter().map(|&it| value(it)).collect(), ..*self }
    }

    pub fn scaled(&self, by: f64) -> Self {
        self.map(|it| it * by)
    }

    pub fn sum_rows(&self) -> Self {
        Self::from_fn(1, self.cols, |_, col| (0..self.rows).map(|row| self.at(row, col)).sum())
    }

    pub fn tensor<B: Backend, const D: usize>(
        &self,
        shape: [usize; D],
        device: &B::Device,
    ) -> Tensor<B, D> {
        let values: Vec<f32> = self.data.iter().map(|&it| it as f32).collect();
        Tensor::from_data(TensorData::new(values, shape), device)
    }
}

/// A layer with its adapter, and an input.
#[derive(Clone, Debug)]
pub struct Problem {
    pub x: Matrix,
    pub w: Matrix,
    pub bias: Option<Matrix>,
    pub a: Matrix,
    pub b: Matrix,
    pub adapter_bias: Option<Matrix>,
    /// The scale `s`.
    pub scale: f64,
}

impl Problem {
    pub fn delta(&self) -> Matrix {
        self.a.times(&self.b).scaled(self.scale)
    }

    /// `x·(W + s·A·B) + b + s·c`, with the dense product that the crate avoids.
    pub fn output(&self) -> Matrix {
        let mut y = self.x.times(&self.w.plus(&self.delta()));
        if let Some(bias) = &self.bias {
            y = y.plus_row(bias);
        }
        if let Some(bias) = &self.adapter_bias {
            y = y.plus_row(&bias.scaled(self.scale));
        }
        y
    }

    /// A loss whose gradient differs from element to element: `Σ sin(y)`.
    pub fn loss(&self) -> f64 {
        self.output().data.iter().map(|y| y.sin()).sum()
    }

    /// The gradients of [`loss`](Self::loss) by the chain rule.
    pub fn gradients(&self) -> Gradients {
        self.gradients_from(&self.output().map(f64::cos))
    }

    /// The gradients by the chain rule, from `dy`, the gradient of the output.
    pub fn gradients_from(&self, dy: &Matrix) -> Gradients {
        let effective = self.w.plus(&self.delta());
        let dense = self.x.transpose().times(dy).scaled(self.scale);
        Gradients {
            x: dy.times(&effective.transpose()),
            a: dense.times(&self.b.transpose()),
            b: self.a.transpose().times(&dense),
            adapter_bias: dy.sum_rows().scaled(self.scale),
        }
    }

    /// The gradient of the loss with respect to the matrix that `of` returns, by central differences.
    pub fn differences(&self, of: impl Fn(&mut Self) -> &mut Matrix) -> Matrix {
        differences(self, of, Self::loss)
    }
}

/// The gradient of `loss` at `at` with respect to the matrix that `of` returns, by central differences.
pub fn differences<P: Clone>(
    at: &P,
    of: impl Fn(&mut P) -> &mut Matrix,
    loss: impl Fn(&P) -> f64,
) -> Matrix {
    let step = 1e-5;
    let shape = of(&mut at.clone()).clone();
    Matrix::from_fn(shape.rows, shape.cols, |row, col| {
        let loss_at = |offset: f64| {
            let mut moved = at.clone();
            of(&mut moved).data[row * shape.cols + col] += offset;
            loss(&moved)
        };
        (loss_at(step) - loss_at(-step)) / (2.0 * step)
    })
}

pub struct Gradients {
    pub x: Matrix,
    pub a: Matrix,
    pub b: Matrix,
    pub adapter_bias: Matrix,
}

/// Fails unless every element agrees within `tolerance` of the largest expected magnitude.
#[track_caller]
pub fn assert_close<B: Backend, const D: usize>(
    actual: Tensor<B, D>,
    expected: &Matrix,
    tolerance: f64,
) {
    let actual = actual.into_data().convert::<f64>().to_vec::<f64>().unwrap();
    assert_eq!(actual.len(), expected.data.len(), "number of elements");
    let largest = expected.data.iter().fold(1.0f64, |max, it| max.max(it.abs()));
    for (index, (actual, expected)) in actual.iter().zip(&expected.data).enumerate() {
        let error = (actual - expected).abs() / largest;
        assert!(error <= tolerance, "element {index}: expected {expected}, got {actual}");
    }
}

/// Fails unless every element has the same bits.
#[track_caller]
pub fn assert_identical<B1: Backend, B2: Backend, const D: usize>(
    actual: Tensor<B1, D>,
    expected: Tensor<B2, D>,
) {
    assert_eq!(actual.dims(), expected.dims());
    assert_eq!(bits(actual), bits(expected));
}

/// The bits of every element.
pub fn bits<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Vec<u32> {
    let values = tensor.into_data().to_vec::<f32>().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}
