//! What is saved of an adapted model: the adapters, and what trains in full; nothing of what is frozen.

use std::collections::{BTreeMap, BTreeSet};

use burn::{
    module::{Module, Param},
    record::Record,
    tensor::{Tensor, backend::Backend},
};

use crate::{
    adapter::{LoraAdapter, LoraAdapterRecord},
    burn_faults::unshared,
    error::{LoraError, some_of},
    layer::LoraLayer,
    traverse::{self, Map, Place, Visit},
};

/// What a record keeps of a [`Lora`](crate::Lora).
#[derive(Debug, Clone, Record)]
pub struct LoraRecord<B: Backend> {
    /// The adapters.
    pub adapters: Vec<PlacedAdapterRecord<B>>,
    /// The parameters that train in full, and running statistics.
    pub parameters: Vec<ParameterRecord<B>>,
    /// The paths of what trains.
    pub trains: Vec<String>,
    /// The modules that train in full, as a set of adapters names them.
    pub modules: Vec<String>,
    /// What the file of the adapters said beyond what this crate uses, as JSON.
    pub described: String,
    /// The parameters that are those of a `Conv1D` in the file.
    pub conv1d: Vec<String>,
}

/// An adapter and its place.
#[derive(Debug, Clone, Record)]
pub struct PlacedAdapterRecord<B: Backend> {
    /// The path of the layer.
    pub path: String,
    /// The adapter.
    pub adapter: LoraAdapterRecord<B>,
}

/// A parameter of the base and its place.
#[derive(Debug, Clone, Record)]
pub struct ParameterRecord<B: Backend> {
    /// The path of the parameter.
    pub path: String,
    /// The elements, row by row. The id is the parameter's: by it optimizers find their state.
    pub values: Param<Tensor<B, 1>>,
}

/// The adapters in the model, by the paths of their layers.
pub(crate) fn adapters<B: Backend, M: Module<B>>(model: &M) -> Vec<(String, LoraAdapter<B>)> {
    let layers = traverse::layers(model, |path, layer: &dyn LoraLayer<B>| {
        Some((path.to_owned(), layer.adapter()?.clone()))
    });
    layers.into_iter().flatten().collect()
}

/// The record in memory of its own. burn-train reads a checkpoint on another thread, while the training
/// goes on.
pub(super) fn unshared_adapter<B: Backend>(record: LoraAdapterRecord<B>) -> LoraAdapterRecord<B> {
    let LoraAdapterRecord { a, b, bias, magnitude, .. } = record;
    let (bias, magnitude) = (bias.map(unshared), magnitude.map(unshared));
    LoraAdapterRecord { a: unshared(a), b: unshared(b), bias, magnitude, ..record }
}

/// The parameters at `paths`.
pub(super) fn save<B: Backend, M: Module<B>>(
    model: &M,
    paths: &BTreeSet<String>,
) -> Vec<ParameterRecord<B>> {
    struct Saver<'a, B: Backend>(&'a BTreeSet<String>, Vec<ParameterRecord<B>>);
    impl<B: Backend> Visit<B> for Saver<'_, B> {
        fn param<const D: usize>(&mut self, place: &Place, param: &Param<Tensor<B, D>>) {
            let path = place.path();
            if self.0.contains(path) {
                let size = param.shape().num_elements();
                let values = Param::initialized(param.id, param.val().reshape([size]));
                self.1.push(ParameterRecord { path: path.to_owned(), values: unshared(values) });
            }
        }
    }
    let mut saver = Saver(paths, vec![]);
    traverse::visit(model, &mut saver);
    saver.1
}

/// The model with the recorded values and ids, frozen or not as it was. Fails if it lacks one of the parameters, or
/// has it in another size.
pub(super) fn load<B: Backend, M: Module<B>>(
    model: M,
    records: Vec<ParameterRecord<B>>,
) -> Result<M, LoraError> {
    struct Loader<B: Backend> {
        /// Those that still have to find their place.
        values: BTreeMap<String, Param<Tensor<B, 1>>>,
        problem: Option<String>,
    }
    impl<B: Backend> Map<B> for Loader<B> {
        fn param<const D: usize>(
            &mut self,
            place: &Place,
            param: Param<Tensor<B, D>>,
        ) -> Param<Tensor<B, D>> {
            let path = place.path();
            let Some(values) = self.values.remove(path) else { return param };
            let (expected, found) = (param.shape().num_elements(), values.shape().num_elements());
            if expected != found {
                self.problem.get_or_insert(format!(
                    "the record has {found} elements for `{path}`, and the model {expected}"
                ));
                return param;
            }
            let (_, current, mapper) = param.consume();
            let value = values.val().to_device(&current.device()).reshape(current.dims());
            let value = value.detach().set_require_grad(current.is_require_grad());
            Param::from_mapped_value(values.id, value, mapper)
        }
    }
    if records.is_empty() {
        return Ok(model);
    }
    let values = records.into_iter().map(|it| (it.path, it.values)).collect();
    let mut loader = Loader { values, problem: None };
    let model = traverse::map(model, &mut loader);
    if let Some(problem) = loader.problem {
        return invalid(problem);
    }
    if !loader.values.is_empty() {
        let unknown: Vec<_> = loader.values.into_keys().collect();
        return invalid(format!(
            "the record has parameters that the model does not have: {unknown:?}"
        ));
    }
    Ok(model)
}

impl<B: Backend> LoraRecord<B> {
    /// Fails unless the record is one of a model with these adapters in which the same trains.
    pub(super) fn check(
        &self,
        adapters: &[(String, LoraAdapter<B>)],
        trains: &BTreeSet<String>,
    ) -> Result<(), LoraError> {
        let shape = |rank: usize, scale: f64| format!("rank {rank} and scale {scale}");
        let here: BTreeMap<_, _> =
            adapters.iter().map(|(path, it)| (path, shape(it.rank(), it.scale()))).collect();
        let recorded = self.adapters.iter().map(|PlacedAdapterRecord { path, adapter }| {
            let rank = adapter.a.dims()[1];
            (path, shape(rank, adapter.scaling.scale(adapter.alpha, rank)))
        });
        let recorded: BTreeMap<_, _> = recorded.collect();
        let none = "no adapter".to_owned();
        let paths: BTreeSet<_> = here.keys().chain(recorded.keys()).copied().collect();
        let differ = paths.into_iter().filter_map(|path| {
            let [here, there] = [&here, &recorded].map(|them| them.get(path).unwrap_or(&none));
            (here != there).then(|| format!("`{path}` has {here}, and {there} in the record"))
        });
        let differ: Vec<_> = differ.collect();
        if !differ.is_empty() {
            let differ = some_of(&differ);
            return invalid(format!(
                "the record is one of other adapters, so that it cannot be loaded: {differ}"
            ));
        }
        let recorded: BTreeSet<_> = self.trains.iter().cloned().collect();
        let differ = trains.symmetric_difference(&recorded).map(|path| format!("`{path}`"));
        let differ: Vec<_> = differ.collect();
        if !differ.is_empty() {
            let differ = some_of(&differ);
            return invalid(format!(
                "the model and the record disagree on whether these train: {differ}"
            ));
        }
        Ok(())
    }
}

pub(super) fn invalid<T>(problem: String) -> Result<T, LoraError> {
    Err(LoraError::InvalidRecord { problem })
}
