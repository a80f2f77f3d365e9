//! Walks over a model's parameters that know where they are.

use burn::{
    module::{ModuleMapper, ModuleVisitor, Param},
    tensor::{Bool, Int, Tensor, backend::Backend},
};

use crate::layer::{ADAPTER, CONTAINER};

/// The place of a walk in the tree of modules.
#[derive(Default)]
struct Place {
    names: Vec<String>,
    /// The container of each name.
    containers: Vec<String>,
}

impl Place {
    fn enter(&mut self, name: &str, container: &str) {
        self.names.push(name.to_owned());
        self.containers.push(container.to_owned());
    }

    fn exit(&mut self) {
        self.names.pop();
        self.containers.pop();
    }

    fn path(&self) -> String {
        self.names.join(".")
    }

    /// The path of the LoRA layer whose adapter the walk is in, if it is in one.
    fn adapted_layer(&self) -> Option<String> {
        let slot = |at: &usize| self.names[*at] == ADAPTER && self.containers[*at] == CONTAINER;
        (0..self.names.len()).find(slot).map(|at| self.names[..at].join("."))
    }

    /// Running statistics look like parameters to a walk, and no gradient may ever reach them.
    fn is_statistic(&self) -> bool {
        let in_batch_norm = self.containers.last().is_some_and(|it| it == "Struct:BatchNorm");
        in_batch_norm && self.names.last().is_some_and(|name| name.starts_with("running_"))
    }
}

/// A float parameter as [`visit`] meets it.
pub(crate) struct Visited {
    pub path: String,
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
        self.findings.params.push(Visited {
            path: self.place.path(),
            num_elements: param.lazy_shape().num_elements(),
            // This draws the value of a parameter that was never used.
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
pub(crate) fn visit<B: Backend, M: burn::module::Module<B>>(model: &M) -> Findings {
    let mut visitor = Visitor::default();
    model.visit(&mut visitor);
    visitor.findings
}

struct Marker<F> {
    place: Place,
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
        let trains = self.place.adapted_layer().is_some() || (self.trains)(&self.place.path());
        let trains = trains && !self.place.is_statistic();
        param.map(|tensor| tensor.detach().set_require_grad(trains))
    }
}

/// Marks the parameters whose paths `trains` accepts, and those of adapters, as trainable, and all
/// others as frozen.
pub(crate) fn mark_trainable<B: Backend, M: burn::module::Module<B>>(
    model: M,
    trains: impl Fn(&str) -> bool,
) -> M {
    model.map(&mut Marker { place: Place::default(), trains })
}
