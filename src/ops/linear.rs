//! A linear layer with its adapter in fewer passes over memory, for the CPU backends.
//!
//! With Burn's operations, `x·W + b + s·(x·A)·B` writes the update to a tensor `[batch, d_output]`, and
//! reads that tensor again for the sum. The backward pass does the same with `[batch, d_input]` for the
//! gradient of x. On a CPU these passes over memory cost several times as much as the arithmetic of the
//! update. Here both updates are added in place while they are computed. The layer is a single node of
//! the autodiff graph, so that the backward pass can use, for each gradient, the order of factors for
//! which CPU kernels are fast.
//!
//! The formula is the same.

mod node;

use burn::{
    backend::{Autodiff, autodiff::checkpoint::strategy::CheckpointStrategy},
    tensor::{DType, Tensor, backend::Backend},
};

use super::{
    backend::Cpu,
    bf16::{self, Side, pack},
    operation::Operation,
    pool::in_pool,
    rows::add_product,
};
use crate::quantized::Weight;

/// The values that the layer computes with.
pub(crate) struct AdaptedLinear<B: Backend> {
    /// The base's weight, a constant: `[d_input, d_output]`.
    pub weight: Weight<B>,
    /// The base's bias and the adapter's, as far as there are any: `[d_output]`.
    pub bias: Option<Tensor<B, 1>>,
    /// What the adapter reads, if that is not x: `[batch, d_input]`.
    pub read: Option<Tensor<B, 2>>,
    /// The factor A: `[d_input, rank]`.
    pub a: Tensor<B, 2>,
    /// The factor B: `[rank, d_output]`.
    pub b: Tensor<B, 2>,
    /// The scale s.
    pub scale: f64,
}

/// `x·W + b + s·(x·A)·B`, `[batch, d_input]` to `[batch, d_output]`, where all is in `f32`. With autodiff,
/// gradients reach x, what the adapter reads, A, B and the bias.
pub(crate) struct ForwardLinear;

impl Operation for ForwardLinear {
    type Input<B: Backend> = (Tensor<B, 2>, AdaptedLinear<B>);
    type Output<B: Backend> = Tensor<B, 2>;

    fn forward<K: Cpu>((x, layer): &(Tensor<K, 2>, AdaptedLinear<K>)) -> Option<Tensor<K, 2>> {
        layer.fits(x).then(|| layer.hidden_and_output(x.clone()).1)
    }

    fn tracked<K: Cpu, C: CheckpointStrategy>(
        (x, layer): &(Tensor<Autodiff<K, C>, 2>, AdaptedLinear<Autodiff<K, C>>),
    ) -> Option<Tensor<Autodiff<K, C>, 2>> {
        layer.fits(x).then(|| node::output_of(x.clone(), layer))
    }
}

impl<K: Cpu> AdaptedLinear<K> {
    /// The hidden tensor `s·(x·A)`, `[batch, rank]`, and the output.
    fn hidden_and_output(&self, x: Tensor<K, 2>) -> (Tensor<K, 2>, Tensor<K, 2>) {
        in_pool(x.dims()[0], self.weight.dims(), || {
            if self.weight.in_bf16(x.dims()[0]) {
                return self.in_bf16(x);
            }
            let read = self.read.as_ref().unwrap_or(&x).clone();
            let hidden = K::times_thin(read, self.a.clone()).mul_scalar(self.scale);
            let y = self.weight.times(x);
            let y = add_product(y, self.bias.clone(), hidden.clone(), self.b.clone());
            (hidden, y)
        })
    }

    fn in_bf16(&self, x: Tensor<K, 2>) -> (Tensor<K, 2>, Tensor<K, 2>) {
        let device = x.device();
        let (read, x) = (self.read.clone().map(pack), pack(x));
        let hidden = bf16::product(read.as_ref().unwrap_or(&x), &self.a, Side::Plain);
        let hidden = hidden.mul_scalar(self.scale);
        let (update, bias) = (Some([&hidden, &self.b]), self.bias.clone());
        let y = bf16::times(&x, &self.weight, Side::Plain, update, bias, &device);
        (hidden, y)
    }
}

impl<B: Backend> AdaptedLinear<B> {
    /// Whether all tensors are in `f32` and have the expected shapes. Otherwise Burn's operations are
    /// used, which report a wrong shape.
    fn fits(&self, x: &Tensor<B, 2>) -> bool {
        let ([d_input, d_output], [_, rank]) = (self.weight.dims(), self.a.dims());
        let (read, bias) = (self.read.as_ref().unwrap_or(x), self.bias.as_ref());
        let in_f32 = |it: &Tensor<B, 2>| it.dtype() == DType::F32;
        self.weight.is_in_f32()
            && [x, read, &self.a, &self.b].into_iter().all(in_f32)
            && bias.is_none_or(|it| it.dtype() == DType::F32 && it.dims() == [d_output])
            && x.dims()[1] == d_input
            && read.dims() == x.dims()
            && self.a.dims() == [d_input, rank]
            && self.b.dims() == [rank, d_output]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ops::{run, testing::test_on_each_backend},
        precision::Precision,
    };

    fn is_one_operation<B: Backend>() -> bool {
        let device = B::Device::default();
        let ones = |shape: [usize; 2]| Tensor::<B, 2>::ones(shape, &device);
        let weight = Weight::full(ones([3, 5]), Precision::F32);
        let (a, b) = (ones([3, 2]), ones([2, 5]));
        let layer = AdaptedLinear { weight, bias: None, read: None, a, b, scale: 0.5 };
        run::<ForwardLinear, B>(&(ones([4, 3]), layer)).is_some()
    }

    test_on_each_backend!(is_one_operation);
}
