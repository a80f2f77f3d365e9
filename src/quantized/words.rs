//! Bytes in tensors. Burn has no tensors of bytes on every backend, so four are one word of 32 bits.

use burn::tensor::{DType, ElementConversion, Int, Tensor, TensorData, backend::Backend};
use half::bf16;

/// The bytes of a word.
pub(super) const SIZE: usize = 4;

/// The bytes as words, the first in the lowest bits. They are whole words.
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
    parts(words, [0, 8, 16, 24], 0xff)
}

/// The halves of the words, the lower one first: `[count]` to `[2 · count]`.
pub(super) fn halves<B: Backend>(words: Tensor<B, 1, Int>) -> Tensor<B, 1, Int> {
    parts(words, [0, 16], 0xffff)
}

/// The numbers that have these bits in bfloat16. Burn has no operation that takes bits as a number, and GPUs may take
/// products near zero for zero, so each of them is looked up.
pub(super) fn of_bf16<B: Backend>(bits: Tensor<B, 1, Int>) -> Tensor<B, 1> {
    looked_up((0..=u16::MAX).map(|it| bf16::from_bits(it).to_f32()).collect(), bits)
}

/// The numbers that have these bits in half precision, which are finite: a whole number, which are the lower ten bits,
/// times a power of two, which the others name.
pub(super) fn of_f16<B: Backend>(bits: Tensor<B, 1, Int>) -> Tensor<B, 1> {
    let upper = bits.clone().bitwise_right_shift_scalar(10.elem());
    let whole = bits.bitwise_and_scalar(1023.elem()).float().cast(DType::F32);
    // All but the smallest have a highest bit that is not stored.
    let hidden = |it: u32| if it & 31 == 0 { 0.0 } else { 1024.0 };
    let power = |it: u32| {
        let sign = if it < 32 { 1.0 } else { -1.0 };
        sign * 2.0_f32.powi((it & 31).max(1) as i32 - 25)
    };
    let hidden = looked_up((0..64).map(hidden).collect(), upper.clone());
    (whole + hidden) * looked_up((0..64).map(power).collect(), upper)
}

/// The numbers at these places.
fn looked_up<B: Backend>(all: Vec<f32>, places: Tensor<B, 1, Int>) -> Tensor<B, 1> {
    let count = all.len();
    let all = TensorData::new(all, [count]);
    Tensor::<B, 1>::from_data(all, (&places.device(), DType::F32)).select(0, places)
}

/// What the mask leaves of the words, shifted by so many bits.
fn parts<B: Backend, const N: usize>(
    words: Tensor<B, 1, Int>,
    shifts: [i32; N],
    mask: i32,
) -> Tensor<B, 1, Int> {
    let count = words.dims()[0];
    let part = |bits: i32| {
        let shifted = words.clone().bitwise_right_shift_scalar(bits.elem());
        shifted.bitwise_and_scalar(mask.elem())
    };
    Tensor::stack::<2>(shifts.map(part).to_vec(), 1).reshape([N * count])
}
