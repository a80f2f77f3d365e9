//! Batch norms of an adapted model: which of them would move the base, and what is saved of those that move.

use std::collections::BTreeSet;

use burn::{
    module::{AutodiffModule, Module},
    tensor::backend::{AutodiffBackend, Backend},
};

use super::Lora;
use crate::{
    error::LoraError,
    traverse::{self, Seen},
};

/// A copy of the model with running statistics of its own.
pub(super) fn own<B: AutodiffBackend, M: AutodiffModule<B>>(model: &M) -> M {
    // No other operation of Burn's makes a new cell for them.
    M::from_inner(model.valid())
}

/// The same for a model without autodiff.
pub(super) fn own_inner<B: AutodiffBackend, M: AutodiffModule<B>>(
    model: &M::InnerModule,
) -> M::InnerModule {
    M::from_inner(model.clone()).valid()
}

/// An error if a pass on the model would move running statistics of its base.
pub(super) fn require_frozen<B: Backend, M: Module<B>>(lora: &Lora<B, M>) -> Result<(), LoraError> {
    let autodiff = || lora.model.devices().first().is_some_and(|device| B::ad_enabled(device));
    if lora.statistics.is_empty() || lora.own.is_some() || !autodiff() {
        return Ok(());
    }
    let norms = lora.statistics.iter().map(|path| parent(path).to_owned());
    let paths = norms.collect::<BTreeSet<_>>().into_iter().collect();
    Err(LoraError::SharedStatistics { paths })
}

/// The module that holds the parameter at `path`.
fn parent(path: &str) -> &str {
    path.rsplit_once('.').map_or("", |(module, _)| module)
}

/// The model, which remembers what its norms are now if their statistics are going to move, so that it can be given
/// back and is saved.
pub(super) fn remembered<B: Backend, M: Module<B>>(mut lora: Lora<B, M>) -> Lora<B, M> {
    if lora.own.is_none() || lora.statistics.is_empty() {
        return lora;
    }
    let modules: BTreeSet<_> = lora.statistics.iter().map(|path| parent(path).to_owned()).collect();
    let params = traverse::params::<B, M>(&*lora.model).into_iter();
    let params = params.filter(|it| modules.contains(&it.module)).map(|it| it.path);
    let new: BTreeSet<_> = params.filter(|path| !lora.originals.contains_key(path)).collect();
    lora.originals.extend(traverse::values(&*lora.model, &new));
    for module in modules {
        if !lora.modules.contains(&module) {
            lora.modules.push(module);
        }
    }
    lora
}

/// The running statistics among `params` that move because their norm trains, which it does with its factor.
pub(super) fn moving(params: &[Seen], trains: impl Fn(&str) -> bool) -> Vec<&Seen> {
    let norms = params.iter().filter(|it| it.path.ends_with("gamma") && trains(&it.path));
    let norms: BTreeSet<_> = norms.map(|it| it.module.as_str()).collect();
    let is_own = |it: &&Seen| it.is_statistic && !it.is_shared;
    params.iter().filter(is_own).filter(|it| norms.contains(it.module.as_str())).collect()
}
