//! Weights of stock modules that can carry an adapter, and what is done to them. Their adapters are
//! *dense*: for a forward pass the weight is replaced by `W + s·A·B`.

use std::{
    collections::{BTreeSet, HashMap},
    ops::Deref,
};

use burn::{
    module::{Module, Param},
    tensor::{Tensor, backend::Backend},
};

use super::walk::{self, Map, Place, Visit};
use crate::{
    adapter::{LoraAdapter, WeightLayout},
    layer::{LoraLayer, check_fit, is_finite, plus},
    tensors::frozen,
};

/// A weight that can carry an adapter.
#[derive(Clone, Debug)]
pub(super) struct Slot<B: Backend> {
    /// The path of the layer, or of the weight itself in a module that is not Burn's.
    pub path: String,
    /// The path of the weight.
    weight: String,
    /// The path of the bias that goes with it, if there is one that an adapter's can be added to.
    bias: Option<String>,
    layout: WeightLayout,
    /// The shape of the weight.
    dims: Vec<usize>,
    pub adapter: Option<LoraAdapter<B>>,
}

impl<B: Backend> Slot<B> {
    /// The same place, on another backend perhaps, with another adapter.
    pub fn with<Other: Backend>(&self, adapter: Option<LoraAdapter<Other>>) -> Slot<Other> {
        Slot {
            path: self.path.clone(),
            weight: self.weight.clone(),
            bias: self.bias.clone(),
            layout: self.layout.clone(),
            dims: self.dims.clone(),
            adapter,
        }
    }
}

/// The weights in a module that can carry adapters, without those of its LoRA layers.
pub(super) fn find<B: Backend, M: Module<B>>(module: &M) -> Vec<Slot<B>> {
    let taken = walk::layer_paths::<B, M>(module).into_iter().collect();
    let mut finder = Finder { taken, slots: Vec::new(), vectors: Vec::new() };
    walk::visit(module, &mut finder);
    let Finder { mut slots, vectors, .. } = finder;
    for slot in &mut slots {
        let [_, d_output] = slot.layout.matrix_shape(&slot.dims);
        let own =
            if slot.path.is_empty() { "bias".to_owned() } else { format!("{}.bias", slot.path) };
        let bias = vectors.iter().find(|(path, size)| *path == own && *size == d_output);
        slot.bias = bias.map(|(path, _)| path.clone());
    }
    slots
}

struct Finder<B: Backend> {
    /// The paths of the LoRA layers.
    taken: BTreeSet<String>,
    slots: Vec<Slot<B>>,
    /// Paths and sizes.
    vectors: Vec<(String, usize)>,
}

impl<B: Backend> Visit<B> for Finder<B> {
    fn param<const D: usize>(&mut self, place: &Place, param: &Param<Tensor<B, D>>) {
        if place.adapted_layer().is_some() {
            return;
        }
        let (weight, dims) = (place.path().to_owned(), param.shape().to_vec());
        if D < 2 {
            self.vectors.push((weight, dims.iter().product()));
            return;
        }
        let layout = match place.container() {
            "Struct:Embedding" => WeightLayout::Embedding,
            "Struct:Conv1d" | "Struct:Conv2d" | "Struct:Conv3d" | "Struct:DeformConv2d" => {
                WeightLayout::Conv { kernel: dims[2..].to_vec(), groups: 1 }
            }
            "Struct:ConvTranspose1d" | "Struct:ConvTranspose2d" | "Struct:ConvTranspose3d" => {
                WeightLayout::ConvTranspose { kernel: dims[2..].to_vec() }
            }
            _ => WeightLayout::Matrix,
        };
        // Adapters go by the layer's name, and so most layers, and all of Burn's, call its weight.
        let path = if place.name() == "weight" { place.module() } else { place.path() };
        if !self.taken.contains(path) {
            let path = path.to_owned();
            self.slots.push(Slot { path, weight, bias: None, layout, dims, adapter: None });
        }
    }
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
        let bias = slot.bias.as_deref().filter(|_| adapter.bias.is_some());
        let bias = bias.map(|path| (path, Update::Bias(adapter)));
        [(slot.weight.as_str(), Update::Weight(&slot.layout, adapter))].into_iter().chain(bias)
    });
    updates.collect()
}

/// The module with the adapters' updates added to its parameters, as part of the autodiff graph.
pub(super) fn compose<B: Backend, M: Module<B>>(module: M, slots: &[Slot<B>]) -> M {
    walk::map(module, &mut Adder { updates: updates(slots), in_graph: true, finite: true })
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
    slot: &'a Slot<B>,
    device: Option<B::Device>,
    /// The weight seen as a matrix, if it is wanted.
    matrix: Option<Tensor<B, 2>>,
    wanted: bool,
}

impl<B: Backend> Visit<B> for Reader<'_, B> {
    fn param<const D: usize>(&mut self, place: &Place, param: &Param<Tensor<B, D>>) {
        if place.path() == self.slot.weight {
            self.device = Some(param.lazy_device());
            self.matrix = self.wanted.then(|| self.slot.layout.to_matrix(frozen(param)));
        }
    }
}

/// What a walk visits, or what it maps.
pub(super) enum Held<'a, T> {
    Shared(&'a T),
    Exclusive(&'a mut T),
}

impl<T> Deref for Held<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        match self {
            Self::Shared(held) => held,
            Self::Exclusive(held) => held,
        }
    }
}

impl<T> Held<'_, T> {
    fn change(&mut self) -> &mut T {
        match self {
            Self::Shared(_) => unreachable!("walks that visit do not change layers"),
            Self::Exclusive(held) => held,
        }
    }
}

/// A slot together with the module that it is in, as a layer.
pub(super) struct SlotLayer<'a, B: Backend, M: Module<B>> {
    pub module: Held<'a, M>,
    pub slot: Held<'a, Slot<B>>,
}

impl<B: Backend, M: Module<B>> SlotLayer<'_, B, M> {
    fn read(&self, wanted: bool) -> Reader<'_, B> {
        let mut reader = Reader { slot: &self.slot, device: None, matrix: None, wanted };
        walk::visit(&*self.module, &mut reader);
        reader
    }
}

impl<B: Backend, M: Module<B>> LoraLayer<B> for SlotLayer<'_, B, M> {
    fn adapter(&self) -> Option<&LoraAdapter<B>> {
        self.slot.adapter.as_ref()
    }

    fn set_adapter(&mut self, adapter: Option<LoraAdapter<B>>) {
        let adapter = adapter.map(|adapter| {
            check_fit(self, &adapter);
            LoraAdapter { layout: self.slot.layout.clone(), ..adapter }
        });
        self.slot.change().adapter = adapter;
    }

    fn weight_shape(&self) -> [usize; 2] {
        self.slot.layout.matrix_shape(&self.slot.dims)
    }

    fn weight_layout(&self) -> WeightLayout {
        self.slot.layout.clone()
    }

    fn weight_matrix(&self) -> Tensor<B, 2> {
        self.read(true).matrix.expect("the slots are the module's")
    }

    fn takes_bias(&self) -> bool {
        self.slot.bias.is_some()
    }

    fn takes_dropout(&self) -> bool {
        false
    }

    fn device(&self) -> B::Device {
        self.read(false).device.expect("the slots are the module's")
    }

    fn merge_adapter(&mut self) -> bool {
        let updates = updates(std::slice::from_ref(&*self.slot));
        let mut adder = Adder { updates, in_graph: false, finite: true };
        let merged = walk::map((*self.module).clone(), &mut adder);
        let finite = adder.finite;
        if finite {
            *self.module.change() = merged;
            self.slot.change().adapter = None;
        }
        finite
    }
}
