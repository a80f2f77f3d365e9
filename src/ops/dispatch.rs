//! Which backend computes an operation.

use std::{any::Any, env, marker::PhantomData, sync::LazyLock};

use burn::{
    backend::{
        Autodiff,
        autodiff::checkpoint::strategy::{
            BalancedCheckpointing, CheckpointStrategy, NoCheckpointing,
        },
    },
    tensor::backend::Backend,
};

use super::{backend::Cpu, operation::Operation};

/// Whether Burn's operations are used everywhere. The variable is read once.
static PORTABLE: LazyLock<bool> =
    LazyLock::new(|| env::var_os("BURN_LORA_PORTABLE").is_some_and(|it| it == "1"));

/// The output of the operation, on the CPU backends of the features `flex` and `ndarray` with their default
/// types of elements, with and without autodiff. `None` on other backends, without these features, and for
/// inputs that the operation is not made for: the caller uses Burn's operations then.
///
/// If the environment variable `BURN_LORA_PORTABLE` is `1`, the result is always `None`. So it can be found out
/// whether a wrong or slow result is due to this module.
pub(crate) fn run<O: Operation, B: Backend>(input: &O::Input<B>) -> Option<O::Output<B>> {
    if *PORTABLE {
        return None;
    }
    let backends: &[RunOn<O, B>] = &[
        #[cfg(feature = "flex")]
        run_on::<O, B, burn_flex::Flex>,
        #[cfg(feature = "ndarray")]
        run_on::<O, B, burn_ndarray::NdArray>,
    ];
    backends.iter().find_map(|run_on| run_on(input))
}

/// The operation on one of the CPU backends; `None` if B is another one.
type RunOn<O, B> = fn(&<O as Operation>::Input<B>) -> Option<<O as Operation>::Output<B>>;

/// Whether [`run`] computes anything on the backend. For callers that would have to prepare an input.
pub(crate) fn runs_on<B: Backend>() -> bool {
    run::<Nothing, B>(&PhantomData).is_some()
}

/// The output of the operation if B is the CPU backend K, or that with autodiff.
#[cfg_attr(
    not(any(feature = "flex", feature = "ndarray")),
    allow(dead_code, reason = "there is no CPU backend")
)]
fn run_on<O: Operation, B: Backend, K: Cpu>(input: &O::Input<B>) -> Option<O::Output<B>> {
    let input: &dyn Any = input;
    if let Some(input) = input.downcast_ref() {
        return same(O::forward::<K>(input));
    }
    if let Some(input) = input.downcast_ref() {
        return same(O::tracked::<K, NoCheckpointing>(input));
    }
    same(O::tracked::<K, BalancedCheckpointing>(input.downcast_ref()?))
}

/// The value under its other name. `None` also if the types differ.
fn same<T: 'static, U: 'static>(mut value: Option<T>) -> Option<U> {
    let value: &mut dyn Any = &mut value;
    value.downcast_mut::<Option<U>>()?.take()
}

/// An operation that is done as soon as there is a backend for it.
struct Nothing;

impl Operation for Nothing {
    type Input<B: Backend> = PhantomData<B>;
    type Output<B: Backend> = ();

    fn forward<K: Cpu>(_: &PhantomData<K>) -> Option<()> {
        Some(())
    }

    fn tracked<K: Cpu, C: CheckpointStrategy>(_: &PhantomData<Autodiff<K, C>>) -> Option<()> {
        Some(())
    }
}
