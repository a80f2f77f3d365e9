//! Adapters that start with the directions in which their layers' inputs vary the most.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
};

use burn::{module::Module, tensor::backend::Backend};

use super::{Lora, record};
use crate::{
    adapter::{LoraAdapter, Observer, Principal, WeightLayout},
    config::{Init, LoraConfig},
    error::LoraError,
    layer::LoraLayer,
    traverse,
};

/// The model with adapters whose A is of the principal directions, after `see` has run it on data.
pub(super) fn attach<B: Backend, M: Module<B>>(
    base: &Lora<B, M>,
    config: &LoraConfig,
    rho: f64,
    see: impl FnOnce(&Lora<B, M>),
) -> Result<Lora<B, M>, LoraError> {
    assert!(rho >= 1.0 && rho.is_finite(), "rho must be a number of at least 1, got {rho}");
    if !matches!(config.init, Init::KaimingUniform | Init::Gaussian) {
        let problem = format!("is {:?}, and EVA has initial values of its own", config.init);
        return Err(LoraError::InvalidConfig { field: "init", problem });
    }
    let before: BTreeSet<_> = record::adapters(base).into_iter().map(|(path, _)| path).collect();
    let lora = base.attach(config)?;
    let observers: Rc<RefCell<BTreeMap<String, Observer<B>>>> = Rc::default();
    let noted = observers.clone();
    let observed = lora.clone().unshared().change_layers(move |path, layer| {
        let Some(adapter) = layer.adapter() else { return };
        let is_new = !before.contains(path);
        if is_new && layer.weight_layout() == WeightLayout::Matrix && layer.capabilities().dropout {
            let mut adapter = adapter.clone();
            let observer = noted.borrow_mut().entry(path.to_owned()).or_default().clone();
            adapter.training.observer = Some(observer);
            layer.set_adapter(Some(adapter));
        }
    });
    see(&observed);
    drop(observed);

    let ranks = traverse::layers(&lora, |path, layer: &dyn LoraLayer<B>| {
        (path.to_owned(), layer.adapter().map_or(0, LoraAdapter::rank))
    });
    let ranks: BTreeMap<_, _> = ranks.into_iter().collect();
    let mut found = BTreeMap::new();
    for (path, observer) in observers.take() {
        let count = (ranks[&path] as f64 * rho).round() as usize;
        let Some(principal) = observer.principal(count) else {
            let problem = "EVA looks at its inputs, which were not seen, or not finite".to_owned();
            return Err(LoraError::Unusable { path, problem });
        };
        found.insert(path, principal);
    }
    let ranks = redistributed(&found, &ranks);
    let lora = lora.change_layers(move |path, layer| {
        let (Some(principal), Some(adapter)) = (found.get(path), layer.adapter()) else { return };
        let (adapter, device) = (adapter.clone(), layer.device());
        let columns = |rank| principal.columns(rank, &device);
        let rank = ranks[path];
        layer.set_adapter((rank > 0).then(|| adapter.starting_with(columns(rank))));
    });
    // Some layers may have lost their adapters.
    let in_full = lora.originals.keys().filter(|path| lora.trains.contains(*path)).cloned();
    let in_full = in_full.collect();
    Ok(lora.training(&in_full))
}

/// The ranks by the directions' shares of the variance: those with the largest shares, as many as there are ranks
/// in all.
fn redistributed(
    found: &BTreeMap<String, Principal>,
    ranks: &BTreeMap<String, usize>,
) -> BTreeMap<String, usize> {
    let budget = found.keys().map(|path| ranks[path]).sum();
    let shares =
        found.iter().flat_map(|(path, it)| it.shares.iter().map(move |share| (share, path)));
    let mut shares: Vec<_> = shares.collect();
    shares.sort_by(|one, other| other.0.total_cmp(one.0));
    let mut counts: BTreeMap<String, usize> = found.keys().map(|path| (path.clone(), 0)).collect();
    for (_, path) in shares.into_iter().take(budget) {
        *counts.get_mut(path).expect("it was counted") += 1;
    }
    counts
}
