//! Rounding to bf16.

pub(crate) mod all;

/// The bits of the nearest bf16 number, ties to even. What is nearer to zero than the smallest normal number
/// becomes zero with its sign, since that is how processors multiply such numbers. NaN stays NaN.
#[inline(always)]
pub(crate) fn round(number: f32) -> u16 {
    let bits = number.to_bits();
    let nearest = (bits.wrapping_add(0x7fff + (bits >> 16 & 1))) >> 16;
    let magnitude = bits & 0x7fff_ffff;
    // The top bit of the fraction, so that it is no infinity.
    let nearest = if magnitude > 0x7f80_0000 { bits >> 16 | 0x40 } else { nearest };
    (if magnitude < 0x0080_0000 { bits >> 16 & 0x8000 } else { nearest }) as u16
}

/// The bits of a bf16 number, with zero for what is not normal.
#[inline(always)]
pub(crate) fn normal(bits: u16) -> u16 {
    if bits & 0x7f80 == 0 { bits & 0x8000 } else { bits }
}

/// The number with these bits.
#[inline(always)]
pub(crate) fn widened(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}
