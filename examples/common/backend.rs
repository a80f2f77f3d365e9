//! The backend that the cargo features choose. Examples, tests and benches all take it from here;
//! with several features the most specialised one wins, so that `--features wgpu` is enough to
//! leave the default.

// Nobody needs all of it.
#![allow(dead_code)]

#[cfg(not(any(feature = "ndarray", feature = "flex", feature = "wgpu")))]
compile_error!(
    "no backend was chosen: add `--features ndarray` (CPU, the default), `flex` (CPU), `wgpu`, \
     `vulkan`, `metal` or `cuda`"
);

/// The chosen backend's name, as its feature is called.
pub const NAME: &str = if cfg!(feature = "vulkan") {
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

/// The chosen backend, which infers and does not train.
#[cfg(feature = "wgpu")]
pub type Plain = burn::backend::Wgpu;
#[cfg(all(feature = "flex", not(feature = "wgpu")))]
pub type Plain = burn::backend::Flex;
#[cfg(all(feature = "ndarray", not(any(feature = "wgpu", feature = "flex"))))]
pub type Plain = burn::backend::NdArray;

/// The chosen backend, which trains.
pub type Train = burn::backend::Autodiff<Plain>;

/// Runs one operation, so that a missing driver is one clear message and not a panic later on.
pub fn check() -> Result<(), String> {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let probe = std::panic::catch_unwind(|| {
        burn::tensor::Tensor::<Plain, 1>::ones([1], &Default::default()).into_data()
    });
    std::panic::set_hook(hook);
    probe.map(drop).map_err(|_| {
        format!(
            "the `{NAME}` backend found no usable driver. Install your GPU's driver (or, to run \
             without a GPU, Mesa's software Vulkan: `apt-get install mesa-vulkan-drivers`), or use \
             the CPU: leave out the backend feature"
        )
    })
}
