//! Products with the weight of a layer: the one place that knows how weights are held and multiplied.

use burn::{
    backend::{Autodiff, autodiff::checkpoint::strategy::CheckpointStrategy},
    tensor::{DType, Tensor, backend::Backend},
};

use super::{
    autodiff::inner,
    backend::Cpu,
    bf16::{self, Side, pack},
    quantized::{FEW, gradient, product, without_autodiff},
    rows::transposed,
};
use crate::{
    precision::Precision,
    quantized::{Matrix, Weight},
};

impl<K: Cpu> Weight<K> {
    /// `x·W`: `[batch, d_input]` to `[batch, d_output]`.
    pub(super) fn times(&self, x: Tensor<K, 2>) -> Tensor<K, 2> {
        if self.in_bf16(x.dims()[0]) {
            let device = x.device();
            return bf16::times(&pack(x), self, Side::Plain, None, None, &device);
        }
        match &self.matrix {
            Matrix::Full(weight) => K::product(x, weight.clone()),
            Matrix::Quantized(weight) => product(x, weight),
        }
    }

    /// `y·Wᵀ`: `[batch, d_output]` to `[batch, d_input]`.
    pub(super) fn times_transposed(&self, y: Tensor<K, 2>) -> Tensor<K, 2> {
        if self.in_bf16(y.dims()[0]) {
            let device = y.device();
            return bf16::times(&pack(y), self, Side::Transposed, None, None, &device);
        }
        let weight = match &self.matrix {
            Matrix::Full(weight) => weight,
            Matrix::Quantized(weight) => return gradient(y, weight),
        };
        let ([batch, _], [d_input, d_output]) = (y.dims(), weight.dims());
        // CPU kernels reorder a transposed weight before they multiply. For few rows it is cheaper to
        // compute `(W·yᵀ)ᵀ`, which reorders the input and the output instead.
        if batch * (d_input + d_output) > d_input * d_output {
            return K::product(y, weight.clone().transpose());
        }
        transposed(K::product(weight.clone(), transposed(y)))
    }

    /// Whether so many rows are multiplied in bf16.
    pub(super) fn in_bf16(&self, batch: usize) -> bool {
        self.precision == Precision::Bf16 && batch > FEW
    }
}

impl<B: Backend> Weight<B> {
    /// Whether its numbers are in `f32`, or become that.
    pub(super) fn is_in_f32(&self) -> bool {
        match &self.matrix {
            Matrix::Full(weight) => weight.dtype() == DType::F32,
            Matrix::Quantized(_) => true,
        }
    }
}

/// The weight on the backend without autodiff.
pub(super) fn plain<K: Cpu, C: CheckpointStrategy>(weight: &Weight<Autodiff<K, C>>) -> Weight<K> {
    let matrix = match &weight.matrix {
        Matrix::Full(weight) => Matrix::Full(inner(weight)),
        Matrix::Quantized(weight) => Matrix::Quantized(without_autodiff(weight)),
    };
    Weight { matrix, precision: weight.precision }
}
