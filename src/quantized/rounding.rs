//! Numbers rounded to GGUF's types.
//!
//! The formulas are those of llama.cpp's package `gguf`, with the same roundings in between, so that the bytes are the
//! same.

use half::{bf16, f16};

use super::GgufType;

/// The numbers of a block.
const BLOCK: usize = 32;

type Block = [f32; BLOCK];

/// The numbers in whole blocks, if there is a formula for the type.
pub(super) fn pack(kind: GgufType, numbers: &[f32]) -> Option<Vec<u8>> {
    let blocks = |round: fn(&Block, &mut Vec<u8>)| {
        let mut bytes = Vec::with_capacity(numbers.len() / BLOCK * kind.block()[1]);
        numbers.as_chunks().0.iter().for_each(|block| round(block, &mut bytes));
        bytes
    };
    Some(match kind {
        GgufType::F16 => numbers.iter().flat_map(|&it| f16::from_f32(it).to_le_bytes()).collect(),
        GgufType::BF16 => numbers.iter().flat_map(|&it| bf16::from_f32(it).to_le_bytes()).collect(),
        GgufType::Q8_0 => blocks(q8_0),
        GgufType::Q4_0 => {
            blocks(|block, bytes| put_nibbles(&around_zero(block, 8.0, bytes), bytes))
        }
        GgufType::Q4_1 => blocks(|block, bytes| put_nibbles(&from_least(block, 15, bytes), bytes)),
        GgufType::Q5_0 => blocks(|block, bytes| put_fives(&around_zero(block, 16.0, bytes), bytes)),
        GgufType::Q5_1 => blocks(|block, bytes| put_fives(&from_least(block, 31, bytes), bytes)),
        _ => return None,
    })
}

/// The inverse of a scale.
fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

fn put_half(number: f32, bytes: &mut Vec<u8>) {
    bytes.extend(f16::from_f32(number).to_le_bytes());
}

/// 127 steps to each side of zero, up to the largest magnitude.
fn q8_0(block: &Block, bytes: &mut Vec<u8>) {
    let scale = block.iter().fold(0.0_f32, |most, it| most.max(it.abs())) / 127.0;
    put_half(scale, bytes);
    let inverse = inverse(scale);
    bytes.extend(block.map(|it| (it * inverse).round() as i8 as u8));
}

/// So many steps to one side of zero, that of the number with the largest magnitude, and one less to the other.
fn around_zero(block: &Block, steps: f32, bytes: &mut Vec<u8>) -> [u8; BLOCK] {
    let largest =
        block.iter().fold(0.0_f32, |most, &it| if it.abs() > most.abs() { it } else { most });
    let scale = largest / -steps;
    put_half(scale, bytes);
    let (inverse, last) = (inverse(scale), 2.0 * steps - 1.0);
    block.map(|it| ((it * inverse) + (steps + 0.5)).trunc().min(last) as u8)
}

/// So many steps from the least number to the largest.
fn from_least(block: &Block, steps: u8, bytes: &mut Vec<u8>) -> [u8; BLOCK] {
    let least = block.iter().copied().fold(f32::INFINITY, f32::min);
    let largest = block.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let scale = (largest - least) / f32::from(steps);
    put_half(scale, bytes);
    put_half(least, bytes);
    let inverse = inverse(scale);
    block.map(|it| (((it - least) * inverse + 0.5).trunc() as u8).min(steps))
}

/// The lower four bits of the codes: those of the first half of the block are below those of the second.
fn put_nibbles(codes: &[u8; BLOCK], bytes: &mut Vec<u8>) {
    let (first, second) = codes.split_at(BLOCK / 2);
    bytes.extend(first.iter().zip(second).map(|(first, second)| first & 15 | second << 4));
}

/// The fifth bits of the codes, then the others.
fn put_fives(codes: &[u8; BLOCK], bytes: &mut Vec<u8>) {
    let fifth = |(at, code): (usize, &u8)| u32::from(code >> 4) << at;
    let fifths: u32 = codes.iter().enumerate().map(fifth).sum();
    bytes.extend(fifths.to_le_bytes());
    put_nibbles(codes, bytes);
}
