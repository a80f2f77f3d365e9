//! What a linear layer multiplies with.

use burn::tensor::{Tensor, backend::Backend};

use super::QuantizedWeight;

/// The weight of a linear layer, a constant: `[d_input, d_output]`.
#[derive(Clone, Debug)]
pub(crate) enum Weight<B: Backend> {
    Full(Tensor<B, 2>),
    /// The transpose of the weight.
    Quantized(QuantizedWeight<B>),
}

impl<B: Backend> Weight<B> {
    /// The shape, `[d_input, d_output]`.
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Self::Full(weight) => weight.dims(),
            Self::Quantized(weight) => {
                let [d_output, d_input] = weight.shape();
                [d_input, d_output]
            }
        }
    }
}
