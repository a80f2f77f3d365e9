//! How a model lists its layers, alone and in containers.

use std::collections::BTreeSet;

use burn::tensor::backend::Backend;

use super::LoraModule;
use crate::{LoraLayer, walk};

/// The layers of a model that can carry adapters, by path; see [`LoraModule::lora_layers`].
#[derive(Default)]
pub struct LoraLayers<'a, B: Backend>(pub(crate) Listed<'a, B>);

/// Paths and layers.
pub(crate) type Listed<'a, B> = Vec<(String, Box<dyn LoraLayer<B> + 'a>)>;

impl<'a, B: Backend> LoraLayers<'a, B> {
    /// No layers yet.
    pub fn new() -> Self {
        Self(Vec::new())
    }

    /// Adds the field `name`: a layer, a module that has layers, or a `Vec`, an array or an `Option`
    /// of either.
    pub fn with<M: LoraModule<B>>(mut self, name: &str, module: &'a mut M) -> Self {
        let below = module.lora_layers().0.into_iter().map(|(path, layer)| {
            let path = if path.is_empty() { name.to_owned() } else { format!("{name}.{path}") };
            (path, layer)
        });
        self.0.extend(below);
        self
    }

    /// The layer itself: how a layer implements [`LoraModule`].
    pub fn of(layer: &'a mut impl LoraLayer<B>) -> Self {
        Self(vec![(String::new(), Box::new(layer))])
    }
}

impl<B: Backend, M: LoraModule<B>> LoraModule<B> for Vec<M> {
    fn lora_layers(&mut self) -> LoraLayers<'_, B> {
        numbered(self)
    }
}

impl<B: Backend, M: LoraModule<B>, const N: usize> LoraModule<B> for [M; N] {
    fn lora_layers(&mut self) -> LoraLayers<'_, B> {
        numbered(self)
    }
}

impl<B: Backend, M: LoraModule<B>> LoraModule<B> for Option<M> {
    fn lora_layers(&mut self) -> LoraLayers<'_, B> {
        self.as_mut().map_or_else(LoraLayers::new, LoraModule::lora_layers)
    }
}

fn numbered<B: Backend, M: LoraModule<B>>(modules: &mut [M]) -> LoraLayers<'_, B> {
    let modules = modules.iter_mut().enumerate();
    modules.fold(LoraLayers::new(), |layers, (index, it)| layers.with(&index.to_string(), it))
}

/// The layers that the model lists, once it is certain that it lists all of them.
pub(super) fn listed<B: Backend, M: LoraModule<B>>(model: &mut M) -> Listed<'_, B> {
    let found = walk::visit(model).lora_layers;
    let layers = model.lora_layers().0;
    let listed = paths(&layers);
    let missing: Vec<_> = found.iter().filter(|path| !listed.contains(path)).collect();
    let unknown: Vec<_> = listed.iter().filter(|path| !found.contains(path)).collect();
    assert!(
        missing.is_empty() && unknown.is_empty(),
        "`lora_layers` must list every LoRA layer under its field's name: \
         missing {missing:?}, unknown {unknown:?}"
    );
    layers
}

/// The listed layers by [`LoraModule::peft_name`].
pub(super) fn named<B: Backend, M: LoraModule<B>>(model: &mut M) -> Listed<'_, B> {
    let layers: Listed<B> =
        listed(model).into_iter().map(|(path, layer)| (M::peft_name(&path), layer)).collect();
    let mut names = BTreeSet::new();
    for (name, _) in &layers {
        assert!(names.insert(name), "`peft_name` must not give two layers the name `{name}`");
    }
    layers
}

pub(super) fn paths<B: Backend>(layers: &Listed<B>) -> Vec<String> {
    layers.iter().map(|(path, _)| path.clone()).collect()
}
