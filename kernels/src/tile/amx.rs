//! Tiles of bf16 by Intel's AMX: a product of `[16, 32]` by `[32, 16]` is one instruction, `tdpbf16ps`.
//!
//! The intrinsics of these instructions are not stable in Rust yet, but inline assembly is. The compiler never uses the
//! tile registers by itself. A program must ask Linux for them once, before it uses them.

use std::{
    arch::{asm, x86_64::__cpuid_count},
    cell::Cell,
    marker::PhantomData,
    sync::LazyLock,
};

use super::{Factors, SIDE, Tile};

/// The rows of a tile register, each of 64 bytes: 16 sums, or 16 pairs of bf16.
const ROWS: usize = 16;

/// Whether the processor multiplies tiles of bf16, and Linux lets this process use them.
pub(crate) fn is_there() -> bool {
    static THERE: LazyLock<bool> = LazyLock::new(|| {
        /// Of the leaf 7 of `cpuid`, in EDX.
        const AMX_BF16: u32 = 1 << 22;
        const AMX_TILE: u32 = 1 << 24;

        // SAFETY: every processor of this kind has `cpuid`.
        #[allow(unused_unsafe, reason = "it became safe with Rust 1.94")]
        let features = unsafe { __cpuid_count(7, 0) }.edx;
        features & AMX_BF16 != 0 && features & AMX_TILE != 0 && permitted()
    });
    *THERE
}

/// Asks Linux for the tile registers, for all threads of this process.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const XFEATURE_XTILEDATA: u64 = 18;

    let result: i64;
    // SAFETY: the call reads and writes none of this program's memory. It changes the registers that are named.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

/// Other systems have other ways to ask, which are not built in.
#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// What the tile registers are: palette 1, and each of the eight with 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

const CONFIGURATION: Configuration = {
    let (mut row_bytes, mut rows, mut register) = ([0; 16], [0; 16], 0);
    while register < 8 {
        row_bytes[register] = 64;
        rows[register] = ROWS as u8;
        register += 1;
    }
    Configuration { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows }
};

thread_local! {
    /// How many [`Configured`] there are on this thread: a product may be computed while another one is.
    static DEPTH: Cell<usize> = const { Cell::new(0) };
}

/// The tile registers of this thread, configured until the last of these is dropped. It stays on its thread. What is in
/// the registers is of one call alone.
pub(super) struct Configured(PhantomData<*const ()>);

impl Configured {
    /// # Panics
    ///
    /// If the registers are [not there](is_there).
    pub fn new() -> Self {
        assert!(is_there(), "AMX was chosen, but is not there");
        if DEPTH.replace(DEPTH.get() + 1) == 0 {
            // SAFETY: the instruction is there, and reads the 64 bytes of the configuration.
            unsafe { asm!("ldtilecfg [{}]", in(reg) &CONFIGURATION, options(nostack, readonly)) }
        }
        Self(PhantomData)
    }

    /// Four products at once, of two times 16 rows and two times 16 columns: each tile that is read is used twice.
    pub fn multiply(&self, Factors { left, stride, right }: Factors, adds: bool, tile: &mut Tile) {
        /// The bytes from one row of a tile to the next, of the sums and of the right matrix.
        const ROW: usize = 4 * SIDE;

        const { assert!(SIDE == 2 * ROWS) };
        if adds {
            // SAFETY: the registers are configured on this thread, which `self` cannot leave, and the tile has 32 rows of
            // 32 numbers.
            unsafe {
                asm!(
                    "tileloadd tmm0, [{upper} + {row}]",
                    "tileloadd tmm1, [{upper} + {row} + 64]",
                    "tileloadd tmm2, [{lower} + {row}]",
                    "tileloadd tmm3, [{lower} + {row} + 64]",
                    upper = in(reg) tile.0.as_ptr(),
                    lower = in(reg) tile.0[ROWS..].as_ptr(),
                    row = in(reg) ROW,
                    options(nostack, readonly),
                );
            }
        } else {
            // SAFETY: the registers are configured on this thread.
            unsafe {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    options(nostack, nomem)
                );
            }
        }
        for (step, right) in right.chunks_exact(ROWS).enumerate() {
            let (upper, lower) =
                (&left[2 * ROWS * step..], &left[ROWS * stride + 2 * ROWS * step..]);
            // SAFETY: `Factors` has 32 rows of the left matrix, `stride` apart, with all numbers of this step, and this
            // step's 16 rows of the right one, of 32 words each. The rest is as above.
            unsafe {
                asm!(
                    "tileloadd tmm4, [{upper} + {stride}]",
                    "tileloadd tmm6, [{right} + {row}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{right} + {row} + 64]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm5, [{lower} + {stride}]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    upper = in(reg) upper.as_ptr(),
                    lower = in(reg) lower.as_ptr(),
                    right = in(reg) right.as_ptr(),
                    stride = in(reg) 2 * stride,
                    row = in(reg) ROW,
                    options(nostack, readonly),
                );
            }
        }
        // SAFETY: the tile has 32 rows of 32 numbers.
        unsafe {
            asm!(
                "tilestored [{upper} + {row}], tmm0",
                "tilestored [{upper} + {row} + 64], tmm1",
                "tilestored [{lower} + {row}], tmm2",
                "tilestored [{lower} + {row} + 64], tmm3",
                upper = in(reg) tile.0.as_mut_ptr(),
                lower = in(reg) tile.0[ROWS..].as_mut_ptr(),
                row = in(reg) ROW,
                options(nostack),
            );
        }
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        if DEPTH.replace(DEPTH.get() - 1) == 1 {
            // SAFETY: `new` has found the instruction.
            unsafe { asm!("tilerelease", options(nostack, nomem)) }
        }
    }
}
