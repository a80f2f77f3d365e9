//! The weights of stock modules that can carry an adapter, and what is done to them. Their adapters are
//! *dense*: for a forward pass the weight is replaced by `W + s·A·B`.

use std::collections::HashMap;

use burn::{
    module::{Module, Param},
    tensor::{Tensor, backend::Backend},
};

use crate::{
    adapter::{LoraAdapter, WeightLayout},
    layer::{Capabilities, LoraLayer, LoraLayerMut, check_fit, is_finite, plus},
    tensors::frozen,
    traverse::{self, Map, Place, StockWeight, Visit, stock_weights},
};

/// A weight that can carry an adapter, and the adapter.
#[derive(Clone, Debug)]
pub(super) struct Slot<B: Backend> {
    pub place: StockWeight,
    pub adapter: Option<LoraAdapter<B>>,
}

/// A slot, without an adapter, for each weight in the module that can carry one.
pub(super) fn find<B: Backend, M: Module<B>>(module: &M) -> Vec<Slot<B>> {
    let weights = stock_weights::<B, M>(module).into_iter();
    weights.map(|place| Slot { place, adapter: None }).collect()
}

/// What an adapter adds to one parameter.
enum Update<'a, B: Backend> {
    Weight(&'a WeightLayout, &'a LoraAdapter<B>),
    Bias(&'a LoraAdapter<B>),
}

/// What the slots' adapters add, by the parameter's path.
fn updates<B: Backend>(slots: &[Slot<B>]) -> HashMap<&str, Update<'_, B>> {
    let adapted = slots.iter().filter_map(|slot| Some((slot, slot.adapter.as_ref()?)));
    let updates = adapted.flat_map(|(slot, adapter)| {
        let bias = slot.place.bias.as_deref().filter(|_| adapter.bias.is_some());
        let bias = bias.map(|path| (path, Update::Bias(adapter)));
        [(slot.place.weight.as_str(), Update::Weight(&slot.place.layout, adapter))]
            .into_iter()
            .chain(bias)
    });
    updates.collect()
}

/// The module with the adapters' updates added to its parameters, as part of the autodiff graph.
pub(super) fn compose<B: Backend, M: Module<B>>(module: M, slots: &[Slot<B>]) -> M {
    traverse::map(module, &mut Adder { updates: updates(slots), in_graph: true, finite: true })
}

/// Adds the updates to the parameters.
struct Adder<'a, B: Backend> {
    updates: HashMap<&'a str, Update<'a, B>>,
    /// Whether gradients are to reach the adapters; or else the sum is formed for good.
    in_graph: bool,
    /// Whether all sums that were formed for good are finite.
    finite: bool,
}

impl<B: Backend> Map<B> for Adder<'_, B> {
    fn param<const D: usize>(
        &mut self,
        place: &Place,
        param: Param<Tensor<B, D>>,
    ) -> Param<Tensor<B, D>> {
        let Some(update) = self.updates.get(place.path()) else { return param };
        let update: Tensor<B, D> = match update {
            Update::Weight(layout, adapter) => {
                let matrix = || layout.to_matrix(frozen(&param));
                let product = match self.in_graph {
                    true => adapter.product_on(matrix),
                    false => adapter.delta_on(matrix),
                };
                layout.to_weight(product, param.dims())
            }
            Update::Bias(adapter) => adapter.bias_delta().expect("it has one").reshape([-1; D]),
        };
        if self.in_graph {
            return param.map(|value| {
                let update = update.cast(value.dtype());
                value.detach().set_require_grad(false) + update
            });
        }
        let merged = plus(&param, update);
        self.finite &= is_finite(&merged);
        merged
    }
}

/// Reads one weight.
struct Reader<'a, B: Backend> {
    place: &'a StockWeight,
    device: Option<B::Device>,
    /// The weight seen as a matrix, if it is wanted.
    matrix: Option<Tensor<B, 2>>,
    wanted: bool,
}

impl<B: Backend> Visit<B> for Reader<'_, B> {
    fn param<const D: usize>(&mut self, place: &Place, param: &Param<Tensor<B, D>>) {
        if place.path() == self.place.weight {
            self.device = Some(param.lazy_device());
            self.matrix = self.wanted.then(|| self.place.layout.to_matrix(frozen(param)));
        }
    }
}

/// A slot together with the module that it is in, as a layer to be read.
pub(super) struct SlotRef<'a, B: Backend, M> {
    pub module: &'a M,
    pub slot: &'a Slot<B>,
}

impl<B: Backend, M: Module<B>> SlotRef<'_, B, M> {
    fn read(&self, wanted: bool) -> Reader<'_, B> {
        let mut reader = Reader { place: &self.slot.place, device: None, matrix: None, wanted };
        traverse::visit(self.module, &mut reader);
        reader
    }
}

impl<B: Backend, M: Module<B>> LoraLayer<B> for SlotRef<'_, B, M> {
    fn adapter(&self) -> Option<&LoraAdapter<B>> {
        self.slot.adapter.as_ref()
    }

    /// A dense adapter sees no input, so that it has no dropout, and is the same for all samples.
    fn capabilities(&self) -> Capabilities {
        let bias = self.slot.place.bias.is_some();
        Capabilities { bias, dropout: false, quantized: false, mixed: false }
    }

    fn weight_shape(&self) -> [usize; 2] {
        self.slot.place.layout.matrix_shape(&self.slot.place.dims)
    }

    fn weight_layout(&self) -> WeightLayout {
        self.slot.place.layout.clone()
    }

    fn weight_matrix(&self) -> Tensor<B, 2> {
        self.read(true).matrix.expect("the slots are the module's")
    }

    fn device(&self) -> B::Device {
        self.read(false).device.expect("the slots are the module's")
    }
}

/// A slot together with the module that it is in, as a layer to be changed.
pub(super) struct SlotMut<'a, B: Backend, M> {
    pub module: &'a mut M,
    pub slot: &'a mut Slot<B>,
}

impl<B: Backend, M> SlotMut<'_, B, M> {
    fn shared(&self) -> SlotRef<'_, B, M> {
        SlotRef { module: self.module, slot: self.slot }
    }
}

impl<B: Backend, M: Module<B>> LoraLayer<B> for SlotMut<'_, B, M> {
    fn adapter(&self) -> Option<&LoraAdapter<B>> {
        self.slot.adapter.as_ref()
    }

    fn capabilities(&self) -> Capabilities {
        self.shared().capabilities()
    }

    fn weight_shape(&self) -> [usize; 2] {
        self.shared().weight_shape()
    }

    fn weight_layout(&self) -> WeightLayout {
        self.shared().weight_layout()
    }

    fn weight_matrix(&self) -> Tensor<B, 2> {
        self.shared().weight_matrix()
    }

    fn device(&self) -> B::Device {
        self.shared().device()
    }
}

impl<B: Backend, M: Module<B>> LoraLayerMut<B> for SlotMut<'_, B, M> {
    fn set_adapter(&mut self, adapter: Option<LoraAdapter<B>>) {
        self.slot.adapter = adapter.map(|adapter| {
            check_fit(self, &adapter);
            LoraAdapter { layout: self.weight_layout(), ..adapter }
        });
    }

    fn merge_adapter(&mut self) -> bool {
        let updates = updates(std::slice::from_ref(&*self.slot));
        let mut adder = Adder { updates, in_graph: false, finite: true };
        let merged = traverse::map(self.module.clone(), &mut adder);
        let finite = adder.finite;
        if finite {
            *self.module = merged;
            self.slot.adapter = None;
        }
        finite
    }
}
