//! What a linear layer multiplies with.

use burn::tensor::{FloatDType, Tensor, backend::Backend, module::linear};

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
    #[cfg(any(feature = "flex", feature = "ndarray"))]
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Self::Full(weight) => weight.dims(),
            Self::Quantized(weight) => {
                let [d_output, d_input] = weight.shape();
                [d_input, d_output]
            }
        }
    }

    /// The weight itself, unpacked: `[d_input, d_output]`.
    pub fn matrix(&self) -> Tensor<B, 2> {
        match self {
            Self::Full(weight) => weight.clone(),
            Self::Quantized(weight) => weight.dense().transpose(),
        }
    }

    /// `x·W + bias`: `[batch, d_input]` to `[batch, d_output]`. The gradient reaches x and the bias.
    pub fn forward(&self, x: Tensor<B, 2>, bias: Option<Tensor<B, 1>>) -> Tensor<B, 2> {
        match self {
            Self::Full(weight) => linear(x, weight.clone(), bias),
            Self::Quantized(weight) => {
                let y = weight.product(x);
                match bias {
                    Some(bias) => y + bias.unsqueeze(),
                    None => y,
                }
            }
        }
    }
}

impl<B: Backend> QuantizedWeight<B> {
    /// `x·Wᵀ`, for the matrix W: `[batch, columns]` to `[batch, rows]`. The gradient reaches x.
    pub fn product(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        #[cfg(any(feature = "flex", feature = "ndarray"))]
        if let Some(y) = crate::fused::times_quantized(&x, self) {
            return y;
        }
        let matrix = self.dense().cast(FloatDType::from(x.dtype()));
        x.matmul(matrix.transpose())
    }
}
