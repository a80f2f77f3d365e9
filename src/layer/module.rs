//! Each layer as a Burn module, and as a [`LoraLayer`](super::LoraLayer). The code is the same for all
//! layers. It is not derived, so that a layer has the parameter paths of its base, and the base stays
//! frozen.

/// Implements [`LoraLayer`](super::LoraLayer), [`LoraLayerMut`](super::LoraLayerMut) and Burn's module traits for a layer with the fields
/// `base`, `adapter` and `mixed`, and the methods `layout` and `can_take_bias`. The base's weight has `$D`
/// dimensions. The next arguments name the base's parameters. The record holds these and the adapter.
/// The last argument is the field of the quantized weight, in layers that can have one, and its name in records,
/// which files of the first version hold.
macro_rules! lora_layer {
    (
        $Layer:ident, $Record:ident, $Base:ident, $D:literal, $weight:ident $(, $bias:ident)? $(; $quantized:ident as $recorded:ident)?
    ) => {
        #[doc = concat!("What a record holds of a [`", stringify!($Layer), "`](crate::nn::", stringify!($Layer), "): the fields of the base's record, and the adapter.")]
        #[derive(Debug, Clone, burn::record::Record)]
        pub struct $Record<B: burn::tensor::backend::Backend> {
            /// The base's weight.
            pub $weight: burn::module::Param<burn::tensor::Tensor<B, $D>>,
            $(
                /// The base's bias, if it has one.
                pub $bias: Option<burn::module::Param<burn::tensor::Tensor<B, 1>>>,
            )?
            /// The adapter, if there is one.
            pub adapter: Option<crate::adapter::LoraAdapterRecord<B>>,
            $(
                /// The base's weight, if it is quantized. The other one is then empty.
                pub $recorded: Option<crate::layer::QuantizedWeight<B>>,
            )?
        }

        const _: () = {
            use std::fmt;

            use burn::{
                module::{
                    AutodiffModule, Content, Devices, DisplaySettings, HasAutodiffModule, Module,
                    ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor,
                },
                tensor::{
                    Tensor,
                    backend::{AutodiffBackend, Backend},
                },
            };

            use crate::{
                adapter::{LoraAdapter, Mixed, WeightLayout},
                config::LoraConfig,
                ops::runs_on,
                precision::Precision,
                layer::{
                    self, Capabilities, LoraLayer, LoraLayerMut,
                    access::{self, ADAPTER, TAG},
                },
                tensors::frozen,
            };

            impl<B: Backend> $Layer<B> {
                /// The adapter, if there is one.
                pub fn adapter(&self) -> Option<&LoraAdapter<B>> {
                    self.adapter.as_ref()
                }

                /// Puts the adapter on the base, and freezes the base. `None` takes the adapter off,
                /// and leaves the base as it is.
                ///
                /// # Panics
                ///
                /// If the adapter was made for a weight of another shape, or has a bias that the layer
                /// cannot take.
                pub fn set_adapter(&mut self, adapter: Option<LoraAdapter<B>>) {
                    self.adapter = adapter.map(|adapter| {
                        layer::check_fit(self, &adapter);
                        LoraAdapter { layout: self.layout(), ..adapter }
                    });
                    // `val` also initializes a base that was never used, so that later clones share
                    // its values.
                    let trains = || {
                        self.base.$weight.val().is_require_grad()
                            $(|| self.base.$bias.as_ref().is_some_and(|it| it.val().is_require_grad()))?
                    };
                    if self.adapter.is_some() && trains() {
                        self.base = self.base.clone().no_grad();
                    }
                }

                /// The precision that the layer is set to.
                pub fn precision(&self) -> Precision {
                    self.precision
                }

                /// Sets the precision in which the layer multiplies, where it is one operation of this crate.
                pub fn set_precision(&mut self, precision: Precision) {
                    self.precision = precision;
                }

                /// The layer with this base and adapter. The base is frozen if there is an adapter.
                fn assemble(
                    base: $Base<B>,
                    adapter: Option<LoraAdapter<B>>,
                    $($quantized: Option<layer::QuantizedWeight<B>>,)?
                ) -> Self {
                    let precision = Precision::default();
                    let mut layer = Self { base, adapter: None, mixed: None, precision $(, $quantized)? };
                    layer.set_adapter(adapter);
                    layer
                }

                $(
                    /// The shape of the base's weight, quantized or not, as Burn has it.
                    pub fn weight_shape(&self) -> [usize; 2] {
                        LoraLayer::weight_shape(self)
                    }

                    /// The base's weight, if it is quantized. `base.weight` is empty then, and visitors
                    /// of the module do not see it.
                    pub fn quantized(&self) -> Option<&layer::QuantizedWeight<B>> {
                        self.$quantized.as_ref()
                    }

                    /// Replaces the base's weight by a quantized one, which does not train. The adapter
                    /// stays.
                    ///
                    /// # Panics
                    ///
                    /// If it has not the shape of the weight, as [`QuantizedWeight`](crate::quantize::QuantizedWeight) has it.
                    pub fn set_quantized(&mut self, weight: layer::QuantizedWeight<B>) {
                        let shape = layer::quantized::shape(&weight, &self.layout());
                        let expected = self.weight_shape();
                        assert!(
                            shape == expected,
                            "the quantized weight must be {expected:?} = [d_input, d_output], got \
                             {shape:?}"
                        );
                        let weight = weight.to_device(&LoraLayer::device(self));
                        let empty = Tensor::zeros([0, 0], &weight.device());
                        self.base.$weight = burn::module::Param::initialized(self.base.$weight.id, empty);
                        self.$quantized = Some(weight);
                    }

                )?
            }

            impl<B: Backend> From<$Base<B>> for $Layer<B> {
                /// The layer without an adapter; nothing is copied or frozen.
                fn from(base: $Base<B>) -> Self {
                    let precision = Precision::default();
                    Self { base, adapter: None, mixed: None, precision $(, $quantized: None)? }
                }
            }

            impl<B: Backend> layer::Adaptable<B> for $Base<B> {
                type Lora = $Layer<B>;

                fn with_fresh_adapter(self, config: &LoraConfig) -> $Layer<B> {
                    let mut layer = $Layer::from(self);
                    layer.set_adapter(Some(layer::fresh(&config.into(), &layer)));
                    layer
                }
            }

            impl<B: Backend> LoraLayer<B> for $Layer<B> {
                fn adapter(&self) -> Option<&LoraAdapter<B>> {
                    self.adapter.as_ref()
                }

                fn precision(&self) -> Precision {
                    let has_form = self.has_form() && runs_on::<B>();
                    if has_form { self.precision } else { Precision::F32 }
                }

                fn capabilities(&self) -> Capabilities {
                    const QUANTIZED: &[&str] = &[$(stringify!($quantized))?];
                    Capabilities {
                        bias: self.can_take_bias(),
                        dropout: true,
                        quantized: !QUANTIZED.is_empty(),
                        mixed: true,
                    }
                }

                fn weight_shape(&self) -> [usize; 2] {
                    $(if let Some(weight) = &self.$quantized {
                        return layer::quantized::shape(weight, &self.layout());
                    })?
                    // `lazy_shape` cannot be used: until a weight in Burn's column layout is
                    // initialized, its `lazy_shape` is transposed.
                    self.layout().matrix_shape(&self.base.$weight.shape())
                }

                fn weight_layout(&self) -> WeightLayout {
                    self.layout()
                }

                fn weight_matrix(&self) -> Tensor<B, 2> {
                    $(if let Some(weight) = &self.$quantized {
                        return layer::quantized::matrix(weight, &self.layout());
                    })?
                    self.layout().to_matrix(frozen(&self.base.$weight))
                }

                $(
                    fn quantized(&self) -> Option<&layer::QuantizedWeight<B>> {
                        self.$quantized.as_ref()
                    }
                )?

                fn device(&self) -> B::Device {
                    self.base.$weight.lazy_device()
                }
            }

            impl<B: Backend> LoraLayerMut<B> for $Layer<B> {
                fn set_adapter(&mut self, adapter: Option<LoraAdapter<B>>) {
                    self.set_adapter(adapter);
                }

                fn set_precision(&mut self, precision: Precision) {
                    self.precision = precision;
                }

                fn set_mixed(&mut self, mixed: Mixed<B>) -> bool {
                    for adapter in mixed.adapters() {
                        layer::check_fit(self, adapter);
                    }
                    self.adapter = None;
                    self.mixed = Some(mixed);
                    true
                }

                $(
                    fn set_quantized(&mut self, weight: layer::QuantizedWeight<B>) -> bool {
                        self.set_quantized(weight);
                        true
                    }

                    fn dequantize(&mut self) {
                        if let Some(weight) = self.$quantized.take() {
                            let matrix = layer::quantized::matrix(&weight, &self.layout());
                            let matrix = matrix.detach().set_require_grad(false);
                            self.base.$weight = burn::module::Param::initialized(self.base.$weight.id, matrix);
                        }
                    }
                )?

                fn merge_adapter(&mut self) -> bool {
                    $(if self.adapter.is_some() && self.$quantized.is_some() {
                        let mut dense = self.clone();
                        dense.dequantize();
                        let merged = dense.merge_adapter();
                        if merged {
                            *self = dense;
                        }
                        return merged;
                    })?
                    let Some(adapter) = &self.adapter else { return true };
                    let shape = self.base.$weight.dims();
                    let delta = adapter.delta_on(|| self.weight_matrix());
                    let delta = self.layout().to_weight(delta, shape);
                    let weight = layer::plus(&self.base.$weight, delta);
                    let finite = layer::is_finite(&weight);
                    $(
                        let bias = {
                            let delta = adapter.bias_delta();
                            layer::plus_bias(&self.base.$bias, delta, weight.dtype())
                        };
                        let finite = finite && bias.as_ref().is_none_or(layer::is_finite);
                    )?
                    if finite {
                        self.base.$weight = weight;
                        $(self.base.$bias = bias;)?
                        self.adapter = None;
                    }
                    finite
                }
            }

            impl<B: Backend> Module<B> for $Layer<B> {
                type Record = $Record<B>;

                fn collect_devices(&self, devices: Devices<B>) -> Devices<B> {
                    let devices = self.base.collect_devices(devices);
                    self.adapter.collect_devices(devices)
                }

                fn fork(self, device: &B::Device) -> Self {
                    let layer = Self::assemble(
                        self.base.fork(device),
                        self.adapter.fork(device),
                        $(self.$quantized.map(|it| it.to_device(device)),)?
                    );
                    Self { mixed: self.mixed.map(|it| it.fork(device)), precision: self.precision, ..layer }
                }

                fn to_device(self, device: &B::Device) -> Self {
                    let layer = Self::assemble(
                        self.base.to_device(device),
                        self.adapter.to_device(device),
                        $(self.$quantized.map(|it| it.to_device(device)),)?
                    );
                    Self { mixed: self.mixed.map(|it| it.fork(device)), precision: self.precision, ..layer }
                }

                fn visit<V: ModuleVisitor<B>>(&self, visitor: &mut V) {
                    match LoraLayer::quantized(self) {
                        None => self.base.visit(visitor),
                        Some(_) => {
                            $(
                                let container = concat!("Struct:", stringify!($Base));
                                visitor.enter_module(stringify!($bias), container);
                                self.base.$bias.visit(visitor);
                                visitor.exit_module(stringify!($bias), container);
                            )?
                        }
                    }
                    visitor.enter_module(ADAPTER, TAG);
                    access::provide(self);
                    self.adapter.visit(visitor);
                    visitor.exit_module(ADAPTER, TAG);
                }

                fn map<M: ModuleMapper<B>>(self, mapper: &mut M) -> Self {
                    let mut layer = self;
                    layer.base = match LoraLayer::quantized(&layer) {
                        None => layer.base.map(mapper),
                        Some(_) => {
                            let base = layer.base;
                            $(
                                let container = concat!("Struct:", stringify!($Base));
                                mapper.enter_module(stringify!($bias), container);
                                let base = $Base { $bias: Module::map(base.$bias, mapper), ..base };
                                mapper.exit_module(stringify!($bias), container);
                            )?
                            base
                        }
                    };
                    mapper.enter_module(ADAPTER, TAG);
                    access::provide_mut(&mut layer);
                    let adapter = Module::map(layer.adapter.take(), mapper);
                    mapper.exit_module(ADAPTER, TAG);
                    layer.set_adapter(adapter);
                    layer
                }

                fn load_record(self, record: Self::Record) -> Self {
                    let device = self.device();
                    let mut layer = self;
                    let adapter = layer.adapter.take();
                    layer.base.$weight = layer.base.$weight.load_record(record.$weight);
                    $(layer.base.$bias = layer.base.$bias.load_record(record.$bias);)?
                    $(layer.$quantized = record.$recorded.map(|it| it.to_device(&device));)?
                    let loaded = record.adapter.map(|it| LoraAdapter::from_record(it, &device));
                    layer.set_adapter(loaded.or(adapter));
                    layer
                }

                fn into_record(self) -> Self::Record {
                    $Record {
                        $weight: self.base.$weight.into_record(),
                        $($bias: self.base.$bias.into_record(),)?
                        adapter: self.adapter.into_record(),
                        $($recorded: self.$quantized,)?
                    }
                }
            }

            impl<B: AutodiffBackend> AutodiffModule<B> for $Layer<B> {
                type InnerModule = $Layer<B::InnerBackend>;

                fn valid(&self) -> Self::InnerModule {
                    $Layer {
                        base: self.base.valid(),
                        adapter: self.adapter.valid(),
                        mixed: None,
                        precision: self.precision,
                        $($quantized: self.$quantized.as_ref().map(layer::QuantizedWeight::valid),)?
                    }
                }

                fn from_inner(module: Self::InnerModule) -> Self {
                    assert!(module.mixed.is_none(), "a model for a mixed batch does not train");
                    let layer = Self::assemble(
                        AutodiffModule::from_inner(module.base),
                        AutodiffModule::from_inner(module.adapter),
                        $(module.$quantized.map(layer::QuantizedWeight::from_inner),)?
                    );
                    Self { precision: module.precision, ..layer }
                }
            }

            impl<B: AutodiffBackend> HasAutodiffModule<B> for $Layer<B::InnerBackend> {
                type TrainModule = $Layer<B>;
            }

            impl<B: Backend> Clone for $Layer<B> {
                fn clone(&self) -> Self {
                    Self {
                        base: self.base.clone(),
                        adapter: self.adapter.clone(),
                        mixed: self.mixed.clone(),
                        precision: self.precision,
                        $($quantized: self.$quantized.clone(),)?
                    }
                }
            }

            impl<B: Backend> ModuleDisplayDefault for $Layer<B> {
                fn content(&self, content: Content) -> Option<Content> {
                    let content = content.set_top_level_type(stringify!($Layer));
                    let (content, total) = match LoraLayer::quantized(self) {
                        None => (self.base.custom_content(content)?, 0),
                        Some(weight) => {
                            (content.add("weight", weight), weight.shape().iter().product())
                        }
                    };
                    let Some(adapter) = &self.adapter else { return content.optional() };
                    let (trainable, total) =
                        (adapter.num_trainable(), total + Module::num_params(&self.base));
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

            impl<B: Backend> ModuleDisplay for $Layer<B> {
                fn custom_settings(&self) -> Option<DisplaySettings> {
                    DisplaySettings::new().with_new_line_after_attribute(false).optional()
                }
            }

            impl<B: Backend> fmt::Display for $Layer<B> {
                fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    f.write_str(&self.format(Default::default()))
                }
            }
        };
    };
}

pub(super) use lora_layer;
