//! The block formats of GGUF files.

use std::marker::PhantomData;

use half::f16;
use pulp::NullaryFnOnce;

use super::{
    Dots, Vector8, formats,
    layout::{BLOCK, Format, Layout},
    portable,
    row::{DotMemory, Row, bytes_of},
    scales::{CHUNK, Scales},
};

/// How GGUF files pack the numbers of a row. Some numbers next to each other are a block, with scales of its own, and
/// fill a fixed number of bytes. The names are GGUF's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[allow(non_camel_case_types, reason = "these are the names that GGUF's users know")]
pub enum BlockFormat {
    /// 4 bits, around zero, in blocks of 32.
    Q4_0,
    /// 4 bits, from the smallest number of a block on, in blocks of 32.
    Q4_1,
    /// 5 bits, around zero, in blocks of 32.
    Q5_0,
    /// 5 bits, from the smallest number of a block on, in blocks of 32.
    Q5_1,
    /// 8 bits, in blocks of 32.
    Q8_0,
    /// 4 bits, in blocks of 256. Each 32 have a scale and a smallest number of 6 bits.
    Q4_K,
    /// 5 bits, in blocks of 256. Each 32 have a scale and a smallest number of 6 bits.
    Q5_K,
    /// 6 bits, around zero, in blocks of 256. Each 16 have a scale of 8 bits.
    Q6_K,
    /// 2 bits, in blocks of 256. Each 16 have a scale and a smallest number of 4 bits.
    Q2_K,
    /// 3 bits, around zero, in blocks of 256. Each 16 have a scale of 6 bits.
    Q3_K,
    /// One of 16 levels, in blocks of 32.
    IQ4_NL,
    /// One of 16 levels, in blocks of 256. Each 32 have a scale of 6 bits.
    IQ4_XS,
}

impl BlockFormat {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
        Self::Q2_K,
        Self::Q3_K,
        Self::IQ4_NL,
        Self::IQ4_XS,
    ];

    /// The numbers of a block.
    pub fn block(self) -> usize {
        self.layout().blocks() * BLOCK
    }

    /// The bytes of a block.
    pub fn bytes(self) -> usize {
        self.layout().stride
    }

    /// The bytes of a row of so many numbers. Its end is filled up to a whole block.
    pub fn row_bytes(self, columns: usize) -> usize {
        columns.div_ceil(self.block()) * self.bytes()
    }

    /// Unpacks the first numbers of a row, as many as `numbers` is long, exactly as GGUF's own package does.
    ///
    /// # Panics
    ///
    /// If the row does not have the [bytes](Self::row_bytes) of so many numbers.
    pub fn unpack(self, bytes: &[u8], numbers: &mut [f32]) {
        self.check(bytes, numbers.len());
        match self {
            Self::Q4_0 => unpack::<formats::Q40>(bytes, numbers),
            Self::Q4_1 => unpack::<formats::Q41>(bytes, numbers),
            Self::Q5_0 => unpack::<formats::Q50>(bytes, numbers),
            Self::Q5_1 => unpack::<formats::Q51>(bytes, numbers),
            Self::Q8_0 => unpack::<formats::Q80>(bytes, numbers),
            Self::Q4_K => unpack::<formats::Q4K>(bytes, numbers),
            Self::Q5_K => unpack::<formats::Q5K>(bytes, numbers),
            Self::Q6_K => unpack::<formats::Q6K>(bytes, numbers),
            Self::Q2_K => unpack::<formats::Q2K>(bytes, numbers),
            Self::Q3_K => unpack::<formats::Q3K>(bytes, numbers),
            Self::IQ4_NL => unpack::<formats::Iq4Nl>(bytes, numbers),
            Self::IQ4_XS => unpack::<formats::Iq4Xs>(bytes, numbers),
        }
    }

    /// Whether the scales of all these blocks are finite. Then so is every number in them.
    ///
    /// # Panics
    ///
    /// If the bytes are no whole blocks.
    pub fn is_finite(self, bytes: &[u8]) -> bool {
        let layout = self.layout();
        assert!(bytes.len().is_multiple_of(layout.stride), "{} bytes in {self:?}", bytes.len());
        let end = layout.scale + if layout.has_minima() { 4 } else { 2 };
        let mut blocks = bytes.chunks_exact(layout.stride);
        blocks.all(|it| it[layout.scale..end].as_chunks().0.iter().all(is_finite))
    }

    /// The product of a row with a vector that is as long. All instructions give the same, to the bit: sums of 32
    /// products are whole numbers, and are added up in one order.
    ///
    /// # Panics
    ///
    /// If the row does not have the [bytes](Self::row_bytes) of so many numbers, or if the processor does not have the
    /// instructions.
    pub fn dot(self, by: Dots, bytes: &[u8], x: &Vector8) -> f32 {
        let [product] = self.dots(by, bytes, [x], &mut DotMemory::new());
        product
    }

    /// The products of a row with some vectors, each as [`dot`](Self::dot) computes it. The row is read from memory
    /// once.
    ///
    /// # Panics
    ///
    /// As `dot`, or if the vectors differ in length.
    pub fn dots<const N: usize>(
        self,
        by: Dots,
        bytes: &[u8],
        x: [&Vector8; N],
        memory: &mut DotMemory<N>,
    ) -> [f32; N] {
        let Some(first) = x.first() else { return [0.0; N] };
        let columns = first.len();
        assert!(x.iter().all(|it| it.len() == columns), "vectors differ in length");
        self.check(bytes, columns);
        match self {
            Self::Q4_0 => dots::<formats::Q40, N>(by, bytes, x, memory),
            Self::Q4_1 => dots::<formats::Q41, N>(by, bytes, x, memory),
            Self::Q5_0 => dots::<formats::Q50, N>(by, bytes, x, memory),
            Self::Q5_1 => dots::<formats::Q51, N>(by, bytes, x, memory),
            Self::Q8_0 => dots::<formats::Q80, N>(by, bytes, x, memory),
            Self::Q4_K => dots::<formats::Q4K, N>(by, bytes, x, memory),
            Self::Q5_K => dots::<formats::Q5K, N>(by, bytes, x, memory),
            Self::Q6_K => dots::<formats::Q6K, N>(by, bytes, x, memory),
            Self::Q2_K => dots::<formats::Q2K, N>(by, bytes, x, memory),
            Self::Q3_K => dots::<formats::Q3K, N>(by, bytes, x, memory),
            Self::IQ4_NL => dots::<formats::Iq4Nl, N>(by, bytes, x, memory),
            Self::IQ4_XS => dots::<formats::Iq4Xs, N>(by, bytes, x, memory),
        }
    }

    fn check(self, bytes: &[u8], columns: usize) {
        let (found, expected) = (bytes.len(), self.row_bytes(columns));
        assert_eq!(found, expected, "bytes of a row of {columns} numbers in {self:?}");
    }

    fn layout(self) -> Layout {
        match self {
            Self::Q4_0 => formats::Q40::LAYOUT,
            Self::Q4_1 => formats::Q41::LAYOUT,
            Self::Q5_0 => formats::Q50::LAYOUT,
            Self::Q5_1 => formats::Q51::LAYOUT,
            Self::Q8_0 => formats::Q80::LAYOUT,
            Self::Q4_K => formats::Q4K::LAYOUT,
            Self::Q5_K => formats::Q5K::LAYOUT,
            Self::Q6_K => formats::Q6K::LAYOUT,
            Self::Q2_K => formats::Q2K::LAYOUT,
            Self::Q3_K => formats::Q3K::LAYOUT,
            Self::IQ4_NL => formats::Iq4Nl::LAYOUT,
            Self::IQ4_XS => formats::Iq4Xs::LAYOUT,
        }
    }
}

/// Whether a number of 16 bits is finite.
fn is_finite(bytes: &[u8; 2]) -> bool {
    f16::from_le_bytes(*bytes).is_finite()
}

/// The number of blocks of 32.
fn blocks<F: Format>(bytes: &[u8]) -> usize {
    bytes.len() / F::LAYOUT.stride * F::LAYOUT.blocks()
}

fn dots<F: Format, const N: usize>(
    by: Dots,
    bytes: &[u8],
    x: [&Vector8; N],
    memory: &mut DotMemory<N>,
) -> [f32; N] {
    let row = Row { bytes, blocks: blocks::<F>(bytes), minima: F::LAYOUT.has_minima() };
    row.dots::<F, N>(
        by,
        x,
        memory,
        #[inline(always)]
        |blocks, scales| scales.read::<F>(bytes_of::<F>(bytes, blocks)),
    )
}

/// Unpacks a row. It is a type, since a closure is not always compiled for the instructions that `pulp` finds.
struct Unpack<'a, F> {
    bytes: &'a [u8],
    numbers: &'a mut [f32],
    format: PhantomData<F>,
}

impl<F: Format> NullaryFnOnce for Unpack<'_, F> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { bytes, numbers, .. } = self;
        let (blocks, mut scales) = (blocks::<F>(bytes), Scales::new());
        for (chunk, numbers) in numbers.chunks_mut(CHUNK * BLOCK).enumerate() {
            let start = chunk * CHUNK;
            scales.read::<F>(bytes_of::<F>(bytes, start..blocks.min(start + CHUNK)));
            for (place, numbers) in numbers.chunks_mut(BLOCK).enumerate() {
                let mut codes = [0; BLOCK];
                portable::read::<F>(bytes, start + place, &mut codes);
                let minima = F::LAYOUT.has_minima().then(|| scales.minima[place]);
                unpack_block(&codes, F::LAYOUT.zero, scales.scales[place], minima, numbers);
            }
        }
    }
}

fn unpack<F: Format>(bytes: &[u8], numbers: &mut [f32]) {
    pulp::Arch::new().dispatch(Unpack::<F> { bytes, numbers, format: PhantomData });
}

/// The first numbers of a block.
#[inline(always)]
fn unpack_block(
    codes: &[u8; BLOCK],
    zero: u8,
    scales: [f32; 2],
    minima: Option<[f32; 2]>,
    to: &mut [f32],
) {
    let mut numbers = [0.0; BLOCK];
    let halves = numbers.as_chunks_mut::<{ BLOCK / 2 }>().0.iter_mut();
    for (half, (numbers, codes)) in halves.zip(codes.as_chunks().0).enumerate() {
        let (scale, least) = (scales[half], minima.map(|it| it[half]));
        for (number, &code) in numbers.iter_mut().zip(codes as &[u8; BLOCK / 2]) {
            let product = (f32::from(code) - f32::from(zero)) * scale;
            *number = least.map_or(product, |least| product + least);
        }
    }
    match to.first_chunk_mut() {
        Some(to) => *to = numbers,
        None => to.copy_from_slice(&numbers[..to.len()]),
    }
}
