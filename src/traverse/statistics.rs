//! Running statistics of batch norms. Burn keeps them in cells that all clones of a model share, and
//! every forward pass on an autodiff backend moves them, whether the model is frozen or not.

use std::{
    collections::BTreeSet,
    panic::{self, AssertUnwindSafe},
};

use burn::{module::Module, tensor::backend::Backend};

use super::{Values, restore, values};

/// Has the running statistics take in what the last passes left for them.
pub(crate) fn sync<B: Backend, M: Module<B>>(model: &M) {
    // Burn does so, for all clones at once, when it makes a record.
    drop(model.clone().into_record());
}

/// The result of `pass`, after which the running statistics at `paths` of `model` and all of its
/// clones are what they were before, also if it panics.
pub(crate) fn unmoved<B: Backend, M: Module<B>, R>(
    model: &M,
    paths: &BTreeSet<String>,
    pass: impl FnOnce() -> R,
) -> R {
    // Without autodiff they do not move.
    let autodiff = || model.devices().first().is_some_and(|device| B::ad_enabled(device));
    if paths.is_empty() || !autodiff() {
        return pass();
    }
    let before: Values<B> = values(model, paths);
    let result = panic::catch_unwind(AssertUnwindSafe(pass));
    sync::<B, M>(model);
    drop(restore(model.clone(), &before));
    result.unwrap_or_else(|panic| panic::resume_unwind(panic))
}
