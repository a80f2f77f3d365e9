//! How the values of tensors are packed.

use std::fmt;

use crate::quantized::GgufType;

/// How values are packed.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Packing {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// The upper half of single precision.
    BF16,
    /// Blocks of quantized values, which share scales.
    Blocks(GgufType),
}

/// The types that the format has, by their numbers.
const NAMES: [(u32, &str); 36] = [
    (0, "F32"),
    (1, "F16"),
    (2, "Q4_0"),
    (3, "Q4_1"),
    (6, "Q5_0"),
    (7, "Q5_1"),
    (8, "Q8_0"),
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (12, "Q4_K"),
    (13, "Q5_K"),
    (14, "Q6_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (30, "BF16"),
    (31, "Q4_0_4_4"),
    (32, "Q4_0_4_8"),
    (33, "Q4_0_8_8"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
];

impl Packing {
    /// The packing with this number in the format's list.
    pub(super) fn new(number: u32) -> Result<Self, String> {
        let name = NAMES.iter().find(|(it, _)| *it == number).map(|(_, name)| *name);
        let found = name.and_then(|name| Self::all().find(|it| it.to_string() == name));
        found.ok_or_else(|| {
            let known: Vec<_> = Self::all().map(|it| it.to_string()).collect();
            let found = match name {
                Some(name) => format!("its type is {name}"),
                None => format!("its type has the unknown number {number}"),
            };
            format!("{found}; the types that can be read are {}", known.join(", "))
        })
    }

    /// Its number in the format's list.
    pub(super) fn number(self) -> u32 {
        let name = self.to_string();
        NAMES.iter().find(|(_, it)| *it == name).expect("all are in the list").0
    }

    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        let plain = [GgufType::F16, GgufType::BF16];
        let in_blocks = GgufType::ALL.into_iter().filter(move |it| !plain.contains(it));
        [Self::F32, Self::F16, Self::BF16].into_iter().chain(in_blocks.map(Self::Blocks))
    }

    /// How a matrix of such values is held as it is, if it can be.
    pub fn held(self) -> Option<GgufType> {
        match self {
            Self::F32 => None,
            Self::F16 => Some(GgufType::F16),
            Self::BF16 => Some(GgufType::BF16),
            Self::Blocks(kind) => Some(kind),
        }
    }

    /// The number of bytes of values of this shape, or none if there are no values, no whole blocks in each row, or more
    /// than can be counted.
    pub fn size(self, shape: &[usize]) -> Option<u64> {
        let [values, bytes] = self.block();
        let count = shape.iter().try_fold(1_u64, |all, &size| all.checked_mul(size as u64))?;
        let are_whole = count > 0 && shape.last().unwrap_or(&1).is_multiple_of(values);
        (count / values as u64).checked_mul(bytes as u64).filter(|_| are_whole)
    }

    /// The values of a block, and its size in bytes.
    pub fn block(self) -> [usize; 2] {
        match self {
            Self::F32 => [1, 4],
            Self::F16 => GgufType::F16.block(),
            Self::BF16 => GgufType::BF16.block(),
            Self::Blocks(kind) => kind.block(),
        }
    }

    /// The values of whole blocks.
    ///
    /// # Panics
    ///
    /// If the bytes are no whole blocks of quantized values.
    pub fn unpack(self, bytes: &[u8]) -> Vec<f32> {
        match self {
            Self::F32 => bytes.as_chunks().0.iter().map(|&it| f32::from_le_bytes(it)).collect(),
            Self::F16 => GgufType::F16.unpack(bytes),
            Self::BF16 => GgufType::BF16.unpack(bytes),
            Self::Blocks(kind) => kind.unpack(bytes),
        }
    }

    /// The values rounded to this type, in whole blocks, to the bit as GGUF's own package rounds them; none if that does
    /// not do it either, as for the types in blocks of 256.
    ///
    /// Numbers that are too large for it become infinite.
    ///
    /// # Panics
    ///
    /// If the values are no whole blocks.
    pub fn pack(self, values: &[f32]) -> Option<Vec<u8>> {
        match self {
            Self::F32 => Some(values.iter().flat_map(|it| it.to_le_bytes()).collect()),
            Self::F16 => GgufType::F16.pack(values),
            Self::BF16 => GgufType::BF16.pack(values),
            Self::Blocks(kind) => kind.pack(values),
        }
    }
}

/// The name of the type.
impl fmt::Display for Packing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blocks(kind) => write!(f, "{kind:?}"),
            plain => write!(f, "{plain:?}"),
        }
    }
}
