//! The backend of a program, which its cargo features choose.

use std::panic;

use burn::tensor::{Tensor, backend::Backend};

use crate::Result;

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

        /// The number of threads that can share a training step: GPUs are busy with one.
        pub fn cores() -> usize {
            if cfg!(any(feature = "cuda", feature = "rocm", feature = "wgpu")) {
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

        /// Runs one operation, so that a missing driver gives a clear message and not a panic later.
        pub fn check() -> $crate::Result<()> {
            $crate::cli::backend::check::<Plain>(NAME)
        }
    };
}

/// Runs one operation on the backend of this name.
///
/// # Errors
///
/// If it panics, as Burn does where there is no driver.
pub fn check<B: Backend>(name: &str) -> Result<()> {
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
