//! A model's layers set to a precision.

use burn::{module::Module, tensor::backend::Backend};

use crate::{layer::LoraLayerMut, precision::Precision, traverse};

pub(super) fn set<B: Backend, M: Module<B>>(model: M, precision: Precision) -> M {
    let set = move |_: &str, layer: &mut dyn LoraLayerMut<B>| layer.set_precision(precision);
    model.map(&mut traverse::changer(set))
}
