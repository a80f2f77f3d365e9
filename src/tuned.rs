//! Records that hold only what trains.

use std::{collections::BTreeSet, fmt, ops::Deref};

use burn::{
    module::{
        AutodiffModule, Content, Devices, HasAutodiffModule, Module, ModuleDisplay,
        ModuleDisplayDefault, ModuleMapper, ModuleVisitor,
    },
    record::Record,
    tensor::backend::{AutodiffBackend, Backend},
};

use crate::{
    LoraModule,
    trained::{self, TrainedRecord},
    walk,
};

/// A model in training, whose records hold what trains and nothing of what is frozen: so do burn-train's
/// checkpoints, which are then a few percent of the model's size.
///
/// Make it the field of the struct that implements `TrainStep`:
///
/// ```
/// # use burn::{module::Module, nn::LinearConfig, tensor::{Tensor, backend::Backend}};
/// # use burn_lora::{LoraConfig, LoraError, LoraLayers, LoraLinear, LoraModule};
/// use burn_lora::Tuned;
/// # #[derive(Module, Debug)]
/// # struct Net<B: Backend> { fc1: LoraLinear<B>, fc2: LoraLinear<B> }
/// # impl<B: Backend> LoraModule<B> for Net<B> {
/// #     fn lora_layers(&mut self) -> LoraLayers<'_, B> {
/// #         LoraLayers::new().with("fc1", &mut self.fc1).with("fc2", &mut self.fc2)
/// #     }
/// # }
/// # impl<B: Backend> Net<B> {
/// #     fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> { self.fc2.forward(self.fc1.forward(x)) }
/// # }
///
/// #[derive(Module, Debug)]
/// struct Task<B: Backend> {
///     net: Tuned<Net<B>>,
/// }
///
/// # fn main() -> Result<(), LoraError> {
/// # type B = burn::backend::Autodiff<burn::backend::Flex>;
/// # let device = Default::default();
/// # let net: Net<B> = Net {
/// #     fc1: LinearConfig::new(64, 64).init(&device).into(),
/// #     fc2: LinearConfig::new(64, 10).init(&device).into(),
/// # };
/// let task = Task { net: Tuned::new(net.attach(&LoraConfig::new(4, 8.0))?) };
/// let y = task.net.forward(Tensor::ones([1, 64], &device));
/// let record = task.into_record(); // two pairs of A and B
/// # assert_eq!(record.net.parameters.len(), 4);
/// # Ok(())
/// # }
/// ```
///
/// To load a record, make the same model again, with the same base and adapters of the same rank and
/// scale; the record brings the values, and the ids by which an optimizer finds its state. What trains
/// is what did when the model was [wrapped](Self::new), on all trips between backends and devices.
#[derive(Clone, Debug)]
pub struct Tuned<M> {
    model: M,
    /// The paths of the parameters that train.
    paths: BTreeSet<String>,
    adapters: Vec<AdapterShapeRecord>,
}

/// What a record keeps of a [`Tuned`].
#[derive(Debug, Clone, Record)]
pub struct TunedRecord<B: Backend> {
    /// The adapters' ranks and scales, to notice a model that has others.
    pub adapters: Vec<AdapterShapeRecord>,
    /// The parameters that train.
    pub parameters: Vec<TrainedRecord<B>>,
}

/// What an adapter is, beyond its values.
#[derive(Debug, Clone, PartialEq, Record)]
pub struct AdapterShapeRecord {
    /// The path of the layer.
    pub path: String,
    /// The rank.
    pub rank: usize,
    /// The scale `s`.
    pub scale: f64,
}

impl<M> Tuned<M> {
    /// Wraps a model that is ready to be trained: what requires gradients now is what trains.
    pub fn new<B: Backend>(model: M) -> Self
    where
        M: LoraModule<B>,
    {
        let layers = model.parameters().layers.into_iter();
        let adapters = layers.filter_map(|layer| {
            let (rank, scale) = layer.adapter?;
            Some(AdapterShapeRecord { path: layer.path, rank, scale })
        });
        Self { adapters: adapters.collect(), paths: flagged(&model), model }
    }

    /// The model itself.
    pub fn into_inner(self) -> M {
        self.model
    }

    /// Marks exactly what trains as trainable.
    fn refrozen<B: Backend>(self) -> Self
    where
        M: Module<B>,
    {
        let Self { model, paths, adapters } = self;
        let model = walk::mark_trainable(model, |path| paths.contains(path));
        Self { model, paths, adapters }
    }
}

/// The paths of the parameters that require gradients.
fn flagged<B: Backend, M: Module<B>>(model: &M) -> BTreeSet<String> {
    let params = walk::visit(model).params.into_iter();
    params.filter(|param| param.requires_grad).map(|param| param.path).collect()
}

impl<M> Deref for Tuned<M> {
    type Target = M;

    fn deref(&self) -> &M {
        &self.model
    }
}

impl<B: Backend, M: Module<B>> Module<B> for Tuned<M> {
    type Record = TunedRecord<B>;

    fn collect_devices(&self, devices: Devices<B>) -> Devices<B> {
        self.model.collect_devices(devices)
    }

    fn fork(self, device: &B::Device) -> Self {
        Self { model: self.model.fork(device), ..self }.refrozen()
    }

    fn to_device(self, device: &B::Device) -> Self {
        Self { model: self.model.to_device(device), ..self }.refrozen()
    }

    fn visit<V: ModuleVisitor<B>>(&self, visitor: &mut V) {
        self.model.visit(visitor);
    }

    fn map<Map: ModuleMapper<B>>(self, mapper: &mut Map) -> Self {
        Self { model: self.model.map(mapper), ..self }
    }

    /// Takes over the recorded parameters.
    ///
    /// # Panics
    ///
    /// If the record is that of another model, or of adapters of another rank or scale.
    fn load_record(self, record: Self::Record) -> Self {
        let (expected, found) = (&self.adapters, &record.adapters);
        assert!(expected == found, "the model has the adapters {expected:?}, the record {found:?}");
        let recorded: BTreeSet<_> = record.parameters.iter().map(|it| it.path.clone()).collect();
        let missing: Vec<_> = self.paths.difference(&recorded).collect();
        assert!(missing.is_empty(), "the record lacks parameters that train: {missing:?}");
        Self { model: trained::load(self.model, record.parameters), ..self }.refrozen()
    }

    fn into_record(self) -> Self::Record {
        let parameters = trained::save(&self.model, &self.paths);
        TunedRecord { adapters: self.adapters, parameters }
    }
}

impl<B: AutodiffBackend, M: AutodiffModule<B>> AutodiffModule<B> for Tuned<M> {
    type InnerModule = Tuned<M::InnerModule>;

    fn valid(&self) -> Self::InnerModule {
        let (paths, adapters) = (self.paths.clone(), self.adapters.clone());
        Tuned { model: self.model.valid(), paths, adapters }
    }

    fn from_inner(module: Self::InnerModule) -> Self {
        let Tuned { model, paths, adapters } = module;
        Self { model: M::from_inner(model), paths, adapters }.refrozen()
    }
}

impl<B, M> HasAutodiffModule<B> for Tuned<M>
where
    B: AutodiffBackend,
    M: Module<B::InnerBackend> + HasAutodiffModule<B>,
{
    type TrainModule = Tuned<M::TrainModule>;
}

impl<M: ModuleDisplay> ModuleDisplayDefault for Tuned<M> {
    fn content(&self, content: Content) -> Option<Content> {
        content.set_top_level_type("Tuned").add("model", &self.model).optional()
    }

    fn num_params(&self) -> usize {
        self.model.num_params()
    }
}

impl<M: ModuleDisplay> ModuleDisplay for Tuned<M> {}

impl<M: ModuleDisplay> fmt::Display for Tuned<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.format(Default::default()))
    }
}
