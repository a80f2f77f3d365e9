//! What Burn asks of a module, written by hand so that the layer has the parameter paths of
//! [`Linear`] and its base stays frozen on every trip.

use std::fmt;

use burn::{
    module::{
        AutodiffModule, Content, Devices, DisplaySettings, HasAutodiffModule, Module,
        ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor, Param,
    },
    nn::{Linear, LinearRecord},
    record::Record,
    tensor::{
        Tensor,
        backend::{AutodiffBackend, Backend},
    },
};

use super::LoraLinear;
use crate::{
    LoraAdapter, LoraLayer,
    adapter::LoraAdapterRecord,
    layer::{ADAPTER, CONTAINER},
};

/// What a record keeps of a [`LoraLinear`]: the fields of a [`LinearRecord`], and the adapter.
#[derive(Debug, Clone, Record)]
pub struct LoraLinearRecord<B: Backend> {
    /// The base's weight: `[d_input, d_output]`.
    pub weight: Param<Tensor<B, 2>>,
    /// The base's bias, if it has one: `[d_output]`.
    pub bias: Option<Param<Tensor<B, 1>>>,
    /// The adapter, if there is one.
    pub adapter: Option<LoraAdapterRecord<B>>,
}

impl<B: Backend> LoraLinear<B> {
    /// Puts the parts back together, and freezes the base if there is an adapter.
    fn assemble(base: Linear<B>, adapter: Option<LoraAdapter<B>>) -> Self {
        let mut layer = Self::from(base);
        layer.set_adapter(adapter);
        layer
    }
}

impl<B: Backend> Module<B> for LoraLinear<B> {
    type Record = LoraLinearRecord<B>;

    fn collect_devices(&self, devices: Devices<B>) -> Devices<B> {
        let devices = self.base.collect_devices(devices);
        self.adapter.collect_devices(devices)
    }

    fn fork(self, device: &B::Device) -> Self {
        Self::assemble(self.base.fork(device), self.adapter.fork(device))
    }

    fn to_device(self, device: &B::Device) -> Self {
        Self::assemble(self.base.to_device(device), self.adapter.to_device(device))
    }

    fn visit<V: ModuleVisitor<B>>(&self, visitor: &mut V) {
        self.base.visit(visitor);
        visitor.enter_module(ADAPTER, CONTAINER);
        self.adapter.visit(visitor);
        visitor.exit_module(ADAPTER, CONTAINER);
    }

    fn map<M: ModuleMapper<B>>(self, mapper: &mut M) -> Self {
        let base = self.base.map(mapper);
        mapper.enter_module(ADAPTER, CONTAINER);
        let adapter = Module::map(self.adapter, mapper);
        mapper.exit_module(ADAPTER, CONTAINER);
        Self::assemble(base, adapter)
    }

    fn load_record(self, record: Self::Record) -> Self {
        let device = self.device();
        let base = LinearRecord { weight: record.weight, bias: record.bias };
        let recorded = record.adapter.map(|adapter| LoraAdapter::from_record(adapter, &device));
        Self::assemble(self.base.load_record(base), recorded.or(self.adapter))
    }

    fn into_record(self) -> Self::Record {
        let LinearRecord { weight, bias } = self.base.into_record();
        LoraLinearRecord { weight, bias, adapter: self.adapter.into_record() }
    }
}

impl<B: AutodiffBackend> AutodiffModule<B> for LoraLinear<B> {
    type InnerModule = LoraLinear<B::InnerBackend>;

    fn valid(&self) -> Self::InnerModule {
        LoraLinear { base: self.base.valid(), adapter: self.adapter.valid() }
    }

    fn from_inner(module: Self::InnerModule) -> Self {
        Self::assemble(
            AutodiffModule::from_inner(module.base),
            AutodiffModule::from_inner(module.adapter),
        )
    }
}

impl<B: AutodiffBackend> HasAutodiffModule<B> for LoraLinear<B::InnerBackend> {
    type TrainModule = LoraLinear<B>;
}

impl<B: Backend> Clone for LoraLinear<B> {
    fn clone(&self) -> Self {
        Self { base: self.base.clone(), adapter: self.adapter.clone() }
    }
}

impl<B: Backend> ModuleDisplayDefault for LoraLinear<B> {
    fn content(&self, content: Content) -> Option<Content> {
        let [d_input, d_output] = self.weight_shape();
        let content = content
            .set_top_level_type("LoraLinear")
            .add("d_input", &d_input)
            .add("d_output", &d_output)
            .add("bias", &self.base.bias.is_some());
        let Some(adapter) = &self.adapter else { return content.optional() };
        let (trainable, total) = (adapter.num_trainable(), self.num_base_params());
        let share = 100.0 * trainable as f64 / total as f64;
        content
            .add("rank", &adapter.rank())
            .add("scale", &adapter.scale())
            .add("trainable", &format!("{trainable} of {total} ({share:.1} %)"))
            .optional()
    }

    fn num_params(&self) -> usize {
        Module::num_params(self)
    }
}

impl<B: Backend> ModuleDisplay for LoraLinear<B> {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new().with_new_line_after_attribute(false).optional()
    }
}

impl<B: Backend> fmt::Display for LoraLinear<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.format(Default::default()))
    }
}
