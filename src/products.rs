//! Products with weights that may be quantized.

use burn::tensor::{Tensor, backend::Backend, module::linear};

use crate::{
    ops::{Dense, TimesQuantized, run},
    quantized::{QuantizedWeight, Weight},
    tensors::{cast, transposed},
};

impl<B: Backend> QuantizedWeight<B> {
    /// The numbers that the codes stand for, in `f32`: `[rows, columns]`.
    pub fn dense(&self) -> Tensor<B, 2> {
        run::<Dense, B>(self).unwrap_or_else(|| self.unpacked())
    }

    /// `x·Wᵀ`, for the matrix W: `[batch, columns]` to `[batch, rows]`. The gradient reaches x.
    pub(crate) fn product(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let input = (x, self.clone());
        run::<TimesQuantized, B>(&input).unwrap_or_else(|| {
            let (x, _) = input;
            let matrix = cast(self.dense(), x.dtype());
            x.matmul(transposed(matrix))
        })
    }
}

impl<B: Backend> Weight<B> {
    /// The weight itself, unpacked: `[d_input, d_output]`.
    pub fn matrix(&self) -> Tensor<B, 2> {
        match self {
            Self::Full(weight) => weight.clone(),
            Self::Quantized(weight) => transposed(weight.dense()),
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
