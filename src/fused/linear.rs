//! A linear layer with its adapter in fewer passes over memory, for the CPU backends.
//!
//! With Burn's operations, `x·W + b + s·(x·A)·B` writes the update to a tensor `[batch, d_output]`, and
//! reads that tensor again for the sum. The backward pass does the same with `[batch, d_input]` for the
//! gradient of x. On a CPU these passes over memory cost several times as much as the arithmetic of the
//! update. Here both updates are added in place while they are computed. The layer is a single node of
//! the autodiff graph, so that the backward pass can use, for each gradient, the order of factors for
//! which CPU kernels are fast.
//!
//! The formula is the same. `LoraAdapter::forward_on` uses this module on the backends of the features
//! `flex` and `ndarray`, with their default element types. In all other cases it uses Burn's operations.

use std::any::Any;

use burn::tensor::{DType, Tensor, backend::Backend};

use super::{
    cpu::{Cpu, SHARED, WAYS},
    rows::add_product,
};
use crate::quantized::Weight;

/// The values that the layer computes with.
pub(crate) struct Layer<B: Backend> {
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

/// A backend that computes the layer as one operation.
pub(super) trait Fused: Backend {
    /// `x·W + b + s·(x·A)·B`. On an autodiff backend, gradients reach x, what the adapter reads, A, B and the
    /// bias.
    fn forward(x: Tensor<Self, 2>, layer: &Layer<Self>) -> Tensor<Self, 2>;
}

/// The output of the layer, `[batch, d_input]` to `[batch, d_output]`; `None` if this module cannot
/// compute the layer on the backend, or with these types and shapes.
pub(crate) fn forward<B: Backend>(x: &Tensor<B, 2>, layer: &Layer<B>) -> Option<Tensor<B, 2>> {
    let read = layer.read.as_ref().unwrap_or(x);
    let in_f32 = [x, read].iter().all(|it| it.dtype() == DType::F32);
    if !layer.fits() || !in_f32 || read.dims() != x.dims() {
        return None;
    }
    WAYS.iter().find_map(|way| {
        let output = (way.linear)(x, layer)?;
        output.downcast().ok().map(|output| *output)
    })
}

/// The output of the layer on the backend K; `None` if `x` and `layer` are on another backend.
pub(super) fn run_on<K: Fused>(x: &dyn Any, layer: &dyn Any) -> Option<Box<dyn Any>> {
    let x: &Tensor<K, 2> = x.downcast_ref()?;
    Some(Box::new(K::forward(x.clone(), layer.downcast_ref()?)))
}

impl<K: Cpu> Fused for K {
    fn forward(x: Tensor<K, 2>, layer: &Layer<K>) -> Tensor<K, 2> {
        layer.hidden_and_output(x).1
    }
}

impl<K: Cpu> Layer<K> {
    /// The hidden tensor `s·(x·A)`, `[batch, rank]`, and the output.
    pub(super) fn hidden_and_output(&self, x: Tensor<K, 2>) -> (Tensor<K, 2>, Tensor<K, 2>) {
        in_pool(x.dims()[0], self.weight.dims(), || {
            let read = self.read.as_ref().unwrap_or(&x).clone();
            let hidden = K::times_thin(read, self.a.clone()).mul_scalar(self.scale);
            let y = match &self.weight {
                Weight::Full(weight) => K::product(x, weight.clone()),
                Weight::Quantized(weight) => weight.product(x),
            };
            let y = add_product(y, self.bias.clone(), hidden.clone(), self.b.clone());
            (hidden, y)
        })
    }
}

/// Runs `work` on a thread of rayon's pool if its products are large enough for `flex` to use that pool.
/// If `work` ran on another thread, each product would enter the pool by itself, and the pool's threads
/// would wake and stop for each product.
pub(super) fn in_pool<R: Send>(
    batch: usize,
    [d_input, d_output]: [usize; 2],
    work: impl FnOnce() -> R + Send,
) -> R {
    let shared = batch * d_input * d_output >= SHARED && rayon::current_num_threads() > 1;
    match shared {
        true => rayon::scope(|_| work()),
        false => work(),
    }
}

impl<B: Backend> Layer<B> {
    /// Whether all tensors are in `f32` and have the expected shapes. Otherwise Burn's operations are
    /// used, which report a wrong shape.
    fn fits(&self) -> bool {
        let ([d_input, d_output], [_, rank]) = (self.weight.dims(), self.a.dims());
        let bias = self.bias.as_ref();
        let weight = match &self.weight {
            Weight::Full(weight) => Some(weight),
            Weight::Quantized(_) => None,
        };
        let in_f32 = |it: &Tensor<B, 2>| it.dtype() == DType::F32;
        weight.is_none_or(in_f32)
            && [&self.a, &self.b].into_iter().all(in_f32)
            && bias.is_none_or(|it| it.dtype() == DType::F32 && it.dims() == [d_output])
            && self.a.dims() == [d_input, rank]
            && self.b.dims() == [rank, d_output]
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::autodiff::checkpoint::strategy::BalancedCheckpointing;

    use super::*;

    fn is_one_operation<B: Backend>() -> bool {
        let device = B::Device::default();
        let ones = |shape: [usize; 2]| Tensor::<B, 2>::ones(shape, &device);
        let (weight, a, b) = (ones([3, 5]), ones([3, 2]), ones([2, 5]));
        let weight = Weight::Full(weight);
        let layer = Layer { weight, bias: None, read: None, a, b, scale: 0.5 };
        forward(&ones([4, 3]), &layer).is_some()
    }

    #[cfg(feature = "flex")]
    #[test]
    fn the_layer_is_one_operation_on_flex() {
        use burn::backend::{Autodiff, Flex};

        assert!(is_one_operation::<Flex>());
        assert!(is_one_operation::<Autodiff<Flex>>());
        assert!(is_one_operation::<Autodiff<Flex, BalancedCheckpointing>>());
    }

    #[cfg(feature = "ndarray")]
    #[test]
    fn the_layer_is_one_operation_on_ndarray_in_single_precision() {
        use burn::backend::{Autodiff, NdArray};

        assert!(is_one_operation::<NdArray>());
        assert!(is_one_operation::<Autodiff<NdArray>>());
        assert!(is_one_operation::<Autodiff<NdArray, BalancedCheckpointing>>());
        assert!(!is_one_operation::<Autodiff<NdArray<f64>>>());
    }
}
