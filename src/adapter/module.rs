//! `LoraAdapter` as a Burn module. It is written by hand and not derived, so that the factors stay
//! trainable and the record contains the scaling.

use std::fmt;

use burn::{
    module::{
        AutodiffModule, Content, Devices, DisplaySettings, HasAutodiffModule, Module,
        ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor, Param,
    },
    nn::Dropout,
    record::{PrecisionSettings, Record},
    tensor::{
        Tensor,
        backend::{AutodiffBackend, Backend},
    },
};

use super::{LoraAdapter, Tie, Training, WeightLayout};
use crate::config::Scaling;

/// The record of a [`LoraAdapter`]. It holds every value that the adapter computes with.
#[derive(Debug, Clone, Record)]
pub struct LoraAdapterRecord<B: Backend> {
    /// The factor A: `[d_input, rank]`.
    pub a: Param<Tensor<B, 2>>,
    /// The factor B: `[rank, d_output]`.
    pub b: Param<Tensor<B, 2>>,
    /// The bias, if the adapter has one: `[d_output]`.
    pub bias: Option<Param<Tensor<B, 1>>>,
    /// The value that `scaling` turns into the scale `s`.
    pub alpha: f64,
    /// The rule for the scale `s`.
    pub scaling: Scaling,
    /// The probability of dropout.
    pub dropout: f64,
    /// The magnitudes, if the adapter has them: `[d_output]`.
    pub magnitude: Option<Param<Tensor<B, 1>>>,
    /// Whether A does not train.
    pub freezes_a: bool,
    /// The initial A, if the adapter started as a part of the weight: `[d_input, rank]`.
    pub start_a: Option<Tensor<B, 2>>,
    /// The initial B, if the adapter started as a part of the weight: `[rank, d_output]`.
    pub start_b: Option<Tensor<B, 2>>,
    /// Whether the adapter of an embedding leaves a head alone that is the same table.
    pub leaves_head: bool,
}

impl<B: Backend> Record<B> for Scaling {
    type Item<S: PrecisionSettings> = Scaling;

    fn into_item<S: PrecisionSettings>(self) -> Self::Item<S> {
        self
    }

    fn from_item<S: PrecisionSettings>(item: Self::Item<S>, _device: &B::Device) -> Self {
        item
    }
}

/// The container name of the other parts.
const CONTAINER: &str = "Struct:LoraAdapter";

/// The container name of a factor that does not train. No struct can have this name.
pub(crate) const FROZEN: &str = "burn-lora frozen factor";

/// Whether a parameter with this container name is part of an adapter.
pub(crate) fn is_part(container: &str) -> bool {
    container == CONTAINER || container == FROZEN
}

impl<B: Backend> LoraAdapter<B> {
    fn container_of_a(&self) -> &'static str {
        if self.training.freezes_a { FROZEN } else { CONTAINER }
    }
}

impl<B: Backend> Module<B> for LoraAdapter<B> {
    type Record = LoraAdapterRecord<B>;

    fn collect_devices(&self, devices: Devices<B>) -> Devices<B> {
        let devices = self.a.collect_devices(devices);
        let devices = self.b.collect_devices(devices);
        let devices = self.bias.collect_devices(devices);
        self.magnitude.collect_devices(devices)
    }

    fn fork(self, device: &B::Device) -> Self {
        Self {
            a: self.a.fork(device),
            b: self.b.fork(device),
            bias: self.bias.fork(device),
            magnitude: self.magnitude.fork(device),
            training: self.training.fork(device),
            ..self
        }
    }

    /// Moves the factors and keeps them leaves. After Burn's `to_device` they would not be leaves, and
    /// no optimizer could train them.
    fn to_device(self, device: &B::Device) -> Self {
        self.fork(device)
    }

    fn visit<V: ModuleVisitor<B>>(&self, visitor: &mut V) {
        visitor.enter_module("a", self.container_of_a());
        self.a.visit(visitor);
        visitor.exit_module("a", self.container_of_a());
        visitor.enter_module("b", CONTAINER);
        self.b.visit(visitor);
        visitor.exit_module("b", CONTAINER);
        visitor.enter_module("bias", CONTAINER);
        self.bias.visit(visitor);
        visitor.exit_module("bias", CONTAINER);
        visitor.enter_module("magnitude", CONTAINER);
        self.magnitude.visit(visitor);
        visitor.exit_module("magnitude", CONTAINER);
    }

    fn map<M: ModuleMapper<B>>(self, mapper: &mut M) -> Self {
        let container = self.container_of_a();
        mapper.enter_module("a", container);
        let a = Module::map(self.a, mapper);
        mapper.exit_module("a", container);
        mapper.enter_module("b", CONTAINER);
        let b = Module::map(self.b, mapper);
        mapper.exit_module("b", CONTAINER);
        mapper.enter_module("bias", CONTAINER);
        let bias = Module::map(self.bias, mapper);
        mapper.exit_module("bias", CONTAINER);
        mapper.enter_module("magnitude", CONTAINER);
        let magnitude = Module::map(self.magnitude, mapper);
        mapper.exit_module("magnitude", CONTAINER);
        Self { a, b, bias, magnitude, ..self }
    }

    /// Replaces everything but the layout by the record's values, including the rank and the scaling.
    fn load_record(self, record: Self::Record) -> Self {
        let device = self.a.device();
        Self { layout: self.layout, ..Self::from_record(record, &device) }
    }

    fn into_record(self) -> Self::Record {
        let (start_a, start_b) = self.training.start.map(|[a, b]| (a, b)).unzip();
        LoraAdapterRecord {
            a: self.a.into_record(),
            b: self.b.into_record(),
            bias: self.bias.into_record(),
            alpha: self.alpha,
            scaling: self.scaling,
            dropout: self.dropout.prob,
            magnitude: self.magnitude.into_record(),
            freezes_a: self.training.freezes_a,
            start_a,
            start_b,
            leaves_head: self.tie == Tie::Leaves,
        }
    }
}

impl<B: Backend> LoraAdapter<B> {
    /// The adapter that `record` describes, on `device`. The layer that gets it sets its layout.
    pub(crate) fn from_record(record: LoraAdapterRecord<B>, device: &B::Device) -> Self {
        let start = record.start_a.zip(record.start_b).map(|(a, b)| [a, b]);
        Self {
            a: trainable_param(record.a, device),
            b: trainable_param(record.b, device),
            bias: record.bias.map(|bias| trainable_param(bias, device)),
            alpha: record.alpha,
            scaling: record.scaling,
            dropout: Dropout { prob: record.dropout },
            magnitude: record.magnitude.map(|it| trainable_param(it, device)),
            training: Training { freezes_a: record.freezes_a, start, observer: None }.fork(device),
            layout: WeightLayout::Unknown,
            tie: if record.leaves_head { Tie::Leaves } else { Tie::default() },
        }
    }
}

/// The parameter as a leaf that requires gradients. It keeps its id, by which an optimizer finds the
/// parameter's state.
fn trainable_param<B: Backend, const D: usize>(
    param: Param<Tensor<B, D>>,
    device: &B::Device,
) -> Param<Tensor<B, D>> {
    param.map(|tensor| tensor.to_device(device).detach().set_require_grad(true))
}

impl<B: AutodiffBackend> AutodiffModule<B> for LoraAdapter<B> {
    type InnerModule = LoraAdapter<B::InnerBackend>;

    fn valid(&self) -> Self::InnerModule {
        LoraAdapter {
            a: self.a.valid(),
            b: self.b.valid(),
            bias: self.bias.valid(),
            alpha: self.alpha,
            scaling: self.scaling,
            dropout: self.dropout.clone(),
            magnitude: self.magnitude.valid(),
            training: self.training.valid(),
            layout: self.layout.clone(),
            tie: self.tie,
        }
    }

    fn from_inner(module: Self::InnerModule) -> Self {
        let device = module.a.device();
        Self {
            a: trainable_param(Param::from_inner(module.a), &device),
            b: trainable_param(Param::from_inner(module.b), &device),
            bias: module.bias.map(|bias| trainable_param(Param::from_inner(bias), &device)),
            alpha: module.alpha,
            scaling: module.scaling,
            dropout: module.dropout,
            magnitude: module.magnitude.map(|it| trainable_param(Param::from_inner(it), &device)),
            training: Training::from_inner(module.training),
            layout: module.layout,
            tie: module.tie,
        }
    }
}

impl<B: AutodiffBackend> HasAutodiffModule<B> for LoraAdapter<B::InnerBackend> {
    type TrainModule = LoraAdapter<B>;
}

impl<B: Backend> Clone for LoraAdapter<B> {
    fn clone(&self) -> Self {
        Self {
            a: self.a.clone(),
            b: self.b.clone(),
            bias: self.bias.clone(),
            alpha: self.alpha,
            scaling: self.scaling,
            dropout: self.dropout.clone(),
            magnitude: self.magnitude.clone(),
            training: self.training.clone(),
            layout: self.layout.clone(),
            tie: self.tie,
        }
    }
}

impl<B: Backend> ModuleDisplayDefault for LoraAdapter<B> {
    fn content(&self, content: Content) -> Option<Content> {
        let [d_input, d_output] = self.shape();
        content
            .set_top_level_type("LoraAdapter")
            .add("d_input", &d_input)
            .add("d_output", &d_output)
            .add("rank", &self.rank())
            .add("scale", &self.scale())
            .optional()
    }

    fn num_params(&self) -> usize {
        Module::num_params(self)
    }
}

impl<B: Backend> ModuleDisplay for LoraAdapter<B> {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new().with_new_line_after_attribute(false).optional()
    }
}

impl<B: Backend> fmt::Display for LoraAdapter<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.format(Default::default()))
    }
}
