//! Which instructions dot products use.

use std::{fmt, sync::LazyLock};

use crate::instructions::{Instructions, instructions};

/// Instructions for dot products in 8 bits. They are chosen apart from those for bf16, since a processor may have the
/// ones and not the others. All of them give the same results, to the bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Dots {
    /// Whatever the compiler makes of plain Rust. Every processor has it.
    Portable,
    /// Products of pairs of bytes in vectors of 256 bits (`vpmaddubsw`).
    Avx2,
    /// Products of groups of four bytes in vectors of 512 bits (`vpdpbusd`).
    Vnni,
}

impl Dots {
    /// All of them, from the slowest to the fastest.
    pub const ALL: [Self; 3] = [Self::Portable, Self::Avx2, Self::Vnni];

    /// Whether this processor, and its operating system, have them.
    pub fn are_there(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Vnni => {
                std::is_x86_feature_detected!("avx512f")
                    && std::is_x86_feature_detected!("avx512bw")
                    && std::is_x86_feature_detected!("avx512vl")
                    && std::is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// The fastest that are there and are not above these instructions. Those that are as wide as AVX-512 all stand for
    /// whatever the processor has.
    pub fn up_to(instructions: Instructions) -> Self {
        let most = match instructions {
            Instructions::Portable | Instructions::Neon => Self::Portable,
            Instructions::Avx2 => Self::Avx2,
            Instructions::Avx512 | Instructions::Avx512Bf16 | Instructions::Amx => Self::Vnni,
        };
        let there = Self::ALL.into_iter().rev().find(|it| *it <= most && it.are_there());
        there.expect("portable instructions are always there")
    }

    /// A short name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Vnni => "avx512-vnni",
        }
    }
}

impl fmt::Display for Dots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The instructions that dot products use: the fastest that are there, or the fastest
/// [up to](Dots::up_to) those that the environment variable [`VARIABLE`](crate::VARIABLE) names.
///
/// # Panics
///
/// As [`instructions`] does.
pub fn dots() -> Dots {
    static CHOSEN: LazyLock<Dots> = LazyLock::new(|| Dots::up_to(instructions()));
    *CHOSEN
}
