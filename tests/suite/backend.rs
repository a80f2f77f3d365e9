//! The backend of the tests.
//!
//! Cargo builds all packages of a workspace together, so that a feature that another package asks for is on here, too:
//! the program's default is `flex`. `ndarray` is the default of this package, and so wins over `flex`.

#[cfg(not(any(feature = "ndarray", feature = "flex", feature = "wgpu")))]
compile_error!(
    "no backend was chosen: add `--features ndarray` (CPU, the default), `flex` (CPU) or `wgpu`"
);

/// The name of the chosen backend's feature.
pub const NAME: &str = if cfg!(feature = "wgpu") {
    "wgpu"
} else if cfg!(feature = "ndarray") {
    "ndarray"
} else {
    "flex"
};

#[cfg(all(feature = "flex", not(any(feature = "ndarray", feature = "wgpu"))))]
pub use burn::backend::Flex as Plain;
#[cfg(all(feature = "ndarray", not(feature = "wgpu")))]
pub use burn::backend::NdArray as Plain;
#[cfg(feature = "wgpu")]
pub use burn::backend::Wgpu as Plain;

/// The same, for training.
pub type Train = burn::backend::Autodiff<Plain>;

/// `BURN_LORA_TEST_BACKEND` says where the tests are to run, so that they cannot run elsewhere unnoticed.
#[test]
fn the_backend_is_the_one_that_was_asked_for() {
    if let Ok(expected) = std::env::var("BURN_LORA_TEST_BACKEND") {
        assert_eq!(NAME, expected);
    }
}
