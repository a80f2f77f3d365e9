//! Parameters that train in full, next to the adapters: read from a model as files have them, and put
//! back.

use std::collections::{BTreeMap, BTreeSet};

use burn::{
    module::{Module, Param},
    tensor::{Tensor, backend::Backend},
};

use crate::{
    adapters::Extra,
    tensors::frozen,
    traverse::{self, Map, Place, Visit},
};

/// The parameters at `paths`, by PyTorch's names and in PyTorch's layout.
pub(super) fn read<B: Backend, M: Module<B>>(
    model: &M,
    paths: &BTreeSet<String>,
) -> BTreeMap<String, Extra<B>> {
    struct Reader<'a, B: Backend>(&'a BTreeSet<String>, BTreeMap<String, Extra<B>>);
    impl<B: Backend> Visit<B> for Reader<'_, B> {
        fn param<const D: usize>(&mut self, place: &Place, param: &Param<Tensor<B, D>>) {
            if !self.0.contains(place.path()) {
                return;
            }
            let in_torch = place.in_torch(D);
            let tensor = frozen(param);
            let mut shape = tensor.dims().to_vec();
            // A vector stays as it is: Burn's wgpu backend gets the reshape of a transposed one wrong.
            let moves = in_torch.transposed && !shape.contains(&1);
            if in_torch.transposed {
                shape.swap(0, 1);
            }
            let tensor = if moves { tensor.swap_dims(0, 1) } else { tensor };
            let values = tensor.reshape([shape.iter().product::<usize>()]);
            self.1.insert(in_torch.name, Extra { values, shape, may_be_conv1d: false });
        }
    }
    let mut reader = Reader(paths, BTreeMap::new());
    if !paths.is_empty() {
        traverse::visit(model, &mut reader);
    }
    reader.1
}

/// The model with these values for the parameters of these names in PyTorch.
pub(super) fn write<B: Backend, M: Module<B>>(model: M, extras: &BTreeMap<String, Extra<B>>) -> M {
    struct Writer<'a, B: Backend>(&'a BTreeMap<String, Extra<B>>);
    impl<B: Backend> Map<B> for Writer<'_, B> {
        fn param<const D: usize>(
            &mut self,
            place: &Place,
            param: Param<Tensor<B, D>>,
        ) -> Param<Tensor<B, D>> {
            let in_torch = place.in_torch(D);
            let extra = self.0.get(&in_torch.name);
            let Some(extra) = extra.filter(|_| place.adapted_layer().is_none()) else {
                return param;
            };
            param.map(|tensor| {
                let mut shape = tensor.dims();
                if in_torch.transposed {
                    shape.swap(0, 1);
                }
                let device = tensor.device();
                let values = extra.values.clone().to_device(&device).cast(tensor.dtype());
                let values: Tensor<B, D> = values.reshape(shape);
                let values = if in_torch.transposed { values.swap_dims(0, 1) } else { values };
                values.detach().set_require_grad(false)
            })
        }
    }
    if extras.is_empty() { model } else { traverse::map(model, &mut Writer(extras)) }
}
