//! The scales of some blocks, and their smallest numbers, as `f32`.

use super::layout::{Format, Heads};

/// Blocks of 32 whose scales are read at once: few enough for the codes to be in the innermost cache afterwards.
pub(super) const CHUNK: usize = 64;

/// What codes are multiplied by, and what is added.
#[derive(Clone, Debug)]
pub(super) struct Scales {
    /// Of the two halves of each block.
    pub scales: [[f32; 2]; CHUNK],
    /// The smallest numbers of both halves of each block, where the format has them.
    pub minima: [[f32; 2]; CHUNK],
}

impl Scales {
    pub fn new() -> Self {
        Self { scales: [[0.0; 2]; CHUNK], minima: [[0.0; 2]; CHUNK] }
    }

    /// Reads the scales that lie among the codes of whole blocks.
    #[inline(always)]
    pub fn read<F: Format>(&mut self, bytes: &[u8]) {
        match F::LAYOUT.heads {
            Heads::Apart => {}
            Heads::Scale => set::<F>(&mut self.scales, bytes, F::LAYOUT.scale),
            Heads::ScaleAndLeast => {
                set::<F>(&mut self.scales, bytes, F::LAYOUT.scale);
                set::<F>(&mut self.minima, bytes, F::LAYOUT.scale + 2);
            }
            Heads::SixBits => self.read_6_bits::<F>(bytes),
            Heads::EightBits => self.read_sixteen::<F>(bytes, |bytes| {
                let scales: &[u8; 16] = bytes.last_chunk().expect("blocks are longer");
                scales.map(|it| it as i8)
            }),
            Heads::FourBits => self.read_4_bits::<F>(bytes),
            Heads::SixteenOf6Bits => self.read_sixteen::<F>(bytes, |bytes| {
                sixteen_of_6_bits(bytes.last_chunk().expect("blocks are longer"))
            }),
            Heads::EightOf6Bits => self.read_eight_of_6_bits::<F>(bytes),
        }
    }

    #[inline(always)]
    fn read_6_bits<F: Format>(&mut self, bytes: &[u8]) {
        let (scale, least) = scale_and_least::<F>(bytes);
        let scales = self.scales.as_chunks_mut::<8>().0.iter_mut();
        let eights = scales.zip(self.minima.as_chunks_mut::<8>().0);
        let blocks = bytes.chunks_exact(F::LAYOUT.stride).enumerate();
        for ((eight, bytes), (to_scales, to_minima)) in blocks.zip(eights) {
            let (scales, minima) = six_bits(bytes[4..].first_chunk().expect("blocks are longer"));
            for place in 0..8 {
                to_scales[place] = [scale[eight] * f32::from(scales[place]); 2];
                to_minima[place] = [-(least[eight] * f32::from(minima[place])); 2];
            }
        }
    }

    #[inline(always)]
    fn read_4_bits<F: Format>(&mut self, bytes: &[u8]) {
        let (scale, least) = scale_and_least::<F>(bytes);
        let scales = self.scales.as_chunks_mut::<8>().0.iter_mut();
        let eights = scales.zip(self.minima.as_chunks_mut::<8>().0);
        let blocks = bytes.chunks_exact(F::LAYOUT.stride).enumerate();
        for ((eight, bytes), (to_scales, to_minima)) in blocks.zip(eights) {
            let both: &[u8; 16] = bytes.first_chunk().expect("blocks are longer");
            let (to_scales, to_minima) =
                (to_scales.as_flattened_mut(), to_minima.as_flattened_mut());
            for place in 0..16 {
                to_scales[place] = scale[eight] * f32::from(both[place] & 15);
                to_minima[place] = -(least[eight] * f32::from(both[place] >> 4));
            }
        }
    }

    /// Reads 16 scales, one for each half of a block. `scales` reads them from what comes before the scale in 16 bits.
    #[inline(always)]
    fn read_sixteen<F: Format>(&mut self, bytes: &[u8], scales: impl Fn(&[u8]) -> [i8; 16]) {
        let scale = halves::<F, EIGHTS>(bytes, F::LAYOUT.scale);
        let blocks = bytes.chunks_exact(F::LAYOUT.stride).enumerate();
        for ((eight, bytes), to) in blocks.zip(self.scales.as_chunks_mut::<8>().0) {
            let scales = scales(&bytes[..F::LAYOUT.scale]);
            for (to, number) in to.as_flattened_mut().iter_mut().zip(scales) {
                *to = scale[eight] * f32::from(number);
            }
        }
    }

    #[inline(always)]
    fn read_eight_of_6_bits<F: Format>(&mut self, bytes: &[u8]) {
        let scale = halves::<F, EIGHTS>(bytes, F::LAYOUT.scale);
        let blocks = bytes.chunks_exact(F::LAYOUT.stride).enumerate();
        for ((eight, bytes), to) in blocks.zip(self.scales.as_chunks_mut::<8>().0) {
            let upper = u16::from_le_bytes([bytes[2], bytes[3]]);
            for place in 0..8 {
                let lower = bytes[4 + place / 2] >> (place % 2 * 4) & 15;
                let code = lower | ((upper >> (2 * place) & 3) as u8) << 4;
                to[place] = [scale[eight] * (f32::from(code) - 32.0); 2];
            }
        }
    }
}

/// Sets both halves of all blocks to the numbers of 16 bits that are `start` bytes after their beginnings.
#[inline(always)]
fn set<F: Format>(to: &mut [[f32; 2]; CHUNK], bytes: &[u8], start: usize) {
    // So many are widened at once.
    const COUNT: usize = 16;

    let blocks = bytes.chunks(COUNT * F::LAYOUT.stride);
    for (to, bytes) in to.as_chunks_mut::<COUNT>().0.iter_mut().zip(blocks) {
        let numbers = halves::<F, COUNT>(bytes, start);
        for (both, number) in to.iter_mut().zip(numbers) {
            *both = [number; 2];
        }
    }
}

/// What the scales and the smallest numbers of blocks of 256 are multiplied by.
#[inline(always)]
fn scale_and_least<F: Format>(bytes: &[u8]) -> ([f32; EIGHTS], [f32; EIGHTS]) {
    (halves::<F, EIGHTS>(bytes, F::LAYOUT.scale), halves::<F, EIGHTS>(bytes, F::LAYOUT.scale + 2))
}

/// The blocks of 256 in a chunk.
const EIGHTS: usize = CHUNK / 8;

/// The numbers of 16 bits that are `start` bytes after the beginning of each block.
#[inline(always)]
fn halves<F: Format, const COUNT: usize>(bytes: &[u8], start: usize) -> [f32; COUNT] {
    let (mut numbers, mut wide) = ([0; COUNT], [0.0; COUNT]);
    for (number, bytes) in numbers.iter_mut().zip(bytes.chunks_exact(F::LAYOUT.stride)) {
        *number = u16::from_le_bytes([bytes[start], bytes[start + 1]]);
    }
    for (wide, number) in wide.iter_mut().zip(numbers) {
        *wide = widened(number);
    }
    wide
}

/// A number of 16 bits as `f32`. What the package `half` does is not compiled to vectors.
#[inline(always)]
pub(super) fn widened(bits: u16) -> f32 {
    /// The difference between the offsets of the exponents.
    const EXPONENT: u32 = 112 << 23;
    /// 2⁻²⁴, the smallest number that is not zero.
    const UNIT: f32 = 1.0 / 16_777_216.0;

    let magnitude = u32::from(bits) & 0x7fff;
    let shifted = magnitude << 13;
    let normal = if magnitude < 0x7c00 { shifted + EXPONENT } else { shifted | 0x7f80_0000 };
    let subnormal = (magnitude as i32 as f32 * UNIT).to_bits();
    let found = if magnitude < 0x0400 { subnormal } else { normal };
    f32::from_bits(found | (u32::from(bits) & 0x8000) << 16)
}

/// Eight scales and eight smallest numbers of 6 bits. Of each, the first four are in one byte, and the last four in one
/// half of a byte and the upper two bits of another byte.
#[inline(always)]
fn six_bits(bytes: &[u8; 12]) -> ([u8; 8], [u8; 8]) {
    let [first, second, third] = [0, 4, 8]
        .map(|at| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]));
    let upper = |word: u32| (word >> 6 & 0x0303_0303) << 4;
    let both = |lower: u32, upper: u32| (u64::from(upper) << 32 | u64::from(lower)).to_le_bytes();
    let scales = both(first & 0x3f3f_3f3f, third & 0x0f0f_0f0f | upper(first));
    let minima = both(second & 0x3f3f_3f3f, third >> 4 & 0x0f0f_0f0f | upper(second));
    (scales, minima)
}

/// Sixteen scales of 6 bits, counted from -32. The lower four bits are in the halves of eight bytes, the lower halves
/// first, and the upper two bits in the quarters of four bytes.
#[inline(always)]
fn sixteen_of_6_bits(bytes: &[u8; 12]) -> [i8; 16] {
    let (fours, twos) = bytes.split_at(8);
    let mut scales = [0; 16];
    for (place, scale) in scales.iter_mut().enumerate() {
        let lower = fours[place % 8] >> (place / 8 * 4) & 15;
        let upper = twos[place % 4] >> (place / 4 * 2) & 3;
        *scale = (lower | upper << 4) as i8 - 32;
    }
    scales
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::widened;

    #[test]
    fn all_numbers_of_16_bits_are_widened() {
        for bits in 0..=u16::MAX {
            let (found, expected) = (widened(bits), f16::from_bits(bits).to_f32());
            let same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
            assert!(same, "{bits:#x}: {found} instead of {expected}");
        }
    }
}
