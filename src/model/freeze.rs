//! What trains in a model, and what is frozen.

use std::collections::HashSet;

use burn::{
    module::{ModuleMapper, Param, ParamId},
    tensor::{Tensor, backend::Backend},
};

use crate::{
    layer::is_quantized,
    traverse::{Map, Place, Walk},
};

/// A mapper of models that has exactly the parameters train that `trains` accepts, and freezes all
/// others. Running statistics, and factors that were frozen, never train. What trains gets an id of its own
/// where two parameters have the same.
///
/// On a backend without autodiff no parameter can be marked, and a model stays as it was.
pub(super) fn marker<B: Backend>(trains: impl FnMut(&Place) -> bool) -> impl ModuleMapper<B> {
    Walk::new(Marker { trains, seen: HashSet::new() })
}

struct Marker<F> {
    trains: F,
    /// The ids of what trains.
    seen: HashSet<ParamId>,
}

impl<B: Backend, F: FnMut(&Place) -> bool> Map<B> for Marker<F> {
    fn param<const D: usize>(
        &mut self,
        place: &Place,
        param: Param<Tensor<B, D>>,
    ) -> Param<Tensor<B, D>> {
        let can_train = !place.is_statistic() && !place.is_frozen_factor();
        let trains = can_train && (self.trains)(place);
        // A quantized parameter cannot train, and `detach` would make it one of floats.
        if !B::ad_enabled(&param.lazy_device()) || is_quantized(param.dtype()) {
            return param;
        }
        let (mut id, tensor, mapper) = param.consume();
        if trains && !self.seen.insert(id) {
            // A clone of another one that trains. Optimizers would keep one state for both.
            id = ParamId::new();
        }
        // A leaf again, whatever trip the tensor has been on.
        Param::from_mapped_value(id, tensor.detach().set_require_grad(trains), mapper)
    }
}
