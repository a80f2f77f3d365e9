//! Where the codes of a row lie.

/// Numbers whose products are summed up in whole numbers, before the sum is multiplied by a scale. The blocks of some
/// formats are longer, and have several of these.
pub(super) const BLOCK: usize = 32;

/// How codes are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packing {
    /// 32 codes of 4 bits in 16 bytes: the lower halves are the first 16, and the upper halves the others.
    Nibbles,
    /// The same, and a fifth bit of each code in 32 bits that lie together, the first in the lowest.
    NibblesAndBits,
    /// Nibbles that are numbers of levels.
    Levels,
    /// 32 bytes.
    Bytes,
    /// Eight blocks of 32. Two are in 32 bytes: the lower halves are the first, and the upper halves the second.
    Q4K,
    /// The same, and a fifth bit of each code: 32 bytes hold the bits of 32 places, each for the eight blocks.
    Q5K,
    /// Two halves of four blocks of 32. The lower halves of 64 bytes are the first two, and the upper halves the last
    /// two. Two more bits of each code are in 32 bytes, each for the four blocks.
    Q6K,
    /// Two halves of four blocks of 32. Each has 32 bytes, of which the blocks have two bits each, the first the lowest.
    Q2K,
    /// The same, and a third bit of each code: 32 bytes hold the bits of 32 places, each for the eight blocks.
    Q3K,
    /// Eight blocks of 32, each packed as [`Levels`](Self::Levels).
    EightLevels,
}

/// The scales that lie among the codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heads {
    /// None.
    Apart,
    /// A number of 16 bits.
    Scale,
    /// The same, and the smallest number of the block after it.
    ScaleAndLeast,
    /// Two numbers of 16 bits, by which eight scales and eight smallest numbers of 6 bits after them are multiplied.
    SixBits,
    /// A number of 16 bits, by which 16 scales of 8 bits before it are multiplied.
    EightBits,
    /// Two numbers of 16 bits, by which 16 scales and 16 smallest numbers are multiplied. These are the lower and the
    /// upper halves of the first 16 bytes of a block.
    FourBits,
    /// A number of 16 bits, by which 16 scales of 6 bits before it are multiplied. They are counted from -32.
    SixteenOf6Bits,
    /// A number of 16 bits, by which eight scales of 6 bits after it are multiplied. They are counted from -32.
    EightOf6Bits,
}

/// Where the codes of a row lie, and which of them stands for zero.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub packing: Packing,
    pub heads: Heads,
    /// From the beginning of one block of the format, with what belongs to it, to that of the next.
    pub stride: usize,
    /// From there to the scale in 16 bits. The smallest number, or what the smallest numbers are multiplied by, comes
    /// after it.
    pub scale: usize,
    /// From there to the codes.
    pub start: usize,
    /// From there to the bits that are apart from the codes, where there are some.
    pub bits: usize,
    /// What the bits of each code are combined with (exclusive or), so that it is unsigned.
    pub flip: u8,
    /// The code that stands for zero.
    pub zero: u8,
    /// What codes that are numbers of levels stand for.
    pub levels: &'static [u8; 16],
}

impl Layout {
    /// Codes that lie together, without anything between them.
    pub const fn apart(packing: Packing, stride: usize, zero: u8) -> Self {
        let (heads, levels) = (Heads::Apart, &NF4);
        Self { packing, heads, stride, scale: 0, start: 0, bits: 0, flip: 0, zero, levels }
    }

    /// Blocks of 32 that lie between two strides.
    pub const fn blocks(&self) -> usize {
        match self.packing {
            Packing::Nibbles | Packing::NibblesAndBits | Packing::Levels | Packing::Bytes => 1,
            Packing::Q4K | Packing::Q5K | Packing::Q6K => 8,
            Packing::Q2K | Packing::Q3K | Packing::EightLevels => 8,
        }
    }

    /// Whether blocks have a smallest number.
    pub const fn has_minima(&self) -> bool {
        matches!(self.heads, Heads::ScaleAndLeast | Heads::SixBits | Heads::FourBits)
    }
}

/// A layout that is known when the program is compiled, so that loops over codes are compiled for each.
pub(super) trait Format {
    const LAYOUT: Layout;
}

/// The levels of NF4 (Dettmers et al. 2023, "QLoRA"), times 127, rounded, and counted from -128. The largest difference
/// to a level is 0.0037 (of 1, which is the largest level).
const NF4: [u8; 16] = [1, 40, 61, 78, 92, 105, 116, 128, 138, 148, 159, 171, 184, 199, 220, 255];

/// The levels of GGUF's IQ4_NL and IQ4_XS, counted from -128.
pub(super) const IQ4: [u8; 16] =
    [1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241];
