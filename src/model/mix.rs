//! Models for batches in which samples have different adapters.

use std::{collections::BTreeMap, sync::Arc};

use burn::{module::Module, tensor::backend::Backend};

use crate::{
    adapter::{LoraAdapter, Mixed},
    layer::LoraLayerMut,
    traverse,
};

/// Adapters by the paths of their layers.
pub(crate) type ByPath<B> = BTreeMap<String, LoraAdapter<B>>;

/// The model for a batch that begins with so many samples for the first set, and so on. The sets
/// fit it, and its layers can take several adapters.
pub(crate) fn mixed<B: Backend, M: Module<B>>(
    base: M,
    groups: Vec<(usize, Option<Arc<ByPath<B>>>)>,
) -> M {
    base.map(&mut traverse::changer(move |path: &str, layer: &mut dyn LoraLayerMut<B>| {
        let of = |set: &Option<Arc<ByPath<B>>>| set.as_ref()?.get(path).cloned();
        match &groups[..] {
            // An adapter for all samples is no different from one in training, and faster.
            [(_, set)] => {
                if let Some(adapter) = of(set) {
                    layer.set_adapter(Some(adapter));
                }
            }
            groups if groups.iter().any(|(_, set)| of(set).is_some()) => {
                let mixed = Mixed::new(groups.iter().map(|(samples, set)| (*samples, of(set))));
                assert!(layer.set_mixed(mixed), "`{path}` has one adapter for all samples");
            }
            _ => {}
        }
    }))
}
