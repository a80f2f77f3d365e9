//! Batch norms of an adapted model: which of them would move the base, and what is saved of those that move.

use std::collections::BTreeSet;

use burn::{
    module::{AutodiffModule, Module},
    tensor::backend::{AutodiffBackend, Backend},
};

use super::{Lora, ParameterRecord, fully_trained, record, saved};
use crate::{
    adapters::LoraAdapters,
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

/// An error if records would change running statistics that clones of the model share.
pub(super) fn require_same<B: Backend, M: Module<B>>(
    lora: &Lora<B, M>,
    records: &[ParameterRecord<B>],
) -> Result<(), LoraError> {
    if lora.statistics.is_empty() || lora.own.is_some() {
        return Ok(());
    }
    let here = record::save::<B, M>(&lora.model, &lora.statistics);
    let value = |record: &ParameterRecord<B>| record.values.val().into_data();
    let others = here.iter().filter(|here| {
        let recorded = records.iter().find(|it| it.path == here.path);
        recorded.is_some_and(|it| value(it) != value(here))
    });
    let paths: BTreeSet<_> = others.map(|it| parent(&it.path).to_owned()).collect();
    match paths.is_empty() {
        true => Ok(()),
        false => Err(LoraError::SharedStatistics { paths: paths.into_iter().collect() }),
    }
}

/// The parameters of norms with shared statistics that are in the set as they are in the model: they are there for the
/// statistics, and were not trained.
pub(super) fn staying<B: Backend, M: Module<B>>(
    lora: &Lora<B, M>,
    set: &LoraAdapters<B>,
    params: &[Seen],
) -> BTreeSet<String> {
    let norms: BTreeSet<_> = params.iter().filter(|it| it.is_shared).map(|it| &it.module).collect();
    let brought =
        |it: &&Seen| norms.contains(&it.module) && set.extras.contains_key(&it.torch_name);
    let brought: Vec<_> = params.iter().filter(brought).collect();
    let paths = brought.iter().map(|it| it.path.clone()).collect();
    let here = fully_trained::read::<B, M>(&lora.model, &paths);
    let stays = brought.into_iter().filter(|it| {
        let (here, brought) = (&here[&it.torch_name], &set.extras[&it.torch_name]);
        here.values.to_data().convert::<f32>() == brought.values.to_data().convert::<f32>()
    });
    stays.map(|it| it.path.clone()).collect()
}

/// The model, which remembers what its norms are now if their statistics are going to move, so that it can be given
/// back and is saved.
pub(super) fn remembered<B: Backend, M: Module<B>>(mut lora: Lora<B, M>) -> Lora<B, M> {
    if lora.own.is_none() || lora.statistics.is_empty() {
        return lora;
    }
    let params = traverse::params::<B, M>(&*lora.model);
    let norms: BTreeSet<_> = params.iter().filter(|it| it.is_shared).map(|it| &it.module).collect();
    let of_norms = params.iter().filter(|it| norms.contains(&it.module));
    let covered: Vec<_> = of_norms.map(|it| (it, it.module.as_str())).collect();
    let new = covered.iter().map(|(it, _)| it.path.clone());
    let new: BTreeSet<_> = new.filter(|path| !lora.originals.contains_key(path)).collect();
    lora.originals.extend(traverse::values(&*lora.model, &new));
    saved::note(&mut lora.modules, &params, &covered);
    lora
}

/// The running statistics among `params` that move because their norm trains, which it does with its factor.
pub(super) fn moving(params: &[Seen], trains: impl Fn(&str) -> bool) -> Vec<&Seen> {
    let norms = params.iter().filter(|it| it.path.ends_with("gamma") && trains(&it.path));
    let norms: BTreeSet<_> = norms.map(|it| it.module.as_str()).collect();
    let is_own = |it: &&Seen| it.is_statistic && !it.is_shared;
    params.iter().filter(is_own).filter(|it| norms.contains(it.module.as_str())).collect()
}
