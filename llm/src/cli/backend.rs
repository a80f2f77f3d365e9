//! The backend of a program, which its cargo features choose.

use std::{env, panic};

use burn::tensor::{Tensor, backend::Backend};
use burn_lora_kernels::{Instructions, VARIABLE};

use crate::{Context, Result};

/// Defines in a module what the cargo features of the calling package choose: `Plain` and `Train`, the backend for
/// inference and for training; its `NAME`; `cores`, the number of threads that can share a training step; and
/// `check`, which looks for its driver.
///
/// With several features the most specialized one wins, so that `--features wgpu` overrides the default. The package
/// has the features `ndarray`, `ndarray-blas`, `flex`, `wgpu`, `vulkan`, `metal`, `cuda` and `rocm`, and depends on
/// `burn`.
#[macro_export]
macro_rules! choose_backend {
    () => {
        #[cfg(not(any(
            feature = "ndarray",
            feature = "flex",
            feature = "wgpu",
            feature = "cuda",
            feature = "rocm"
        )))]
        compile_error!(
            "no backend was chosen: add `--features ndarray` (CPU, the default), `flex` (CPU), `wgpu`, \
             `vulkan`, `metal`, `cuda` or `rocm`"
        );

        /// The name of the chosen backend's feature.
        pub const NAME: &str = if cfg!(feature = "cuda") {
            "cuda"
        } else if cfg!(feature = "rocm") {
            "rocm"
        } else if cfg!(feature = "vulkan") {
            "vulkan"
        } else if cfg!(feature = "metal") {
            "metal"
        } else if cfg!(feature = "wgpu") {
            "wgpu"
        } else if cfg!(feature = "flex") {
            "flex"
        } else if cfg!(feature = "ndarray-blas") {
            "ndarray-blas"
        } else {
            "ndarray"
        };

        /// Whether it computes on the processor, in the memory of the machine.
        pub const ON_CPU: bool =
            !cfg!(any(feature = "cuda", feature = "rocm", feature = "wgpu"));

        /// The number of threads that can share a training step: GPUs are busy with one.
        pub fn cores() -> usize {
            if !ON_CPU {
                return 1;
            }
            std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
        }

        /// The backends whose features are on. All are named, so that a build with several features checks them all.
        #[allow(unused_imports, reason = "all but the chosen one are only named")]
        mod known {
            #[cfg(feature = "cuda")]
            pub use burn::backend::Cuda;
            #[cfg(feature = "flex")]
            pub use burn::backend::Flex;
            #[cfg(feature = "ndarray")]
            pub use burn::backend::NdArray;
            #[cfg(feature = "rocm")]
            pub use burn::backend::Rocm;
            #[cfg(feature = "wgpu")]
            pub use burn::backend::Wgpu;
        }

        mod chosen {
            #[cfg(feature = "cuda")]
            pub use super::known::Cuda as Plain;

            #[cfg(all(feature = "rocm", not(feature = "cuda")))]
            pub use super::known::Rocm as Plain;

            #[cfg(all(feature = "wgpu", not(any(feature = "cuda", feature = "rocm"))))]
            pub use super::known::Wgpu as Plain;

            #[cfg(not(any(feature = "cuda", feature = "rocm", feature = "wgpu")))]
            pub use cpu::Plain;

            #[cfg(not(any(feature = "cuda", feature = "rocm", feature = "wgpu")))]
            mod cpu {
                #[cfg(feature = "flex")]
                pub use super::super::known::Flex as Plain;

                #[cfg(all(feature = "ndarray", not(feature = "flex")))]
                pub use super::super::known::NdArray as Plain;
            }
        }

        /// The chosen backend, for inference.
        pub type Plain = chosen::Plain;

        /// The chosen backend, for training.
        pub type Train = burn::backend::Autodiff<Plain>;

        /// Runs one operation, so that a missing driver gives a clear message and not a panic later. Checks the
        /// variable that chooses instructions, too.
        pub fn check() -> $crate::Result<()> {
            $crate::cli::backend::check::<Plain>(NAME)
        }
    };
}

/// Checks that the environment variable [`VARIABLE`], if there is one, names instructions that are there. Products would
/// panic.
///
/// # Errors
///
/// If it names none, or some that this processor does not have.
pub fn check_instructions() -> Result<()> {
    let Some(name) = env::var_os(VARIABLE) else { return Ok(()) };
    let chosen: Instructions = name.to_string_lossy().parse().context(VARIABLE)?;
    match chosen.are_there() {
        true => Ok(()),
        false => {
            let there = Instructions::ALL.into_iter().filter(|it| it.are_there());
            let there: Vec<_> = there.map(Instructions::name).collect();
            let there = there.join(", ");
            Err(format!("{VARIABLE}: this processor has no {chosen}; it has {there}"))
        }
    }
}

/// Runs one operation on the backend of this name.
///
/// # Errors
///
/// If it panics, as Burn does where there is no driver. As [`check_instructions`].
pub fn check<B: Backend>(name: &str) -> Result<()> {
    check_instructions()?;
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    let probe = panic::catch_unwind(|| Tensor::<B, 1>::ones([1], &Default::default()).into_data());
    panic::set_hook(hook);
    probe.map(drop).map_err(|_| {
        format!(
            "the `{name}` backend found no usable driver. Install your GPU's driver (or, to run \
             without a GPU, Mesa's software Vulkan: `apt-get install mesa-vulkan-drivers`), or use \
             the CPU: leave out the backend feature"
        )
    })
}
