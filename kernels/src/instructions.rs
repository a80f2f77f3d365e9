//! Which instructions the processor has, and which of them are used.

use std::{env, fmt, str::FromStr, sync::LazyLock};

/// A set of vector instructions. Each can be used where the processor has it; the order is that of speed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Instructions {
    /// Whatever the compiler makes of plain Rust. Every processor has it.
    Portable,
    /// The vectors of 128 bits that ARM's processors have. Numbers are widened to `f32`.
    Neon,
    /// Vectors of 256 bits with fused multiply-adds. Numbers are widened to `f32`.
    Avx2,
    /// Vectors of 512 bits. Numbers are widened to `f32`.
    Avx512,
    /// Products of pairs of bf16, in vectors of 512 bits (`vdpbf16ps`).
    Avx512Bf16,
    /// Products of tiles of bf16, `[16, 32]` by `[32, 16]` (`tdpbf16ps`).
    Amx,
}

/// The variable that chooses instructions, for tests and for finding out whether a wrong result is due to them.
pub const VARIABLE: &str = "BURN_LORA_KERNELS";

impl Instructions {
    /// All sets, from the slowest to the fastest.
    pub const ALL: [Self; 6] =
        [Self::Portable, Self::Neon, Self::Avx2, Self::Avx512, Self::Avx512Bf16, Self::Amx];

    /// Whether this processor, and its operating system, have them.
    pub fn are_there(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "aarch64")]
            Self::Neon => pulp::aarch64::Neon::try_new().is_some(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => pulp::x86::V3::try_new().is_some(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => pulp::x86::V4::try_new().is_some(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => {
                Self::Avx512.are_there() && std::is_x86_feature_detected!("avx512bf16")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Amx => Self::Avx512.are_there() && crate::tile::amx::is_there(),
            #[allow(unreachable_patterns, reason = "which are left depends on the processor")]
            _ => false,
        }
    }

    /// Whether they multiply bf16 faster than `f32` is multiplied.
    pub fn multiply_bf16(self) -> bool {
        self >= Self::Avx512Bf16
    }

    /// The name that [`VARIABLE`] takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Neon => "neon",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Amx => "amx",
        }
    }
}

impl fmt::Display for Instructions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Instructions {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|it| it.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            format!("`{name}` are no instructions; there are {names}")
        })
    }
}

/// The instructions that products use: the fastest that are there, or those that the environment variable
/// [`VARIABLE`] names. The variable is read once. Whatever rounds or multiplies calls this.
///
/// # Panics
///
/// If the variable names none, or some that are not there.
pub fn instructions() -> Instructions {
    static CHOSEN: LazyLock<Result<Instructions, String>> = LazyLock::new(|| {
        let Some(name) = env::var_os(VARIABLE) else {
            let fastest = Instructions::ALL.into_iter().rev().find(|it| it.are_there());
            return Ok(fastest.expect("portable instructions are always there"));
        };
        let chosen: Instructions =
            name.to_string_lossy().parse().map_err(|error| format!("{VARIABLE}: {error}"))?;
        match chosen.are_there() {
            true => Ok(chosen),
            false => Err(format!("{VARIABLE}: this processor has no {chosen}")),
        }
    });
    match &*CHOSEN {
        Ok(chosen) => *chosen,
        Err(problem) => panic!("{problem}"),
    }
}
