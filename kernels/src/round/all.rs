//! Many numbers rounded at once.

use super::round as round_one;
#[cfg(target_arch = "x86_64")]
use crate::instructions::{Instructions, instructions};

/// Whether the processor rounds by itself. One with AMX alone is not known.
#[cfg(target_arch = "x86_64")]
pub(crate) fn by_processor() -> bool {
    instructions().multiply_bf16() && Instructions::Avx512Bf16.are_there()
}

/// Rounds each number of a slice, to one of the same length.
pub(crate) fn round(numbers: &[f32], to: &mut [u16]) {
    assert_eq!(numbers.len(), to.len());
    #[cfg(target_arch = "x86_64")]
    if by_processor() {
        // SAFETY: the processor has the instructions.
        return unsafe { by_avx512_bf16(numbers, to) };
    }
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || one_by_one(numbers, to),
    );
}

#[inline(always)]
fn one_by_one(numbers: &[f32], to: &mut [u16]) {
    for (to, &number) in to.iter_mut().zip(numbers) {
        *to = round_one(number);
    }
}

/// By `vcvtne2ps2bf16`, which takes 32 numbers at once and has the same rules.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
fn by_avx512_bf16(numbers: &[f32], to: &mut [u16]) {
    use std::arch::x86_64::{__m512i, _mm512_cvtne2ps_pbh, _mm512_loadu_ps, _mm512_storeu_si512};

    let ((groups, rest), (to_groups, to_rest)) =
        (numbers.as_chunks::<32>(), to.as_chunks_mut::<32>());
    for (group, to) in groups.iter().zip(to_groups) {
        // SAFETY: there are 32 numbers on both sides, and bits of one type of vector are bits of the other.
        unsafe {
            let (lower, upper) = (group.as_ptr(), group.as_ptr().add(16));
            let rounded = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(upper), _mm512_loadu_ps(lower));
            let rounded: __m512i = std::mem::transmute(rounded);
            _mm512_storeu_si512(to.as_mut_ptr().cast(), rounded);
        }
    }
    one_by_one(rest, to_rest);
}
