//! What Burn asks of a module, for an adapted model: the same trains after every trip, and the record
//! holds only that.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    fmt,
    rc::Rc,
};

use burn::{
    module::{
        AutodiffModule, Content, Devices, HasAutodiffModule, Module, ModuleDisplay,
        ModuleDisplayDefault, ModuleMapper, ModuleVisitor,
    },
    tensor::{
        TensorPrimitive,
        backend::{AutodiffBackend, Backend},
    },
};

use super::{
    Lora, norms,
    record::{self, LoraRecord, PlacedAdapterRecord},
};
use crate::{
    adapter::LoraAdapter,
    error::LoraError,
    layer::misfit,
    traverse::{self, Values, statistics},
};

impl<B: Backend, M: Module<B>> Lora<B, M> {
    fn map_originals(
        self,
        mut change: impl FnMut(TensorPrimitive<B>) -> TensorPrimitive<B>,
    ) -> Self {
        let originals = self.originals.into_iter().map(|(path, value)| (path, change(value)));
        Self { originals: originals.collect(), ..self }
    }

    /// Maps the model, and leaves what trains as it is.
    pub(super) fn map_model(self, mapper: &mut impl ModuleMapper<B>) -> Self {
        Self { model: Box::new(self.model.map(mapper)), ..self }
    }

    /// Has those parameters train that are marked as such now. Values that will be trained from here
    /// on are remembered as they are.
    fn training_as_marked(mut self) -> Self {
        if traverse::marks_are(&self, &self.trains) {
            return self;
        }
        let params = traverse::params(&self);
        let marked: Vec<_> = params.iter().filter(|param| param.requires_grad).collect();
        let is_new = |path: &str| !self.originals.contains_key(path);
        let new = marked.iter().copied().filter(|param| !param.in_adapter && is_new(&param.path));
        let new: Vec<_> = new.collect();
        if !new.is_empty() {
            let is_marked = |path: &str| marked.iter().any(|it| it.path == path);
            let mut moving = norms::moving(&params, is_marked);
            moving.retain(|it| is_new(&it.path));
            let new: Vec<_> = new.into_iter().chain(moving).collect();
            let paths = new.iter().map(|param| param.path.clone()).collect();
            self.originals.extend(traverse::values(&*self.model, &paths));
            self.modules.extend(new.iter().map(|param| param.torch_name.clone()));
        }
        self.trains = marked.iter().map(|param| param.path.clone()).collect();
        self
    }

    /// Takes over what was recorded: [`load_record`](Module::load_record) for records that come from a file.
    ///
    /// # Errors
    ///
    /// [`LoraError::InvalidRecord`] if the record is one of another model. If this model has adapters, or
    /// something that trains in full: unless the record has the same, of the same ranks and scales.
    /// [`LoraError::SharedStatistics`] as for [`switch`](crate::LoraModule::switch).
    pub fn try_load_record(self, record: LoraRecord<B>) -> Result<Self, LoraError> {
        norms::require_frozen(&self)?;
        let adapters = record::adapters(&self);
        let is_blank = adapters.is_empty() && self.trains.is_empty();
        if !is_blank {
            record.check(&adapters, &self.trains)?;
        }
        self.restored(record)
    }

    /// The same, with an adapter for each of the record's, and these parameters.
    fn restored(self, record: LoraRecord<B>) -> Result<Self, LoraError> {
        let described = serde_json::from_str(&record.described).or_else(|error| {
            record::invalid(format!("the record's description of the adapters is no JSON: {error}"))
        })?;
        let device = self.devices().first().cloned().unwrap_or_default();
        norms::require_same(&self, &record.parameters)?;
        let parameters = record.parameters.iter().map(|it| it.path.clone());
        let in_full: BTreeSet<_> = parameters.filter(|it| !self.statistics.contains(it)).collect();
        let known = traverse::layer_paths::<B, _>(&self);
        let unknown = record.adapters.iter().find(|it| !known.contains(&it.path));
        if let Some(PlacedAdapterRecord { path, .. }) = unknown {
            return record::invalid(format!(
                "the record has an adapter of `{path}`, and the model no such layer"
            ));
        }
        let adapters = record.adapters.into_iter();
        let mut adapters: BTreeMap<_, _> =
            adapters.map(|it| (it.path, LoraAdapter::from_record(it.adapter, &device))).collect();
        let misfits = Rc::new(RefCell::new(Vec::new()));
        let found = misfits.clone();
        let lora = self.unshared().change_layers(move |path, layer| {
            let Some(adapter) = adapters.remove(path) else { return };
            match misfit(layer, &adapter) {
                None => layer.set_adapter(Some(adapter)),
                Some(problem) => found.borrow_mut().push(format!("`{path}`: {problem}")),
            }
        });
        if let Some(problem) = misfits.take().into_iter().next() {
            return record::invalid(problem);
        }
        let mut lora = lora.training(&in_full);
        lora.model = Box::new(record::load(*lora.model, record.parameters)?);
        lora.trains = record.trains.into_iter().collect();
        lora.modules = record.modules;
        lora.described = described;
        lora.conv1d = record.conv1d.into_iter().collect();
        Ok(lora.refrozen())
    }
}

impl<B: Backend, M: Module<B>> Module<B> for Lora<B, M> {
    type Record = LoraRecord<B>;

    fn collect_devices(&self, devices: Devices<B>) -> Devices<B> {
        self.model.collect_devices(devices)
    }

    fn fork(self, device: &B::Device) -> Self {
        let model = Box::new(self.model.fork(device));
        Self { model, ..self }.map_originals(|value| moved(value, device)).refrozen()
    }

    fn to_device(self, device: &B::Device) -> Self {
        self.fork(device)
    }

    fn visit<V: ModuleVisitor<B>>(&self, visitor: &mut V) {
        self.model.visit(visitor);
    }

    fn map<Map: ModuleMapper<B>>(self, mapper: &mut Map) -> Self {
        let mapped = self.map_model(mapper);
        // Only where there are gradients do the flags mean anything.
        let autodiff = mapped.devices().first().is_some_and(|device| B::ad_enabled(device));
        if autodiff { mapped.training_as_marked() } else { mapped }
    }

    /// Takes over what was recorded.
    ///
    /// # Panics
    ///
    /// Where [`try_load_record`](Lora::try_load_record) returns an error.
    fn load_record(self, record: Self::Record) -> Self {
        self.try_load_record(record).unwrap_or_else(|error| panic!("{error}"))
    }

    fn into_record(self) -> Self::Record {
        if !self.statistics.is_empty() {
            statistics::sync::<B, M>(&*self.model);
        }
        let paths = self.originals.keys().chain(&self.statistics).cloned().collect();
        let adapters = record::adapters(&self).into_iter();
        let adapters = adapters.map(|(path, adapter)| {
            let adapter = record::unshared_adapter(adapter.into_record());
            PlacedAdapterRecord { path, adapter }
        });
        LoraRecord {
            adapters: adapters.collect(),
            parameters: record::save(&*self.model, &paths),
            trains: self.trains.into_iter().collect(),
            modules: self.modules,
            described: serde_json::to_string(&self.described).expect("it came from JSON"),
            conv1d: self.conv1d.into_iter().collect(),
        }
    }
}

/// The value on a device, as a constant.
fn moved<B: Backend>(value: TensorPrimitive<B>, device: &B::Device) -> TensorPrimitive<B> {
    match value {
        TensorPrimitive::Float(value) => TensorPrimitive::Float(B::float_to_device(value, device)),
        TensorPrimitive::QFloat(value) => TensorPrimitive::QFloat(B::q_to_device(value, device)),
    }
}

impl<B: AutodiffBackend, M: AutodiffModule<B>> AutodiffModule<B> for Lora<B, M> {
    type InnerModule = Lora<B::InnerBackend, M::InnerModule>;

    fn valid(&self) -> Self::InnerModule {
        let originals = self.originals.iter().map(|(path, value)| {
            let value = match value.clone() {
                TensorPrimitive::Float(value) => TensorPrimitive::Float(B::inner(value)),
                TensorPrimitive::QFloat(value) => TensorPrimitive::QFloat(B::q_inner(value)),
            };
            (path.clone(), value)
        });
        Lora {
            model: Box::new(self.model.valid()),
            trains: self.trains.clone(),
            originals: originals.collect(),
            modules: self.modules.clone(),
            described: self.described.clone(),
            conv1d: self.conv1d.clone(),
            statistics: self.statistics.clone(),
            own: self.own.map(|_| norms::own_inner::<B, M> as fn(&M::InnerModule) -> _),
        }
    }

    fn from_inner(module: Self::InnerModule) -> Self {
        let originals = module.originals.into_iter().map(|(path, value)| {
            let value = match value {
                TensorPrimitive::Float(value) => TensorPrimitive::Float(B::from_inner(value)),
                TensorPrimitive::QFloat(value) => TensorPrimitive::QFloat(B::q_from_inner(value)),
            };
            (path, value)
        });
        let originals: Values<B> = originals.collect();
        let lora = Self {
            model: Box::new(M::from_inner(*module.model)),
            trains: module.trains,
            originals,
            modules: module.modules,
            described: module.described,
            conv1d: module.conv1d,
            statistics: module.statistics,
            own: None,
        };
        // Nobody else has these cells.
        let own = module.own.is_some() || !lora.statistics.is_empty();
        let own = own.then_some(norms::own::<B, M> as fn(&M) -> M);
        norms::remembered(Self { own, ..lora }.refrozen())
    }
}

impl<B, M> HasAutodiffModule<B> for Lora<B::InnerBackend, M>
where
    B: AutodiffBackend,
    M: Module<B::InnerBackend> + HasAutodiffModule<B>,
{
    type TrainModule = Lora<B, M::TrainModule>;
}

impl<B: Backend, M: Module<B> + ModuleDisplay> ModuleDisplayDefault for Lora<B, M> {
    fn content(&self, content: Content) -> Option<Content> {
        content.set_top_level_type("Lora").add("model", &*self.model).optional()
    }

    fn num_params(&self) -> usize {
        Module::num_params(self)
    }
}

impl<B: Backend, M: Module<B> + ModuleDisplay> ModuleDisplay for Lora<B, M> {}

impl<B: Backend, M: Module<B> + ModuleDisplay> fmt::Display for Lora<B, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.format(Default::default()))
    }
}
