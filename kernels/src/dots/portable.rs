//! Codes in plain Rust.

use super::{
    layout::{BLOCK, Format, Packing},
    part::{Part, Sums},
};

/// Adds the products of a part, from a block on, whose number is even.
pub(super) fn add<F: Format, const N: usize>(part: Part<N>, from: usize, sums: &mut [Sums; N]) {
    let zero = i32::from(F::LAYOUT.zero);
    for block in from..part.blocks() {
        let mut codes = [0; BLOCK];
        read::<F>(part.bytes, block, &mut codes);
        for ((x, factors), sums) in part.x.iter().zip(part.factors).zip(&mut *sums) {
            let (x, factors) = (&x[block], factors[block]);
            let sums = &mut sums[block % 2 * 8..][..8];
            for (lane, (codes, x)) in
                codes.as_chunks::<4>().0.iter().zip(x.as_chunks::<4>().0).enumerate()
            {
                let products =
                    codes.iter().zip(x).map(|(&code, &x)| (i32::from(code) - zero) * i32::from(x));
                sums[lane] += products.sum::<i32>() as f32 * factors[lane / 4];
            }
        }
    }
}

/// Reads the unsigned codes of a block.
#[inline(always)]
pub(super) fn read<F: Format>(bytes: &[u8], block: usize, codes: &mut [u8; BLOCK]) {
    let layout = F::LAYOUT;
    let of = layout.blocks();
    let bytes = &bytes[block / of * layout.stride..][..layout.stride];
    let (bits, block) = (&bytes[layout.bits..], block % of);
    let bytes = &bytes[layout.start..];
    match layout.packing {
        Packing::Nibbles => nibbles(bytes, codes, |it| it),
        Packing::NibblesAndBits => {
            nibbles(bytes, codes, |it| it);
            let bits = u32::from_le_bytes([bits[0], bits[1], bits[2], bits[3]]);
            for (place, code) in codes.iter_mut().enumerate() {
                *code |= ((bits >> place & 1) as u8) << 4;
            }
        }
        Packing::Levels | Packing::EightLevels => {
            // Numbers of levels are not written before they are looked up: they would be read back one by one.
            nibbles(&bytes[block * BLOCK / 2..], codes, |it| layout.levels[usize::from(it)]);
        }
        Packing::Bytes => {
            for (code, &byte) in codes.iter_mut().zip(bytes) {
                *code = byte ^ layout.flip;
            }
        }
        Packing::Q4K => {
            let (pair, upper) = (block / 2, block % 2);
            for (code, &byte) in codes.iter_mut().zip(&bytes[pair * BLOCK..]) {
                *code = byte >> (4 * upper) & 15;
            }
        }
        Packing::Q5K => {
            let (pair, upper) = (block / 2, block % 2);
            for ((code, &byte), bits) in codes.iter_mut().zip(&bytes[pair * BLOCK..]).zip(bits) {
                *code = byte >> (4 * upper) & 15 | (bits >> block & 1) << 4;
            }
        }
        Packing::Q6K => {
            let (half, group) = (block / 4, block % 4);
            let bytes = &bytes[half * 64 + group % 2 * BLOCK..];
            let bits = &bits[half * BLOCK..];
            for ((code, &byte), bits) in codes.iter_mut().zip(bytes).zip(bits) {
                *code = byte >> (group / 2 * 4) & 15 | (bits >> (2 * group) & 3) << 4;
            }
        }
        Packing::Q2K => {
            let (half, group) = (block / 4, block % 4);
            for (code, &byte) in codes.iter_mut().zip(&bytes[half * BLOCK..]) {
                *code = byte >> (2 * group) & 3;
            }
        }
        Packing::Q3K => {
            let (half, group) = (block / 4, block % 4);
            let bytes = &bytes[half * BLOCK..];
            for ((code, &byte), bits) in codes.iter_mut().zip(bytes).zip(bits) {
                *code = byte >> (2 * group) & 3 | (bits >> block & 1) << 2;
            }
        }
    }
}

/// The codes of the lower and then of the upper halves of 16 bytes.
#[inline(always)]
fn nibbles(bytes: &[u8], codes: &mut [u8; BLOCK], code: impl Fn(u8) -> u8) {
    let bytes: &[u8; BLOCK / 2] = bytes.first_chunk().expect("the block is longer");
    let (lower, upper) = codes.split_at_mut(BLOCK / 2);
    for ((lower, upper), byte) in lower.iter_mut().zip(upper).zip(bytes) {
        (*lower, *upper) = (code(byte & 15), code(byte >> 4));
    }
}
