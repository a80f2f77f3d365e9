//! What trains in a model, and what is frozen.

use burn::{
    module::{Module, Param},
    tensor::{Tensor, backend::Backend},
};

use super::walk::{self, Map, Place};

/// The model in which exactly the parameters train whose paths `trains` accepts, and all others are
/// frozen. Running statistics never train.
///
/// On a backend without autodiff no parameter can be marked, and the model is as it was.
pub(super) fn train_only<B: Backend, M: Module<B>>(model: M, trains: impl Fn(&str) -> bool) -> M {
    walk::map(model, &mut Marker { trains })
}

struct Marker<F> {
    trains: F,
}

impl<B: Backend, F: Fn(&str) -> bool> Map<B> for Marker<F> {
    fn param<const D: usize>(
        &mut self,
        place: &Place,
        param: Param<Tensor<B, D>>,
    ) -> Param<Tensor<B, D>> {
        let trains = !place.is_statistic() && (self.trains)(&place.path());
        // A leaf again, whatever trip the tensor has been on.
        param.map(|tensor| tensor.detach().set_require_grad(trains))
    }
}
