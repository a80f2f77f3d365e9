//! The places in a module where an adapter can be, and what is done to the weights there.

use std::{cell::RefCell, collections::HashMap, rc::Rc};

use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param},
    tensor::{Tensor, backend::Backend},
};

use crate::{
    LoraAdapter, LoraLayer, WeightLayout,
    adapter::frozen,
    layer::{check_fit, is_finite, plus},
    walk::Place,
};

/// A weight that can carry an adapter.
#[derive(Clone, Debug)]
pub(super) struct Slot<B: Backend> {
    /// The path of the layer, or of the weight itself in a module that is not Burn's.
    pub path: String,
    /// The path of the weight.
    pub weight: String,
    /// The path of the bias that goes with it, if there is one that an adapter's can be added to.
    pub bias: Option<String>,
    pub layout: WeightLayout,
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

/// The weights in a module that can carry adapters.
pub(super) fn find<B: Backend, M: Module<B>>(module: &M) -> Vec<Slot<B>> {
    let mut finder = Finder { place: Place::default(), slots: Vec::new(), biases: Vec::new() };
    module.visit(&mut finder);
    let Finder { mut slots, biases, .. } = finder;
    for slot in &mut slots {
        let [_, d_output] = slot.layout.matrix_shape(&slot.dims);
        let own =
            if slot.path.is_empty() { "bias".to_owned() } else { format!("{}.bias", slot.path) };
        let bias = biases.iter().find(|(path, size)| *path == own && *size == d_output);
        slot.bias = bias.map(|(path, _)| path.clone());
    }
    slots
}

struct Finder<B: Backend> {
    place: Place,
    slots: Vec<Slot<B>>,
    /// Paths and sizes of vectors.
    biases: Vec<(String, usize)>,
}

impl<B: Backend> ModuleVisitor<B> for Finder<B> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.place.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.place.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let dims = param.shape().to_vec();
        let weight = self.place.path();
        if D < 2 || self.place.is_statistic() {
            self.biases.push((weight, dims.iter().product()));
            return;
        }
        let layout = match self.place.container() {
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
        let path = match weight.as_str() {
            "weight" => "",
            other => other.strip_suffix(".weight").unwrap_or(other),
        };
        let path = path.to_owned();
        self.slots.push(Slot { path, weight, bias: None, layout, dims, adapter: None });
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

/// Adds the updates to the parameters, as part of the autodiff graph.
pub(super) struct Composer<'a, B: Backend> {
    place: Place,
    updates: HashMap<&'a str, Update<'a, B>>,
}

impl<'a, B: Backend> Composer<'a, B> {
    pub fn new(slots: &'a [Slot<B>]) -> Self {
        Self { place: Place::default(), updates: updates(slots) }
    }
}

impl<B: Backend> ModuleMapper<B> for Composer<'_, B> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.place.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.place.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let Some(update) = self.updates.get(self.place.path().as_str()) else { return param };
        param.map(|value| {
            let update: Tensor<B, D> = match update {
                Update::Weight(layout, adapter) => {
                    layout.to_weight(adapter.product(), value.dims())
                }
                Update::Bias(adapter) => adapter.bias_delta().expect("it has one").reshape([-1; D]),
            };
            let update = update.cast(value.dtype());
            value.detach().set_require_grad(false) + update
        })
    }
}

/// Adds the updates to the parameters for good.
struct Merger<'a, B: Backend> {
    place: Place,
    updates: HashMap<&'a str, Update<'a, B>>,
    finite: bool,
}

impl<B: Backend> ModuleMapper<B> for Merger<'_, B> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.place.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.place.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let Some(update) = self.updates.get(self.place.path().as_str()) else { return param };
        let update: Tensor<B, D> = match update {
            Update::Weight(layout, adapter) => layout.to_weight(adapter.delta(), param.dims()),
            Update::Bias(adapter) => adapter.bias_delta().expect("it has one").reshape([-1; D]),
        };
        let merged = plus(&param, update);
        self.finite &= is_finite(&merged);
        merged
    }
}

/// Reads one weight.
struct Reader<'a, B: Backend> {
    place: Place,
    slot: &'a Slot<B>,
    device: Option<B::Device>,
    /// The weight seen as a matrix, if it is wanted.
    matrix: Option<Tensor<B, 2>>,
    wanted: bool,
}

impl<B: Backend> ModuleVisitor<B> for Reader<'_, B> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.place.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.place.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if self.place.path() == self.slot.weight {
            self.device = Some(param.lazy_device());
            self.matrix = self.wanted.then(|| self.slot.layout.to_matrix(frozen(param)));
        }
    }
}

/// A slot together with the module that it is in, as a layer.
pub(super) struct Handle<'a, B: Backend, M> {
    /// Shared by the handles of all slots.
    pub base: Rc<RefCell<&'a mut M>>,
    pub slot: &'a mut Slot<B>,
}

impl<B: Backend, M: Module<B>> Handle<'_, B, M> {
    fn read(&self, wanted: bool) -> Reader<'_, B> {
        let place = Place::default();
        let mut reader = Reader { place, slot: self.slot, device: None, matrix: None, wanted };
        self.base.borrow().visit(&mut reader);
        reader
    }
}

impl<B: Backend, M: Module<B>> LoraLayer<B> for Handle<'_, B, M> {
    fn adapter(&self) -> Option<&LoraAdapter<B>> {
        self.slot.adapter.as_ref()
    }

    fn set_adapter(&mut self, adapter: Option<LoraAdapter<B>>) {
        self.slot.adapter = adapter.map(|adapter| {
            check_fit(self, &adapter);
            LoraAdapter { layout: self.slot.layout.clone(), ..adapter }
        });
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
        let mut merger = Merger { place: Place::default(), updates, finite: true };
        let merged = (**self.base.borrow()).clone().map(&mut merger);
        let finite = merger.finite;
        if finite {
            **self.base.borrow_mut() = merged;
            self.slot.adapter = None;
        }
        finite
    }
}
