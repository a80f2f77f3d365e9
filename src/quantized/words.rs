//! Bytes in tensors. Burn has no tensors of bytes on every backend, so four are one word of 32 bits.

use burn::tensor::{DType, ElementConversion, Int, Tensor, TensorData, backend::Backend};

/// The bytes as words, the first in the lowest bits. Their number is a multiple of four.
pub(super) fn to_words<B: Backend, const D: usize>(
    bytes: &[u8],
    shape: [usize; D],
    device: &B::Device,
) -> Tensor<B, D, Int> {
    let (words, _) = bytes.as_chunks();
    let words: Vec<_> = words.iter().map(|&it| i32::from_le_bytes(it)).collect();
    Tensor::from_data(TensorData::new(words, shape), (device, DType::I32))
}

/// The bytes of the words again, each as a number of its own: `[count]` to `[4 · count]`.
pub(super) fn bytes<B: Backend>(words: Tensor<B, 1, Int>) -> Tensor<B, 1, Int> {
    let count = words.dims()[0];
    let byte = |bits: i32| {
        let shifted = words.clone().bitwise_right_shift_scalar(bits.elem());
        shifted.bitwise_and_scalar(255.elem())
    };
    Tensor::stack::<2>([0, 8, 16, 24].map(byte).to_vec(), 1).reshape([4 * count])
}
