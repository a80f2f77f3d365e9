//! Rows unpacked in the memory of the host.

use crate::quantized::{APART, Format, Levels};

/// Unpacks a row, or whole blocks of it, into `numbers`. In some formats there is a scale for each block, and in some a
/// smallest number.
#[inline(always)]
pub fn unpack_row(
    format: Format,
    bytes: &[u8],
    scales: &[f32],
    minima: Option<&[f32]>,
    numbers: &mut [f32],
) {
    // Each arm is compiled by itself, so that the loop over the bytes has no decision left in it.
    match (format.levels(), minima) {
        (Levels::Upper, _) => {
            for (number, &bytes) in numbers.iter_mut().zip(bytes.as_chunks().0) {
                *number = widened(bytes);
            }
        }
        (Levels::Half, _) => {
            for (number, &bytes) in numbers.iter_mut().zip(bytes.as_chunks().0) {
                *number = of_half(bytes);
            }
        }
        (Levels::Blocks(format), _) => {
            format.unpack(&bytes[..format.row_bytes(numbers.len())], numbers);
        }
        (Levels::Of(levels), _) => {
            let number = |code: u8, scale: f32, _| levels[usize::from(code & 15)] * scale;
            unpack_by(format, bytes, scales, None, numbers, number);
        }
        (Levels::Minus(zero), None) => {
            let zero = f32::from(zero);
            let number = |code: u8, scale: f32, _| (f32::from(code) - zero) * scale;
            unpack_by(format, bytes, scales, None, numbers, number);
        }
        (Levels::Minus(zero), minima) => {
            let zero = f32::from(zero);
            let number = |code: u8, scale: f32, least| (f32::from(code) - zero) * scale + least;
            unpack_by(format, bytes, scales, minima, numbers, number);
        }
    }
}

/// The number whose upper half these bytes are.
#[inline(always)]
pub(super) fn widened(bytes: [u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
}

/// The finite number that these bytes are in half precision. The exponent of an `f32` counts from 127 and that of a half
/// from 15, so the bits in the place of those of an `f32` are a number that is 2¹¹² times too small.
#[inline(always)]
pub fn of_half(bytes: [u8; 2]) -> f32 {
    const TOO_SMALL: f32 = f32::from_bits((127 + 112) << 23);

    let bits = u16::from_le_bytes(bytes);
    let magnitude = f32::from_bits(u32::from(bits & 0x7fff) << 13) * TOO_SMALL;
    f32::from_bits(magnitude.to_bits() | u32::from(bits & 0x8000) << 16)
}

#[inline(always)]
fn unpack_by(
    format: Format,
    bytes: &[u8],
    scales: &[f32],
    minima: Option<&[f32]>,
    numbers: &mut [f32],
    number: impl Fn(u8, f32, f32) -> f32,
) {
    let (size, packs_two) = (format.block(), format.packs_two());
    let blocks = numbers.chunks_mut(size).zip(bytes.chunks_exact(format.block_bytes()));
    for (block, (numbers, bytes)) in blocks.enumerate() {
        let (scale, least) = (scales[block], minima.map_or(0.0, |it| it[block]));
        let number = |code| number(code, scale, least);
        match (packs_two, numbers.len() == size) {
            (false, _) => bytes_to_numbers(bytes, numbers, number),
            (true, true) => halves_to_numbers(bytes, numbers, number),
            (true, false) => {
                let mut whole = [0.0; 64];
                halves_to_numbers(bytes, &mut whole[..size], number);
                numbers.copy_from_slice(&whole[..numbers.len()]);
            }
        }
    }
}

/// The numbers of codes of 8 bits. Whole groups are computed before they are written, which the compiler does
/// with vectors.
#[inline(always)]
fn bytes_to_numbers(bytes: &[u8], numbers: &mut [f32], number: impl Fn(u8) -> f32) {
    let (groups, rest) = numbers.as_chunks_mut::<APART>();
    let codes = bytes.as_chunks::<APART>().0;
    for (numbers, codes) in groups.iter_mut().zip(codes) {
        *numbers = group(codes, &number);
    }
    // In a row that ends within a group, the codes go on.
    for (to, &code) in rest.iter_mut().zip(codes.get(groups.len()).into_iter().flatten()) {
        *to = number(code);
    }
}

/// The same of codes of 4 bits, in whole groups.
#[inline(always)]
fn halves_to_numbers(bytes: &[u8], numbers: &mut [f32], number: impl Fn(u8) -> f32) {
    let groups = numbers.as_chunks_mut::<{ 2 * APART }>().0.iter_mut();
    for (numbers, bytes) in groups.zip(bytes.as_chunks::<APART>().0) {
        let (lower, upper) = numbers.split_at_mut(APART);
        lower.copy_from_slice(&group(bytes, |byte| number(byte & 15)));
        upper.copy_from_slice(&group(bytes, |byte| number(byte >> 4)));
    }
}

/// A number for each byte.
#[inline(always)]
fn group(bytes: &[u8; APART], number: impl Fn(u8) -> f32) -> [f32; APART] {
    // `map` of arrays is not always inlined, and then much slower.
    let mut numbers = [0.0; APART];
    for (to, &byte) in numbers.iter_mut().zip(bytes) {
        *to = number(byte);
    }
    numbers
}
