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
///
/// Running statistics of batch norms, which move although the base is frozen, are in the record, too.
#[derive(Clone, Debug)]
pub struct Tuned<M> {
    model: M,
    /// The paths of the parameters that train.
    paths: BTreeSet<String>,
    /// The paths of running statistics.
    statistics: BTreeSet<String>,
    adapters: Vec<AdapterShapeRecord>,
}

/// What a record keeps of a [`Tuned`].
#[derive(Debug, Clone, Record)]
pub struct TunedRecord<B: Backend> {
    /// The adapters' ranks and scales, to notice a model that has others.
    pub adapters: Vec<AdapterShapeRecord>,
    /// The parameters that train, and running statistics.
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
    /// Wraps a model that is ready to be trained: what requires gradients now is what trains. On a backend
    /// without autodiff nothing does, until a record is loaded, which says it.
    pub fn new<B: Backend>(model: M) -> Self
    where
        M: LoraModule<B>,
    {
        let layers = model.parameters().layers.into_iter();
        let adapters = layers.filter_map(|layer| {
            let (rank, scale) = layer.adapter?;
            Some(AdapterShapeRecord { path: layer.path, rank, scale })
        });
        let adapters = adapters.collect();
        let params = walk::visit(&model).params.into_iter();
        let (statistics, params): (Vec<_>, Vec<_>) = params.partition(|it| it.is_statistic);
        let statistics = statistics.into_iter().map(|param| param.path).collect();
        let trains = params.into_iter().filter(|param| param.requires_grad);
        Self { paths: trains.map(|param| param.path).collect(), statistics, adapters, model }
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
        let model = walk::mark_exactly(self.model, |path| self.paths.contains(path));
        Self { model, ..self }
    }
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
        let recorded = record.parameters.iter().map(|it| it.path.clone());
        let paths: BTreeSet<_> = recorded.filter(|it| !self.statistics.contains(it)).collect();
        let differ: Vec<_> = self.paths.symmetric_difference(&paths).collect();
        assert!(
            self.paths.is_empty() || differ.is_empty(),
            "the model and the record disagree on whether these train: {differ:?}"
        );
        let model = trained::load(self.model, record.parameters);
        Self { model, paths, ..self }.refrozen()
    }

    fn into_record(self) -> Self::Record {
        if !self.statistics.is_empty() {
            walk::sync_statistics::<B, M>(&self.model);
        }
        let paths = self.paths.union(&self.statistics).cloned().collect();
        let parameters = trained::save(&self.model, &paths);
        TunedRecord { adapters: self.adapters, parameters }
    }
}

impl<B: AutodiffBackend, M: AutodiffModule<B>> AutodiffModule<B> for Tuned<M> {
    type InnerModule = Tuned<M::InnerModule>;

    fn valid(&self) -> Self::InnerModule {
        Tuned {
            model: self.model.valid(),
            paths: self.paths.clone(),
            statistics: self.statistics.clone(),
            adapters: self.adapters.clone(),
        }
    }

    fn from_inner(module: Self::InnerModule) -> Self {
        let Tuned { model, paths, statistics, adapters } = module;
        Self { model: M::from_inner(model), paths, statistics, adapters }.refrozen()
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
