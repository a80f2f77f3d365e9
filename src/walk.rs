//! Walks over a model's parameters that know where they are.

use std::collections::BTreeMap;

use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param},
    tensor::{Bool, Int, Tensor, backend::Backend},
};

use crate::{
    adapter::frozen,
    adapters::Extra,
    layer::{ADAPTER, CONTAINER},
};

/// The place of a walk in the tree of modules.
#[derive(Default)]
pub(crate) struct Place {
    names: Vec<String>,
    /// The container of each name.
    containers: Vec<String>,
}

impl Place {
    pub fn enter(&mut self, name: &str, container: &str) {
        self.names.push(name.to_owned());
        self.containers.push(container.to_owned());
    }

    pub fn exit(&mut self) {
        self.names.pop();
        self.containers.pop();
    }

    pub fn path(&self) -> String {
        self.names.join(".")
    }

    /// The path of the module that the walk is at a parameter of.
    pub fn module(&self) -> String {
        self.names[..self.names.len().saturating_sub(1)].join(".")
    }

    /// The name of the parameter that the walk is at.
    pub fn name(&self) -> &str {
        self.names.last().map_or("", String::as_str)
    }

    /// The path of the LoRA layer whose adapter the walk is in, if it is in one.
    pub fn adapted_layer(&self) -> Option<String> {
        let slot = |at: &usize| self.names[*at] == ADAPTER && self.containers[*at] == CONTAINER;
        (0..self.names.len()).find(slot).map(|at| self.names[..at].join("."))
    }

    /// The container of the parameter that the walk is at.
    pub fn container(&self) -> &str {
        self.containers.last().map_or("", String::as_str)
    }

    /// Running statistics look like parameters to a walk, and no gradient may ever reach them.
    pub fn is_statistic(&self) -> bool {
        self.container() == "Struct:BatchNorm" && self.name().starts_with("running_")
    }
}

/// How PyTorch calls and keeps a parameter, by the container that Burn has it in.
struct TorchLayout {
    name: String,
    /// Whether a matrix is the transpose of Burn's.
    transposed: bool,
}

impl Place {
    fn torch_layout(&self) -> TorchLayout {
        let mut names = self.names.clone();
        let mut transposed = false;
        if let Some(name) = names.last_mut() {
            match (self.container(), name.as_str()) {
                ("Struct:Linear", "weight") => transposed = true,
                (container, "gamma") if container.ends_with("Norm") => *name = "weight".to_owned(),
                (container, "beta") if container.ends_with("Norm") => *name = "bias".to_owned(),
                _ => {}
            }
        }
        TorchLayout { name: names.join("."), transposed }
    }
}

/// A float parameter as [`visit`] meets it.
pub(crate) struct Visited {
    pub path: String,
    /// The name and the shape that it has in PyTorch.
    pub torch_name: String,
    pub torch_shape: Vec<usize>,
    pub num_elements: usize,
    pub requires_grad: bool,
    pub in_adapter: bool,
    pub is_statistic: bool,
}

/// Everything a walk through a model finds.
#[derive(Default)]
pub(crate) struct Findings {
    pub params: Vec<Visited>,
    /// The paths of the LoRA layers, with or without an adapter.
    pub lora_layers: Vec<String>,
}

#[derive(Default)]
struct Visitor {
    place: Place,
    findings: Findings,
}

impl<B: Backend> ModuleVisitor<B> for Visitor {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.place.enter(name, container);
        if name == ADAPTER && container == CONTAINER {
            self.findings.lora_layers.extend(self.place.adapted_layer());
        }
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.place.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let layout = self.place.torch_layout();
        // This draws the value of a parameter that was never used. The lazy shape would not do: that
        // of a column layout is the transpose until then.
        let mut shape = param.shape().to_vec();
        if layout.transposed {
            shape.swap(0, 1);
        }
        self.findings.params.push(Visited {
            path: self.place.path(),
            num_elements: shape.iter().product(),
            torch_name: layout.name,
            torch_shape: shape,
            requires_grad: param.is_require_grad(),
            in_adapter: self.place.adapted_layer().is_some(),
            is_statistic: self.place.is_statistic(),
        });
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<B, D, Int>>) {
        param.val();
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<B, D, Bool>>) {
        param.val();
    }
}

/// Visits every parameter. Those that were never used draw their values now, so that clones of the
/// model agree from here on.
pub(crate) fn visit<B: Backend, M: Module<B>>(model: &M) -> Findings {
    let mut visitor = Visitor::default();
    model.visit(&mut visitor);
    visitor.findings
}

struct Marker<F> {
    place: Place,
    /// Whether adapters train in any case.
    adapters: bool,
    trains: F,
}

impl<B: Backend, F: Fn(&str) -> bool> ModuleMapper<B> for Marker<F> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.place.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.place.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let in_adapter = self.adapters && self.place.adapted_layer().is_some();
        let trains = in_adapter || (self.trains)(&self.place.path());
        let trains = trains && !self.place.is_statistic();
        param.map(|tensor| tensor.detach().set_require_grad(trains))
    }
}

/// Marks the parameters whose paths `trains` accepts, and those of adapters, as trainable, and all
/// others as frozen.
pub(crate) fn mark_trainable<B: Backend, M: Module<B>>(
    model: M,
    trains: impl Fn(&str) -> bool,
) -> M {
    model.map(&mut Marker { place: Place::default(), adapters: true, trains })
}

/// Marks the parameters whose paths `trains` accepts as trainable, and all others as frozen, those of
/// adapters among them.
pub(crate) fn mark_exactly<B: Backend, M: Module<B>>(model: M, trains: impl Fn(&str) -> bool) -> M {
    model.map(&mut Marker { place: Place::default(), adapters: false, trains })
}

struct Reader<'a, B: Backend> {
    place: Place,
    rename: Rename,
    wanted: &'a dyn Fn(&str) -> bool,
    found: BTreeMap<String, Extra<B>>,
}

impl<B: Backend> ModuleVisitor<B> for Reader<'_, B> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.place.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.place.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if self.place.adapted_layer().is_some() || !(self.wanted)(&self.place.path()) {
            return;
        }
        let layout = self.place.torch_layout();
        let tensor = frozen(param);
        let mut shape = tensor.dims().to_vec();
        // A vector stays as it is: Burn's wgpu backend gets the reshape of a transposed one wrong.
        let moves = layout.transposed && !shape.contains(&1);
        if layout.transposed {
            shape.swap(0, 1);
        }
        let tensor = if moves { tensor.swap_dims(0, 1) } else { tensor };
        let values = tensor.reshape([shape.iter().product::<usize>()]);
        let name = (self.rename)(&layout.name);
        let before = self.found.insert(name.clone(), Extra { values, shape });
        assert!(before.is_none(), "`peft_name` must not give two parameters the name `{name}`");
    }
}

/// From PyTorch's names to those of files.
type Rename = fn(&str) -> String;

/// The parameters whose paths are `wanted`, by PyTorch's names, renamed, and in PyTorch's layout.
pub(crate) fn read_extras<B: Backend, M: Module<B>>(
    model: &M,
    wanted: &dyn Fn(&str) -> bool,
    rename: Rename,
) -> BTreeMap<String, Extra<B>> {
    let mut reader = Reader { place: Place::default(), rename, wanted, found: BTreeMap::new() };
    model.visit(&mut reader);
    reader.found
}

struct Writer<'a, B: Backend> {
    place: Place,
    rename: Rename,
    extras: &'a BTreeMap<String, Extra<B>>,
}

impl<B: Backend> ModuleMapper<B> for Writer<'_, B> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.place.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.place.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let layout = self.place.torch_layout();
        let adapted = self.place.adapted_layer().is_some();
        let extra = self.extras.get(&(self.rename)(&layout.name)).filter(|_| !adapted);
        let trains = (adapted || extra.is_some()) && !self.place.is_statistic();
        param.map(|tensor| {
            let Some(extra) = extra else { return tensor.detach().set_require_grad(trains) };
            let mut shape = tensor.dims();
            if layout.transposed {
                shape.swap(0, 1);
            }
            let device = tensor.device();
            let values = extra.values.clone().to_device(&device).cast(tensor.dtype());
            let values: Tensor<B, D> = values.reshape(shape);
            let values = if layout.transposed { values.swap_dims(0, 1) } else { values };
            values.detach().set_require_grad(trains)
        })
    }
}

/// Replaces parameters by `extras`, which then train, as adapters do; all others are frozen.
pub(crate) fn write_extras<B: Backend, M: Module<B>>(
    model: M,
    extras: &BTreeMap<String, Extra<B>>,
    rename: Rename,
) -> M {
    model.map(&mut Writer { place: Place::default(), rename, extras })
}

/// The running statistics of a module, by path.
pub(crate) type Statistics<B> = BTreeMap<String, Tensor<B, 1>>;

struct StatisticsReader<B: Backend> {
    place: Place,
    found: Statistics<B>,
}

impl<B: Backend> ModuleVisitor<B> for StatisticsReader<B> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.place.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.place.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if self.place.is_statistic() {
            // They are vectors, of which nobody told the compiler.
            let values = Tensor::from_primitive(param.val().into_primitive());
            self.found.insert(self.place.path(), values);
        }
    }
}

/// The running statistics as they are now.
pub(crate) fn statistics<B: Backend, M: Module<B>>(model: &M) -> Statistics<B> {
    let mut reader = StatisticsReader { place: Place::default(), found: BTreeMap::new() };
    model.visit(&mut reader);
    reader.found
}

/// Has running statistics take in what the last passes left for them.
pub(crate) fn sync_statistics<B: Backend, M: Module<B>>(module: &M) {
    // Burn does so, for all clones at once, when it makes a record.
    drop(module.clone().into_record());
}

struct StatisticsWriter<B: Backend> {
    place: Place,
    values: Statistics<B>,
}

impl<B: Backend> ModuleMapper<B> for StatisticsWriter<B> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.place.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.place.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let values = self.values.remove(&self.place.path());
        match values.filter(|_| self.place.is_statistic()) {
            Some(values) => param.map(|_| Tensor::from_primitive(values.into_primitive())),
            None => param,
        }
    }
}

/// Sets the running statistics, in the model and in all of its clones.
pub(crate) fn restore_statistics<B: Backend, M: Module<B>>(model: M, values: Statistics<B>) {
    drop(model.map(&mut StatisticsWriter { place: Place::default(), values }));
}
