//! A running statistic that no two models share.

use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::{
    module::{
        AutodiffModule, Content, Devices, HasAutodiffModule, Module, ModuleDisplay,
        ModuleDisplayDefault, ModuleMapper, ModuleVisitor, Param, ParamId,
    },
    tensor::{
        Tensor,
        backend::{AutodiffBackend, Backend},
    },
};

use super::access::{self, OWN};

/// A running mean or variance, `[channels]`. In files and to walks through a model it looks like Burn's
/// `RunningState`. But that is one cell for all clones of a model, and here each clone has its own.
#[derive(Debug)]
pub struct Statistic<B: Backend> {
    id: ParamId,
    state: Mutex<State<B>>,
}

#[derive(Debug)]
struct State<B: Backend> {
    value: Tensor<B, 1>,
    /// Whether a pass moved it.
    moved: bool,
}

impl<B: Backend> Statistic<B> {
    pub(super) fn new(id: ParamId, value: Tensor<B, 1>) -> Self {
        Self { id, state: Mutex::new(State { value, moved: false }) }
    }

    fn state(&self) -> MutexGuard<'_, State<B>> {
        // The value is replaced as a whole, so that a panic elsewhere cannot have left a half of it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The value, as a constant: `[channels]`.
    pub fn value(&self) -> Tensor<B, 1> {
        self.state().value.clone()
    }

    /// The value, if a pass moved it since this model was made.
    pub(crate) fn moved(&self) -> Option<Tensor<B, 1>> {
        let state = self.state();
        state.moved.then(|| state.value.clone())
    }

    /// Replaces the value by what a pass made of it.
    pub(crate) fn move_to(&self, value: Tensor<B, 1>) {
        *self.state() = State { value, moved: true };
    }

    /// Replaces the value by another of this model. No pass has moved that one.
    pub(super) fn set(&self, value: Tensor<B, 1>) {
        *self.state() = State { value, moved: false };
    }

    fn param(&self) -> Param<Tensor<B, 1>> {
        Param::initialized(self.id, self.value())
    }
}

impl<B: Backend> From<Param<Tensor<B, 1>>> for Statistic<B> {
    fn from(param: Param<Tensor<B, 1>>) -> Self {
        let (id, value, _) = param.consume();
        // A mapper may have marked it. No gradient may ever reach it.
        Self::new(id, value.detach().set_require_grad(false))
    }
}

impl<B: Backend> Clone for Statistic<B> {
    fn clone(&self) -> Self {
        Self::new(self.id, self.value())
    }
}

impl<B: Backend> Module<B> for Statistic<B> {
    type Record = Param<Tensor<B, 1>>;

    fn collect_devices(&self, mut devices: Devices<B>) -> Devices<B> {
        let device = self.value().device();
        if !devices.contains(&device) {
            devices.push(device);
        }
        devices
    }

    fn fork(self, device: &B::Device) -> Self {
        Self::new(self.id, self.value().to_device(device))
    }

    fn to_device(self, device: &B::Device) -> Self {
        self.fork(device)
    }

    fn visit<V: ModuleVisitor<B>>(&self, visitor: &mut V) {
        visitor.enter_module("", OWN);
        access::provide_statistic(self);
        visitor.exit_module("", OWN);
        visitor.visit_float(&self.param());
    }

    fn map<M: ModuleMapper<B>>(self, mapper: &mut M) -> Self {
        mapper.enter_module("", OWN);
        mapper.exit_module("", OWN);
        mapper.map_float(self.param()).into()
    }

    fn into_record(self) -> Self::Record {
        self.param()
    }

    fn load_record(self, record: Self::Record) -> Self {
        let device = self.value().device();
        Self::new(record.id, record.val().to_device(&device))
    }
}

impl<B: AutodiffBackend> AutodiffModule<B> for Statistic<B> {
    type InnerModule = Statistic<B::InnerBackend>;

    fn valid(&self) -> Self::InnerModule {
        Statistic::new(self.id, self.value().inner())
    }

    fn from_inner(module: Self::InnerModule) -> Self {
        Self::new(module.id, Tensor::from_inner(module.value()))
    }
}

impl<B: AutodiffBackend> HasAutodiffModule<B> for Statistic<B::InnerBackend> {
    type TrainModule = Statistic<B>;
}

impl<B: Backend> ModuleDisplayDefault for Statistic<B> {
    fn content(&self, content: Content) -> Option<Content> {
        content.add_formatted(&"Statistic".to_owned()).optional()
    }
}

impl<B: Backend> ModuleDisplay for Statistic<B> {}
