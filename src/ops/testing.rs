//! The backends on which an operation is tested.

/// Tests that `$computes`, a function of the backend alone, is true on the CPU backends whose features are on,
/// with and without autodiff, and false on others: there [`run`](super::run) leaves it to Burn's operations.
macro_rules! test_on_each_backend {
    ($computes:ident) => {
        #[cfg(feature = "flex")]
        #[test]
        fn one_operation_on_flex() {
            use burn::backend::{
                Autodiff, Flex, autodiff::checkpoint::strategy::BalancedCheckpointing,
            };

            assert!($computes::<Flex>());
            assert!($computes::<Autodiff<Flex>>());
            assert!($computes::<Autodiff<Flex, BalancedCheckpointing>>());
        }

        #[cfg(feature = "ndarray")]
        #[test]
        fn one_operation_on_ndarray_in_single_precision() {
            use burn::backend::{
                Autodiff, NdArray, autodiff::checkpoint::strategy::BalancedCheckpointing,
            };

            assert!($computes::<NdArray>());
            assert!($computes::<Autodiff<NdArray>>());
            assert!($computes::<Autodiff<NdArray, BalancedCheckpointing>>());
            assert!(!$computes::<NdArray<f64>>());
            assert!(!$computes::<Autodiff<NdArray<f64>>>());
        }

        #[cfg(not(any(feature = "flex", feature = "ndarray")))]
        #[test]
        fn no_operation_without_the_features() {
            assert!(!$computes::<burn::backend::Flex>());
        }
    };
}

pub(super) use test_on_each_backend;
