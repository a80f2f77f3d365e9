//! Comparisons of tensors.

use burn::tensor::Tensor;

use super::backend::Plain;

/// The bits of every element.
pub fn bits(tensor: Tensor<Plain, 2>) -> Vec<u32> {
    let data = tensor.into_data();
    data.iter::<f32>().map(f32::to_bits).collect()
}

/// The largest absolute value of an element.
pub fn largest(tensor: Tensor<Plain, 2>) -> f64 {
    tensor.abs().max().into_data().iter::<f64>().fold(0.0, f64::max)
}
