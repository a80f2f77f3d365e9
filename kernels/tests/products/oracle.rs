//! What products are compared with: sums in `f64` of the products of rounded numbers.

use burn_lora_kernels::{Instructions, Left, Matrix, Output, Right, Rows, Term, multiply_by};
use half::bf16;
use rand::{RngExt, SeedableRng, rngs::StdRng};

pub fn random(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// The instructions that are there.
pub fn there() -> impl Iterator<Item = Instructions> {
    Instructions::ALL.into_iter().filter(|it| it.are_there())
}

/// Two factors, `[rows, inner]` and `[inner, columns]`, each row by row.
#[derive(Clone, Debug)]
pub struct Factors {
    pub dims: [usize; 3],
    pub left: Vec<f32>,
    pub right: Vec<f32>,
}

/// How the right factor is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    Plain,
    Transposed,
}

pub const HELD: [Held; 2] = [Held::Plain, Held::Transposed];

impl Factors {
    pub fn new(dims: [usize; 3], mut number: impl FnMut() -> f32) -> Self {
        let [rows, inner, columns] = dims;
        let mut numbers = |count| (0..count).map(|_| number()).collect();
        Self { dims, left: numbers(rows * inner), right: numbers(inner * columns) }
    }

    /// Of small whole numbers, whose products and sums are exact in any order.
    pub fn whole(dims: [usize; 3], random: &mut StdRng) -> Self {
        Self::new(dims, || f32::from(random.random_range(-8i8..=8)))
    }

    /// Of numbers that have to be rounded.
    pub fn fractions(dims: [usize; 3], random: &mut StdRng) -> Self {
        Self::new(dims, || random.random_range(-1.0..1.0))
    }

    /// The right factor as it is held.
    pub fn right_as(&self, held: Held) -> Vec<f32> {
        let [_, inner, columns] = self.dims;
        match held {
            Held::Plain => self.right.clone(),
            Held::Transposed => transposed(&self.right, [inner, columns]),
        }
    }

    pub fn multiply(&self, by: Instructions, held: Held) -> Vec<f32> {
        let [rows, inner, columns] = self.dims;
        let left = Left::new(&Matrix::new(&self.left, [rows, inner]));
        let numbers = self.right_as(held);
        let matrix = matrix(&numbers, [inner, columns], held);
        let mut found = vec![f32::NAN; rows * columns];
        let term = Term { left: &left, right: right(&matrix, held) };
        multiply_by(by, &[term], Output::new(&mut found, [rows, columns]));
        found
    }

    /// The product, and the sums of magnitudes, by which errors are measured.
    pub fn expected(&self) -> (Vec<f64>, Vec<f64>) {
        let [rows, inner, columns] = self.dims;
        let [left, right] = [&self.left, &self.right]
            .map(|it| it.iter().map(|&it| rounded(it)).collect::<Vec<_>>());
        let (mut sums, mut magnitudes) = (vec![0.0; rows * columns], vec![0.0; rows * columns]);
        for row in 0..rows {
            let places = row * columns..(row + 1) * columns;
            let (sums, magnitudes) = (&mut sums[places.clone()], &mut magnitudes[places]);
            for place in 0..inner {
                let left: f64 = left[row * inner + place];
                let right: &[f64] = &right[place * columns..(place + 1) * columns];
                for ((sum, magnitude), right) in sums.iter_mut().zip(&mut *magnitudes).zip(right) {
                    *sum += left * right;
                    *magnitude += (left * right).abs();
                }
            }
        }
        (sums, magnitudes)
    }
}

pub fn matrix(numbers: &[f32], [inner, columns]: [usize; 2], held: Held) -> Matrix<'_, f32> {
    match held {
        Held::Plain => Matrix::new(numbers, [inner, columns]),
        Held::Transposed => Matrix::new(numbers, [columns, inner]),
    }
}

pub fn right(matrix: &dyn Rows, held: Held) -> Right<&dyn Rows> {
    match held {
        Held::Plain => Right::Plain(matrix),
        Held::Transposed => Right::Transposed(matrix),
    }
}

pub fn transposed(numbers: &[f32], [rows, columns]: [usize; 2]) -> Vec<f32> {
    (0..columns)
        .flat_map(|column| (0..rows).map(move |row| numbers[row * columns + column]))
        .collect()
}

/// The number that products are computed with.
pub fn rounded(number: f32) -> f64 {
    if number.is_subnormal() { 0.0 } else { bf16::from_f32(number).to_f64() }
}

/// Compares results with what is expected. A result is rounded to `f32` for each product that is added to it, and a few
/// times more where parts are put together, and a sum or product that is not normal may be zero.
pub fn assert_near(
    found: &[f32],
    (expected, magnitudes): &(Vec<f64>, Vec<f64>),
    inner: usize,
    what: &str,
) {
    assert_eq!(found.len(), expected.len());
    for (place, ((&found, &expected), magnitude)) in
        found.iter().zip(expected).zip(magnitudes).enumerate()
    {
        let inner = inner as f64;
        let bound = (inner + 8.0) * 2f64.powi(-24) * magnitude + inner * 2f64.powi(-126);
        let found = f64::from(found);
        // Infinities are the same, or there is none.
        let near = found == expected
            || found.is_nan() && expected.is_nan()
            || expected.is_finite() && (found - expected).abs() <= bound;
        assert!(near, "{what}, number {place}: {found} instead of {expected}, bound {bound}");
    }
}
