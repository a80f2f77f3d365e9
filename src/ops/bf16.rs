//! Products whose factors are rounded to bf16 as they are packed, with sums in `f32`.
//!
//! A factor is packed once for all that it is multiplied with: x with the weight and with A, and the gradient of the
//! output with both transposed. The update of the adapter is part of the sum that the weight's product is.

use burn::tensor::{Tensor, ops::FloatTensor};
use burn_lora_kernels::{Left, Matrix as Numbers, Right, Rows, Term, sum_of_products};

use super::{
    backend::Cpu,
    quantized::Unpacked,
    rows::{of_rows, row_by_row, rows},
};
use crate::{
    quantized::{Matrix, Weight},
    tensors::primitive,
};

/// Which side of a weight is multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// `x·W`
    Plain,
    /// `y·Wᵀ`
    Transposed,
}

/// The matrix, rounded and packed.
pub(super) fn pack<K: Cpu>(matrix: Tensor<K, 2>) -> Left {
    let (dims, matrix) = (matrix.dims(), row_by_row(matrix));
    Left::new(&Numbers::new(rows::<K>(&matrix), dims))
}

/// A packed matrix times another, or the transpose of that.
pub(super) fn product<K: Cpu>(left: &Left, right: &Tensor<K, 2>, side: Side) -> Tensor<K, 2> {
    let (stored, device) = (Stored::of(right), right.device());
    let right = stored.numbers();
    of_terms(&[Term { left, right: right.on(side) }], None, &device)
}

/// A packed matrix times the weight, or its transpose, plus an update `hidden·up` and a bias.
pub(super) fn times<K: Cpu>(
    left: &Left,
    weight: &Weight<K>,
    side: Side,
    update: Option<[&Tensor<K, 2>; 2]>,
    bias: Option<Tensor<K, 1>>,
    device: &K::Device,
) -> Tensor<K, 2> {
    let bias = bias.map(row_by_row);
    let bias = bias.as_ref().map(rows::<K>);
    let update = update.map(|[hidden, up]| (pack(hidden.clone()), Stored::of(up)));
    let update = update.as_ref().map(|(hidden, up)| (hidden, up.numbers()));
    let of = |right: Right<&dyn Rows>| {
        let update = update.as_ref();
        let update = update.map(|(left, up)| Term { left, right: up.on(Side::Plain) });
        let terms: Vec<_> = [Term { left, right }].into_iter().chain(update).collect();
        of_terms(&terms, bias, device)
    };
    match &weight.matrix {
        Matrix::Full(weight) => {
            let weight = Stored::of(weight);
            of(weight.numbers().on(side))
        }
        Matrix::Quantized(weight) => Unpacked::of(weight, |columns| {
            let weight = Held::Columns(columns);
            of(weight.on(side))
        }),
    }
}

fn of_terms<K: Cpu>(terms: &[Term], bias: Option<&[f32]>, device: &K::Device) -> Tensor<K, 2> {
    let ([rows, _], [_, columns]) = (terms[0].left.dims(), terms[0].right.dims());
    of_rows(sum_of_products(terms, bias), [rows, columns], device)
}

/// A matrix as something holds its rows or its columns.
#[derive(Clone, Copy)]
enum Held<R> {
    Rows(R),
    /// What is held is the transpose.
    Columns(R),
}

impl<R: Rows> Held<R> {
    fn on(&self, side: Side) -> Right<&dyn Rows> {
        match (self, side) {
            (Self::Rows(rows), Side::Plain) => Right::Plain(rows),
            (Self::Rows(rows), Side::Transposed) => Right::Transposed(rows),
            (Self::Columns(rows), Side::Plain) => Right::Transposed(rows),
            (Self::Columns(rows), Side::Transposed) => Right::Plain(rows),
        }
    }
}

/// A tensor whose rows or columns lie one after the other.
struct Stored<K: Cpu> {
    held: Held<FloatTensor<K>>,
    dims: [usize; 2],
}

impl<K: Cpu> Stored<K> {
    /// The matrix; it is copied if it is stored otherwise.
    fn of(matrix: &Tensor<K, 2>) -> Self {
        let (dims, transpose) = (matrix.dims(), primitive(matrix.clone().transpose()));
        let by_row = K::rows(&primitive(matrix.clone())).is_some();
        let held = match K::rows(&transpose) {
            Some(_) if !by_row => Held::Columns(transpose),
            _ => Held::Rows(row_by_row(matrix.clone())),
        };
        Self { held, dims }
    }

    fn numbers(&self) -> Held<Numbers<'_, f32>> {
        let [height, width] = self.dims;
        match &self.held {
            Held::Rows(it) => Held::Rows(Numbers::new(rows::<K>(it), [height, width])),
            Held::Columns(it) => Held::Columns(Numbers::new(rows::<K>(it), [width, height])),
        }
    }
}
