//! The product of a row with vectors: chunks of blocks, whose scales are read before their codes.

use std::ops::Range;

use pulp::NullaryFnOnce;

use super::{
    Dots, Vector8,
    layout::Format,
    part::{Factors, Part, Sums},
    portable,
    scales::{CHUNK, Scales},
};

#[cfg(target_arch = "x86_64")]
use super::{avx2, vnni};

/// The codes of a row.
#[derive(Clone, Copy)]
pub(super) struct Row<'a> {
    pub bytes: &'a [u8],
    /// The number of blocks of 32.
    pub blocks: usize,
    /// Whether blocks have a smallest number.
    pub minima: bool,
}

/// Memory for products with so many vectors, which the next row uses again: to clear it for each row would take longer than
/// a short row does.
#[derive(Clone, Debug)]
pub struct DotMemory<const N: usize> {
    scales: Scales,
    factors: [Factors; N],
}

impl<const N: usize> DotMemory<N> {
    /// Memory for the first row.
    pub fn new() -> Self {
        Self { scales: Scales::new(), factors: [[[0.0; 2]; CHUNK]; N] }
    }
}

impl<const N: usize> Default for DotMemory<N> {
    fn default() -> Self {
        Self::new()
    }
}

impl Row<'_> {
    /// The products with some vectors, all in the same order by whatever instructions. `read` writes the
    /// scales of some blocks.
    ///
    /// # Panics
    ///
    /// If the vectors are shorter than the row, or the instructions are not there.
    pub fn dots<F: Format, const N: usize>(
        &self,
        by: Dots,
        x: [&Vector8; N],
        memory: &mut DotMemory<N>,
        read: impl Fn(Range<usize>, &mut Scales),
    ) -> [f32; N] {
        assert!(by.are_there(), "this processor has no {by}");
        let (mut sums, mut minima) = ([[0.0; 16]; N], [[0.0; 16]; N]);
        for start in (0..self.blocks).step_by(CHUNK) {
            let blocks = start..self.blocks.min(start + CHUNK);
            let prepare = Prepare {
                row: *self,
                blocks: blocks.clone(),
                x,
                read: &read,
                memory: &mut *memory,
                minima: &mut minima,
            };
            match by {
                Dots::Portable => prepare.call(),
                _ => pulp::Arch::new().dispatch(prepare),
            }
            let part = Part {
                bytes: bytes_of::<F>(self.bytes, blocks.clone()),
                x: x.map(|it| &it.codes()[blocks.clone()]),
                factors: memory.factors.each_ref().map(|it| &it[..blocks.len()]),
            };
            add::<F, N>(by, part, &mut sums);
        }
        std::array::from_fn(|vector| total(sums[vector]) + total(minima[vector]))
    }
}

/// The bytes of some blocks of 32, which are whole blocks of the format.
pub(super) fn bytes_of<F: Format>(bytes: &[u8], blocks: Range<usize>) -> &[u8] {
    let (of, stride) = (F::LAYOUT.blocks(), F::LAYOUT.stride);
    &bytes[blocks.start / of * stride..blocks.end / of * stride]
}

/// What comes before codes are read. It is a type, since a closure is not always compiled for the instructions that
/// `pulp` finds.
struct Prepare<'a, R, const N: usize> {
    row: Row<'a>,
    blocks: Range<usize>,
    x: [&'a Vector8; N],
    read: &'a R,
    memory: &'a mut DotMemory<N>,
    minima: &'a mut [Sums; N],
}

impl<R: Fn(Range<usize>, &mut Scales), const N: usize> NullaryFnOnce for Prepare<'_, R, N> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { row, blocks, x, read, memory, minima } = self;
        let DotMemory { scales, factors } = memory;
        read(blocks.clone(), scales);
        for ((x, factors), minima) in x.iter().zip(factors).zip(minima) {
            multiply_scales(scales, &x.scales()[blocks.clone()], factors);
            if row.minima {
                add_minima(scales, &x.sums()[blocks.clone()], minima);
            }
        }
    }
}

/// What the sum over each half of a block is multiplied by.
#[inline(always)]
fn multiply_scales(scales: &Scales, x: &[f32], to: &mut Factors) {
    for ((to, scales), x) in to.iter_mut().zip(&scales.scales).zip(x) {
        *to = [scales[0] * x, scales[1] * x];
    }
}

/// Adds what the smallest numbers of blocks contribute, those of the halves of blocks to one of 16 sums in turn.
#[inline(always)]
fn add_minima(scales: &Scales, x: &[[f32; 2]], sums: &mut Sums) {
    let minima = scales.minima.as_flattened();
    let (whole, rest) = x.as_flattened().as_chunks::<16>();
    for (numbers, x) in minima.as_chunks::<16>().0.iter().zip(whole) {
        for lane in 0..16 {
            sums[lane] += numbers[lane] * x[lane];
        }
    }
    for (lane, x) in rest.iter().enumerate() {
        sums[lane] += minima[whole.len() * 16 + lane] * x;
    }
}

fn add<F: Format, const N: usize>(by: Dots, part: Part<N>, sums: &mut [Sums; N]) {
    match by {
        Dots::Portable => portable::add::<F, N>(part, 0, sums),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Row::dots` has found that they are there.
        Dots::Avx2 => unsafe { avx2::add::<F, N>(part, sums) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Dots::Vnni => unsafe { vnni::add::<F, N>(part, sums) },
        #[cfg(not(target_arch = "x86_64"))]
        _ => unreachable!("they are not there"),
    }
}

/// The sum, of which one half is added to the other until one number is left.
pub(super) fn total(mut sums: Sums) -> f32 {
    let mut half = sums.len() / 2;
    while half > 0 {
        for lane in 0..half {
            sums[lane] += sums[lane + half];
        }
        half /= 2;
    }
    sums[0]
}
