//! What trains in a model, and what is frozen.

use burn::{
    module::{ModuleMapper, Param},
    tensor::{Tensor, backend::Backend},
};

use super::walk::{Map, Place, Walk};
use crate::layer::is_quantised;

/// A mapper of models that has exactly the parameters train that `trains` accepts, and freezes all
/// others. Running statistics never train.
///
/// On a backend without autodiff no parameter can be marked, and a model stays as it was.
pub(super) fn marker<B: Backend>(trains: impl FnMut(&Place) -> bool) -> impl ModuleMapper<B> {
    Walk::new(Marker { trains })
}

struct Marker<F> {
    trains: F,
}

impl<B: Backend, F: FnMut(&Place) -> bool> Map<B> for Marker<F> {
    fn param<const D: usize>(
        &mut self,
        place: &Place,
        param: Param<Tensor<B, D>>,
    ) -> Param<Tensor<B, D>> {
        let trains = !place.is_statistic() && (self.trains)(place);
        // A quantised parameter cannot train, and `detach` would make it one of floats.
        if !B::ad_enabled(&param.lazy_device()) || is_quantised(param.dtype()) {
            return param;
        }
        // A leaf again, whatever trip the tensor has been on.
        param.map(|tensor| tensor.detach().set_require_grad(trains))
    }
}
