//! Each layer as a Burn module, and as a [`LoraLayer`](super::LoraLayer). The code is the same for all
//! layers. It is not derived, so that a layer has the parameter paths of its base, and the base stays
//! frozen.

/// Implements [`LoraLayer`](super::LoraLayer) and Burn's module traits for a layer with the fields
/// `base` and `adapter`, and the methods `layout` and `can_take_bias`. The base's weight has `$D`
/// dimensions. The last arguments name the base's parameters. The record holds these and the adapter.
macro_rules! lora_layer {
    ($Layer:ident, $Base:ident, $D:literal, $weight:ident $(, $bias:ident)?) => {
        const _: () = {
            use std::fmt;

            use burn::{
                module::{
                    AutodiffModule, Content, Devices, DisplaySettings, HasAutodiffModule, Module,
                    ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor, Param,
                },
                record::Record,
                tensor::{
                    Tensor,
                    backend::{AutodiffBackend, Backend},
                },
            };

            use crate::{
                adapter::{LoraAdapter, LoraAdapterRecord, WeightLayout, frozen},
                config::LoraConfig,
                layer::{
                    self, LoraLayer,
                    letter::{self, ADAPTER, TAG},
                },
            };

            /// The record of a layer: the fields of the base's record, and the adapter.
            #[derive(Debug, Clone, Record)]
            pub struct LayerRecord<B: Backend> {
                /// The base's weight.
                pub $weight: Param<Tensor<B, $D>>,
                $(
                    /// The base's bias, if it has one.
                    pub $bias: Option<Param<Tensor<B, 1>>>,
                )?
                /// The adapter, if there is one.
                pub adapter: Option<LoraAdapterRecord<B>>,
            }

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
                    // `val` also initialises a base that was never used, so that later clones share
                    // its values.
                    let trains = || {
                        self.base.$weight.val().is_require_grad()
                            $(|| self.base.$bias.as_ref().is_some_and(|it| it.val().is_require_grad()))?
                    };
                    if self.adapter.is_some() && trains() {
                        self.base = self.base.clone().no_grad();
                    }
                }

                /// The layer with this base and adapter. The base is frozen if there is an adapter.
                fn assemble(base: $Base<B>, adapter: Option<LoraAdapter<B>>) -> Self {
                    let mut layer = Self::from(base);
                    layer.set_adapter(adapter);
                    layer
                }
            }

            impl<B: Backend> From<$Base<B>> for $Layer<B> {
                /// The layer without an adapter; nothing is copied or frozen.
                fn from(base: $Base<B>) -> Self {
                    Self { base, adapter: None }
                }
            }

            impl<B: Backend> layer::Adaptable<B> for $Base<B> {
                type Lora = $Layer<B>;

                fn with_fresh_adapter(self, config: &LoraConfig) -> $Layer<B> {
                    let mut layer = $Layer::from(self);
                    layer.set_adapter(Some(layer::fresh(config, &layer)));
                    layer
                }
            }

            impl<B: Backend> LoraLayer<B> for $Layer<B> {
                fn adapter(&self) -> Option<&LoraAdapter<B>> {
                    self.adapter.as_ref()
                }

                fn set_adapter(&mut self, adapter: Option<LoraAdapter<B>>) {
                    self.set_adapter(adapter);
                }

                fn weight_shape(&self) -> [usize; 2] {
                    // `lazy_shape` cannot be used: until a weight in Burn's column layout is
                    // initialised, its `lazy_shape` is transposed.
                    self.layout().matrix_shape(&self.base.$weight.shape())
                }

                fn weight_layout(&self) -> WeightLayout {
                    self.layout()
                }

                fn weight_matrix(&self) -> Tensor<B, 2> {
                    self.layout().to_matrix(frozen(&self.base.$weight))
                }

                fn takes_bias(&self) -> bool {
                    self.can_take_bias()
                }

                fn device(&self) -> B::Device {
                    self.base.$weight.lazy_device()
                }

                fn merge_adapter(&mut self) -> bool {
                    let Some(adapter) = &self.adapter else { return true };
                    let shape = self.base.$weight.dims();
                    let delta = self.layout().to_weight(adapter.delta(), shape);
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
                type Record = LayerRecord<B>;

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
                    visitor.enter_module(ADAPTER, TAG);
                    letter::answer_look(self);
                    self.adapter.visit(visitor);
                    visitor.exit_module(ADAPTER, TAG);
                }

                fn map<M: ModuleMapper<B>>(self, mapper: &mut M) -> Self {
                    let mut layer = Self { base: self.base.map(mapper), ..self };
                    mapper.enter_module(ADAPTER, TAG);
                    letter::answer_change(&mut layer);
                    let adapter = Module::map(layer.adapter, mapper);
                    mapper.exit_module(ADAPTER, TAG);
                    Self::assemble(layer.base, adapter)
                }

                fn load_record(self, record: Self::Record) -> Self {
                    let device = self.device();
                    let mut base = self.base;
                    base.$weight = base.$weight.load_record(record.$weight);
                    $(base.$bias = base.$bias.load_record(record.$bias);)?
                    let adapter = record.adapter.map(|it| LoraAdapter::from_record(it, &device));
                    Self::assemble(base, adapter.or(self.adapter))
                }

                fn into_record(self) -> Self::Record {
                    LayerRecord {
                        $weight: self.base.$weight.into_record(),
                        $($bias: self.base.$bias.into_record(),)?
                        adapter: self.adapter.into_record(),
                    }
                }
            }

            impl<B: AutodiffBackend> AutodiffModule<B> for $Layer<B> {
                type InnerModule = $Layer<B::InnerBackend>;

                fn valid(&self) -> Self::InnerModule {
                    $Layer { base: self.base.valid(), adapter: self.adapter.valid() }
                }

                fn from_inner(module: Self::InnerModule) -> Self {
                    Self::assemble(
                        AutodiffModule::from_inner(module.base),
                        AutodiffModule::from_inner(module.adapter),
                    )
                }
            }

            impl<B: AutodiffBackend> HasAutodiffModule<B> for $Layer<B::InnerBackend> {
                type TrainModule = $Layer<B>;
            }

            impl<B: Backend> Clone for $Layer<B> {
                fn clone(&self) -> Self {
                    Self { base: self.base.clone(), adapter: self.adapter.clone() }
                }
            }

            impl<B: Backend> ModuleDisplayDefault for $Layer<B> {
                fn content(&self, content: Content) -> Option<Content> {
                    let content = content.set_top_level_type(stringify!($Layer));
                    let content = self.base.custom_content(content)?;
                    let Some(adapter) = &self.adapter else { return content.optional() };
                    let (trainable, total) =
                        (adapter.num_trainable(), Module::num_params(&self.base));
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
