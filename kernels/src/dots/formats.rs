//! The layouts that there are.

use super::layout::{Format, Heads, IQ4, Layout, Packing};

/// A type for each layout.
macro_rules! formats {
    ($($name:ident: $layout:expr;)*) => {
        $(
            pub(super) enum $name {}

            impl Format for $name {
                const LAYOUT: Layout = $layout;
            }
        )*
    };
}

const NONE: Layout = Layout::apart(Packing::Nibbles, 0, 0);

formats! {
    Q40: Layout { heads: Heads::Scale, stride: 18, start: 2, zero: 8, ..NONE };
    Q41: Layout { heads: Heads::ScaleAndLeast, stride: 20, start: 4, ..NONE };
    Q50: Layout {
        packing: Packing::NibblesAndBits,
        heads: Heads::Scale,
        stride: 22,
        start: 6,
        bits: 2,
        zero: 16,
        ..NONE
    };
    Q51: Layout {
        packing: Packing::NibblesAndBits,
        heads: Heads::ScaleAndLeast,
        stride: 24,
        start: 8,
        bits: 4,
        ..NONE
    };
    Q80: Layout {
        packing: Packing::Bytes,
        heads: Heads::Scale,
        stride: 34,
        start: 2,
        flip: 128,
        zero: 128,
        ..NONE
    };
    Q4K: Layout { packing: Packing::Q4K, heads: Heads::SixBits, stride: 144, start: 16, ..NONE };
    Q5K: Layout {
        packing: Packing::Q5K,
        heads: Heads::SixBits,
        stride: 176,
        start: 48,
        bits: 16,
        ..NONE
    };
    Q6K: Layout {
        packing: Packing::Q6K,
        heads: Heads::EightBits,
        stride: 210,
        scale: 208,
        bits: 128,
        zero: 32,
        ..NONE
    };
    Q2K: Layout {
        packing: Packing::Q2K,
        heads: Heads::FourBits,
        stride: 84,
        scale: 80,
        start: 16,
        ..NONE
    };
    Q3K: Layout {
        packing: Packing::Q3K,
        heads: Heads::SixteenOf6Bits,
        stride: 110,
        scale: 108,
        start: 32,
        zero: 4,
        ..NONE
    };
    Iq4Nl: Layout {
        packing: Packing::Levels,
        heads: Heads::Scale,
        stride: 18,
        start: 2,
        zero: 128,
        levels: &IQ4,
        ..NONE
    };
    Iq4Xs: Layout {
        packing: Packing::EightLevels,
        heads: Heads::EightOf6Bits,
        stride: 136,
        start: 8,
        zero: 128,
        levels: &IQ4,
        ..NONE
    };
    Bytes: Layout::apart(Packing::Bytes, 32, 128);
    Nibbles: Layout::apart(Packing::Nibbles, 16, 8);
    NibblesFromZero: Layout::apart(Packing::Nibbles, 16, 0);
    Nf4: Layout::apart(Packing::Levels, 16, 128);
}
