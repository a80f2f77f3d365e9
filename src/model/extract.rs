//! Adapters made of the difference of two models.

use std::{
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
};

use burn::{
    module::Module,
    tensor::{ElementConversion, Tensor, backend::Backend},
};

use super::{attach, fully_trained};
use crate::{
    adapter::{LoraAdapter, WeightLayout},
    adapters::{Approximation, LoraAdapters, low_rank},
    config::LoraConfig,
    error::LoraError,
    layer::LoraLayer,
    tensors::at_least_f32,
    traverse,
};

/// A layer that is to get an adapter.
struct Layer<B: Backend> {
    path: String,
    rank: usize,
    layout: WeightLayout,
    is_adapted: bool,
    weight: Tensor<B, 2>,
}

pub(super) fn extract<B: Backend, M: Module<B>>(
    base: &M,
    tuned: &M,
    config: &LoraConfig,
) -> Result<Approximation<B>, LoraError> {
    let paths = traverse::layer_paths::<B, M>(base);
    assert_eq!(
        paths,
        traverse::layer_paths::<B, M>(tuned),
        "the two models' layers must be the same"
    );
    let plan = Rc::new(config.resolve(&paths)?);
    let layers = |model: &M| {
        let plan = plan.clone();
        let layers = traverse::layers(model, move |path, layer: &dyn LoraLayer<B>| {
            plan.get(path).map(|config| Layer {
                path: path.to_owned(),
                rank: config.rank,
                layout: layer.weight_layout(),
                is_adapted: layer.adapter().is_some(),
                weight: layer.weight_matrix(),
            })
        });
        layers.into_iter().flatten().collect::<Vec<_>>()
    };
    let (base, tuned_layers) = (layers(base), layers(tuned));
    let adapted = base.iter().chain(&tuned_layers).filter(|it| it.is_adapted);
    let paths: BTreeSet<_> = adapted.map(|it| it.path.clone()).collect();
    if !paths.is_empty() {
        return Err(LoraError::AlreadyAttached { paths: paths.into_iter().collect() });
    }

    let mut kept = BTreeMap::new();
    let mut adapters = Vec::new();
    for (Layer { path, rank, layout, weight, .. }, tuned) in base.into_iter().zip(tuned_layers) {
        let delta = at_least_f32(tuned.weight) - at_least_f32(weight);
        if !delta.clone().is_finite().all().into_scalar().elem::<bool>() {
            let problem = "the difference of its weights has NaN or infinite values";
            return Err(LoraError::Unusable { path, problem: problem.to_owned() });
        }
        let (adapter, share) = low_rank::extract(delta, rank);
        kept.insert(path.clone(), share);
        adapters.push((path, LoraAdapter { layout, ..adapter }));
    }
    let mut set = LoraAdapters::new(adapters);
    let tuned = super::Lora::new(tuned.clone());
    let saved = attach::train_in_full(tuned, plan.modules_to_save(), attach::MODULES_TO_SAVE)?;
    set.extras = fully_trained::read(&*saved.model, &saved.originals.keys().cloned().collect());
    set.modules_to_save = saved.modules;
    Ok(Approximation { adapters: set, kept })
}
