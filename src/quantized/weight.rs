//! What a linear layer multiplies with.

use burn::tensor::{Tensor, backend::Backend};

use super::QuantizedWeight;
use crate::precision::Precision;

/// The weight of a linear layer, `[d_input, d_output]`, and how it is multiplied.
#[derive(Clone, Debug)]
pub(crate) struct Weight<B: Backend> {
    pub matrix: Matrix<B>,
    pub precision: Precision,
}

/// How the weight is held.
#[derive(Clone, Debug)]
pub(crate) enum Matrix<B: Backend> {
    Full(Tensor<B, 2>),
    /// A constant: the transpose of the weight.
    Quantized(QuantizedWeight<B>),
}

impl<B: Backend> Weight<B> {
    pub fn full(matrix: Tensor<B, 2>, precision: Precision) -> Self {
        Self { matrix: Matrix::Full(matrix), precision }
    }

    pub fn quantized(matrix: QuantizedWeight<B>, precision: Precision) -> Self {
        Self { matrix: Matrix::Quantized(matrix), precision }
    }

    /// The shape, `[d_input, d_output]`.
    pub fn dims(&self) -> [usize; 2] {
        match &self.matrix {
            Matrix::Full(weight) => weight.dims(),
            Matrix::Quantized(weight) => {
                let [d_output, d_input] = weight.shape();
                [d_input, d_output]
            }
        }
    }
}
