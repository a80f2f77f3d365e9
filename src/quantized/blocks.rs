//! Blocks of GGUF files, unpacked by Burn's operations.

use burn::tensor::{DType, ElementConversion, Int, Tensor, TensorData, backend::Backend};
use burn_lora_kernels::BlockFormat;
use half::f16;

use super::words::{bytes, of_f16};

/// The numbers of rows that are held as a file has them, four bytes in a word: `[rows, words]` to `[rows, columns]`.
pub(super) fn unpacked<B: Backend>(
    format: BlockFormat,
    words: Tensor<B, 2, Int>,
    columns: usize,
) -> Tensor<B, 2> {
    let ([rows, width], block) = (words.dims(), format.block());
    let count = rows * (columns / block);
    // A row may be filled up to a whole word.
    let bytes = bytes(words.reshape([rows * width])).reshape([rows, 4 * width]);
    let bytes = bytes.narrow(1, 0, columns / block * format.bytes());
    let Parts { numbers, scales, minima } =
        Bytes(bytes.reshape([count, format.bytes()])).parts(format);
    let groups = scales.dims()[1];
    let numbers = numbers.reshape([count, groups, block / groups]);
    let mut numbers = numbers * scales.reshape([count, groups, 1]);
    if let Some(minima) = minima {
        numbers = numbers + minima.reshape([count, groups, 1]);
    }
    numbers.reshape([rows, columns])
}

/// What the numbers of blocks are made of.
struct Parts<B: Backend> {
    /// What codes stand for, before they are multiplied by a scale: `[blocks, numbers]`.
    numbers: Tensor<B, 2>,
    /// The scales of numbers that are next to each other: `[blocks, groups]`.
    scales: Tensor<B, 2>,
    /// What is added to them, in some formats: `[blocks, groups]`.
    minima: Option<Tensor<B, 2>>,
}

/// The bytes of blocks, each as a number of its own: `[blocks, bytes]`.
struct Bytes<B: Backend>(Tensor<B, 2, Int>);

impl<B: Backend> Bytes<B> {
    fn parts(&self, format: BlockFormat) -> Parts<B> {
        let around = |codes: Tensor<B, 2, Int>, zero: f32| float(codes) - zero;
        let (numbers, scales, minima) = match format {
            BlockFormat::Q5_0 => (around(self.five_bits(2), 16.0), self.half(0), None),
            BlockFormat::Q5_1 => (float(self.five_bits(4)), self.half(0), Some(self.half(2))),
            BlockFormat::Q4_K => {
                let (scales, minima) = self.six_bits();
                (float(self.codes(16, [4, 32], 4)), scales, Some(minima))
            }
            BlockFormat::Q5_K => {
                let (scales, minima) = self.six_bits();
                let codes = self.codes(48, [4, 32], 4) + self.codes(16, [1, 32], 1) * 16;
                (float(codes), scales, Some(minima))
            }
            BlockFormat::Q6_K => {
                let codes = self.codes(0, [2, 64], 4) + self.codes(128, [2, 32], 2) * 16;
                // To flip the highest bit of a signed byte adds 128.
                let scales = self.codes(192, [1, 16], 8).bitwise_xor_scalar(128.elem());
                (around(codes, 32.0), around(scales, 128.0) * self.half(208), None)
            }
            BlockFormat::Q2_K => {
                let both = float(self.codes(0, [1, 16], 4));
                let scales = both.clone().narrow(1, 0, 16) * self.half(80);
                let minima = -(both.narrow(1, 16, 16) * self.half(82));
                (float(self.codes(16, [2, 32], 2)), scales, Some(minima))
            }
            BlockFormat::Q3_K => {
                let codes = self.codes(32, [2, 32], 2) + self.codes(0, [1, 32], 1) * 4;
                let scales = self.codes(96, [1, 8], 4) + self.codes(104, [1, 4], 2) * 16;
                (around(codes, 4.0), around(scales, 32.0) * self.half(108), None)
            }
            BlockFormat::IQ4_NL => (levels(self.codes(2, [1, 16], 4)), self.half(0), None),
            BlockFormat::IQ4_XS => {
                let scales = self.codes(4, [4, 1], 4) + self.codes(2, [2, 1], 2) * 16;
                let scales = around(scales, 32.0) * self.half(0);
                (levels(self.codes(8, [8, 16], 4)), scales, None)
            }
            _ => unreachable!("no matrix is held in blocks of {format:?}"),
        };
        Parts { numbers, scales, minima }
    }

    /// Codes of so many bits, from a byte on, in bytes of these dimensions. The lowest bits of all bytes of a row come
    /// first: `[blocks, codes]`.
    fn codes(&self, start: usize, [rows, columns]: [usize; 2], bits: usize) -> Tensor<B, 2, Int> {
        let count = self.0.dims()[0];
        let bytes = self.0.clone().narrow(1, start, rows * columns);
        let bytes = bytes.reshape([count, rows, columns]);
        let part = |shift: usize| {
            let shifted = bytes.clone().bitwise_right_shift_scalar((shift as i32).elem());
            shifted.bitwise_and_scalar(((1 << bits) - 1).elem())
        };
        let parts = (0..8).step_by(bits).map(part).collect();
        Tensor::stack::<4>(parts, 2).reshape([count, rows * columns * 8 / bits])
    }

    /// The number of 16 bits from a byte on: `[blocks, 1]`.
    fn half(&self, start: usize) -> Tensor<B, 2> {
        let byte = |place: usize| self.0.clone().narrow(1, start + place, 1);
        let bits = byte(0) + byte(1) * 256;
        let count = bits.dims()[0];
        of_f16(bits.reshape([count])).reshape([count, 1])
    }

    /// Codes of which the fifth bits are in four bytes from `bits` on, and the others after them.
    fn five_bits(&self, bits: usize) -> Tensor<B, 2, Int> {
        self.codes(bits + 4, [1, 16], 4) + self.codes(bits, [4, 1], 1) * 16
    }

    /// The scales and the smallest numbers of eight groups.
    fn six_bits(&self) -> (Tensor<B, 2>, Tensor<B, 2>) {
        // Those of the first four groups are the lower bits of eight bytes. The upper two bits of these belong to the
        // other groups, of which the lower four bits are in four bytes.
        let bytes = self.codes(4, [1, 8], 8);
        let first = bytes.clone().bitwise_and_scalar(63.elem());
        let upper = bytes.bitwise_right_shift_scalar(6.elem());
        let others = self.codes(12, [1, 4], 4) + upper * 16;
        let both = |start: usize| {
            let parts = [&first, &others].map(|it| it.clone().narrow(1, start, 4));
            float(Tensor::cat(parts.to_vec(), 1))
        };
        (both(0) * self.half(0), -(both(4) * self.half(2)))
    }
}

fn float<B: Backend>(codes: Tensor<B, 2, Int>) -> Tensor<B, 2> {
    codes.float().cast(DType::F32)
}

/// What the codes of IQ4_NL and IQ4_XS stand for.
fn levels<B: Backend>(codes: Tensor<B, 2, Int>) -> Tensor<B, 2> {
    // In a block with the scale 1 they are the numbers themselves.
    let mut block = [0; 18];
    block[..2].copy_from_slice(&f16::ONE.to_le_bytes());
    for (byte, code) in block[2..].iter_mut().zip(0..) {
        *byte = code;
    }
    let mut numbers = [0.0; 32];
    BlockFormat::IQ4_NL.unpack(&block, &mut numbers);
    let (dims @ [count, size], device) = (codes.dims(), codes.device());
    let levels = TensorData::new(numbers[..16].to_vec(), [16]);
    let levels = Tensor::<B, 1>::from_data(levels, (&device, DType::F32));
    levels.select(0, codes.reshape([count * size])).reshape(dims)
}
