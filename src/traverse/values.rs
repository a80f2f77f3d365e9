//! The values of parameters, to be kept and put back.

use std::collections::{BTreeMap, BTreeSet};

use burn::{
    module::{Module, Param},
    tensor::{Tensor, TensorPrimitive, backend::Backend},
};

use super::walk::{self, Map, Place, Visit};
use crate::tensors::frozen;

/// The values of parameters of any rank, by path.
pub(crate) type Values<B> = BTreeMap<String, TensorPrimitive<B>>;

/// The values of the parameters at `paths`, shared with the model.
pub(crate) fn values<B: Backend, M: Module<B>>(model: &M, paths: &BTreeSet<String>) -> Values<B> {
    struct Reader<'a, B: Backend>(&'a BTreeSet<String>, Values<B>);
    impl<B: Backend> Visit<B> for Reader<'_, B> {
        fn param<const D: usize>(&mut self, place: &Place, param: &Param<Tensor<B, D>>) {
            let path = place.path();
            if self.0.contains(path) {
                self.1.insert(path.to_owned(), frozen(param).into_primitive());
            }
        }
    }
    let mut reader = Reader(paths, Values::new());
    if !paths.is_empty() {
        walk::visit(model, &mut reader);
    }
    reader.1
}

/// The model with these values, frozen.
pub(crate) fn restore<B: Backend, M: Module<B>>(model: M, values: &Values<B>) -> M {
    struct Restorer<'a, B: Backend>(&'a Values<B>);
    impl<B: Backend> Map<B> for Restorer<'_, B> {
        fn param<const D: usize>(
            &mut self,
            place: &Place,
            param: Param<Tensor<B, D>>,
        ) -> Param<Tensor<B, D>> {
            match self.0.get(place.path()) {
                Some(value) => param.map(|_| Tensor::from_primitive(value.clone())),
                None => param,
            }
        }
    }
    if values.is_empty() { model } else { walk::map(model, &mut Restorer(values)) }
}
