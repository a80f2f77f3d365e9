//! What trains, to and from records.

use std::collections::{BTreeMap, BTreeSet};

use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param},
    record::Record,
    tensor::{Tensor, backend::Backend},
};

use crate::walk::Place;

/// A parameter that trains, in the record of a [`Lora`](crate::Lora) or a [`Tuned`](crate::Tuned).
#[derive(Debug, Clone, Record)]
pub struct TrainedRecord<B: Backend> {
    /// The path of the parameter.
    pub path: String,
    /// The elements, row by row. The id is the parameter's: by it optimizers find their state.
    pub values: Param<Tensor<B, 1>>,
}

/// The parameters at `paths`.
pub(crate) fn save<B: Backend, M: Module<B>>(
    module: &M,
    paths: &BTreeSet<String>,
) -> Vec<TrainedRecord<B>> {
    let mut saver = Saver { paths, place: Place::default(), found: vec![] };
    module.visit(&mut saver);
    saver.found
}

/// The module with the recorded values and ids, frozen or not as it was.
///
/// # Panics
///
/// If the module lacks one of the parameters, or has it in another size.
pub(crate) fn load<B: Backend, M: Module<B>>(module: M, records: Vec<TrainedRecord<B>>) -> M {
    let records = records.into_iter().map(|it| (it.path, it.values)).collect();
    let mut loader = Loader { place: Place::default(), records };
    let module = module.map(&mut loader);
    assert!(
        loader.records.is_empty(),
        "the record has parameters that the module does not have: {:?}",
        loader.records.into_keys(),
    );
    module
}

struct Saver<'a, B: Backend> {
    paths: &'a BTreeSet<String>,
    place: Place,
    found: Vec<TrainedRecord<B>>,
}

impl<B: Backend> ModuleVisitor<B> for Saver<'_, B> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.place.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.place.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let path = self.place.path();
        if self.paths.contains(&path) {
            let size = param.shape().num_elements();
            let values = Param::initialized(param.id, param.val().reshape([size]));
            self.found.push(TrainedRecord { path, values });
        }
    }
}

struct Loader<B: Backend> {
    place: Place,
    /// Those that still have to find their place.
    records: BTreeMap<String, Param<Tensor<B, 1>>>,
}

impl<B: Backend> ModuleMapper<B> for Loader<B> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.place.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.place.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let path = self.place.path();
        let Some(values) = self.records.remove(&path) else { return param };
        let (_, current, mapper) = param.consume();
        let (expected, found) = (current.shape().num_elements(), values.shape().num_elements());
        assert!(
            expected == found,
            "the record has {found} elements for `{path}`, and the module {expected}"
        );
        let value = values.val().to_device(&current.device()).reshape(current.dims());
        let value = value.detach().set_require_grad(current.is_require_grad());
        Param::from_mapped_value(values.id, value, mapper)
    }
}
