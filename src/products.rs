//! Products with weights that may be quantized.

use burn::tensor::{Tensor, backend::Backend, module::linear};

use crate::{
    ops::{Dense, TimesWeight, run},
    precision::Precision,
    quantized::{Matrix, QuantizedWeight, Weight},
    tensors::{cast, transposed},
};

impl<B: Backend> QuantizedWeight<B> {
    /// The numbers that the codes stand for, in `f32`: `[rows, columns]`.
    pub fn dense(&self) -> Tensor<B, 2> {
        run::<Dense, B>(self).unwrap_or_else(|| self.unpacked())
    }
}

impl<B: Backend> Weight<B> {
    /// The weight itself, unpacked: `[d_input, d_output]`.
    pub fn matrix(&self) -> Tensor<B, 2> {
        match &self.matrix {
            Matrix::Full(weight) => weight.clone(),
            Matrix::Quantized(weight) => transposed(weight.dense()),
        }
    }

    /// `x·W + bias`: `[batch, d_input]` to `[batch, d_output]`. The gradient reaches x and the bias, and a full weight.
    pub fn forward(&self, x: Tensor<B, 2>, bias: Option<Tensor<B, 1>>) -> Tensor<B, 2> {
        if let Matrix::Full(weight) = &self.matrix
            && self.precision == Precision::F32
        {
            return linear(x, weight.clone(), bias);
        }
        let input = (x, self.clone());
        let y = run::<TimesWeight, B>(&input).unwrap_or_else(|| {
            let (x, _) = input;
            let matrix = cast(self.matrix(), x.dtype());
            x.matmul(matrix)
        });
        match bias {
            Some(bias) => y + bias.unsqueeze(),
            None => y,
        }
    }
}
