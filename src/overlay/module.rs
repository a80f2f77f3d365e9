//! What Burn asks of a module: the base stays frozen on every trip, and the record holds what trains.

use std::{collections::BTreeSet, fmt};

use burn::{
    module::{
        AutodiffModule, Content, Devices, HasAutodiffModule, Module, ModuleDisplay,
        ModuleDisplayDefault, ModuleMapper, ModuleVisitor,
    },
    record::Record,
    tensor::backend::{AutodiffBackend, Backend},
};

use super::{Lora, slot::Slot};
use crate::{
    LoraAdapter, LoraModule,
    adapter::LoraAdapterRecord,
    layer::{ADAPTER, CONTAINER},
    trained::{self, TrainedRecord},
    walk,
};

/// What a record keeps of a [`Lora`]: what trains, and nothing of the frozen base.
#[derive(Debug, Clone, Record)]
pub struct LoraRecord<B: Backend> {
    /// The adapters.
    pub adapters: Vec<PlacedAdapterRecord<B>>,
    /// The base's parameters that train in full.
    pub trained: Vec<TrainedRecord<B>>,
}

/// An adapter and its place.
#[derive(Debug, Clone, Record)]
pub struct PlacedAdapterRecord<B: Backend> {
    /// The path of the layer.
    pub path: String,
    /// The adapter.
    pub adapter: LoraAdapterRecord<B>,
}

impl<B: Backend, M: Module<B>> Lora<B, M> {
    /// Marks exactly what `trained` names as trainable.
    fn refrozen(self) -> Self {
        let Self { base, slots, trained, has_statistics } = self;
        let base = walk::mark_trainable(base, |path| trained.contains(path));
        Self { base, slots, trained, has_statistics }
    }

    /// The same with other adapters, made of those that there are.
    fn map_adapters(
        self,
        mut change: impl FnMut(&Slot<B>, LoraAdapter<B>) -> LoraAdapter<B>,
    ) -> Self {
        let slots = self.slots.into_iter().map(|mut slot| {
            slot.adapter = slot.adapter.take().map(|adapter| change(&slot, adapter));
            slot
        });
        Self { slots: slots.collect(), ..self }
    }

    /// Marks what trains as the flags of the parameters say; but nothing under an adapter.
    fn with_trained_by_flags(self) -> Self {
        let flagged = walk::visit::<B, M>(&self.base).params.into_iter();
        let mut trained: BTreeSet<_> =
            flagged.filter(|param| param.requires_grad).map(|param| param.path).collect();
        for slot in self.slots.iter().filter(|slot| slot.adapter.is_some()) {
            trained.retain(|path| *path != slot.weight && Some(path) != slot.bias.as_ref());
        }
        Self { trained, ..self }.refrozen()
    }
}

/// The names to enter on the way to a slot's adapter, and their containers.
fn names<B: Backend>(slot: &Slot<B>) -> impl DoubleEndedIterator<Item = (&str, &'static str)> {
    let path = slot.path.split('.').filter(|name| !name.is_empty());
    path.map(|name| (name, "Struct:Lora")).chain([(ADAPTER, CONTAINER)])
}

impl<B: Backend, M: Module<B>> Module<B> for Lora<B, M> {
    type Record = LoraRecord<B>;

    fn collect_devices(&self, devices: Devices<B>) -> Devices<B> {
        let devices = self.base.collect_devices(devices);
        self.slots.iter().fold(devices, |devices, slot| slot.adapter.collect_devices(devices))
    }

    fn fork(self, device: &B::Device) -> Self {
        let base = self.base.fork(device);
        Self { base, ..self }.map_adapters(|_, adapter| adapter.fork(device)).refrozen()
    }

    fn to_device(self, device: &B::Device) -> Self {
        let base = self.base.to_device(device);
        Self { base, ..self }.map_adapters(|_, adapter| adapter.to_device(device)).refrozen()
    }

    fn visit<V: ModuleVisitor<B>>(&self, visitor: &mut V) {
        self.base.visit(visitor);
        for slot in &self.slots {
            names(slot).for_each(|(name, container)| visitor.enter_module(name, container));
            slot.adapter.visit(visitor);
            names(slot).rev().for_each(|(name, container)| visitor.exit_module(name, container));
        }
    }

    fn map<Map: ModuleMapper<B>>(self, mapper: &mut Map) -> Self {
        let base = self.base.map(mapper);
        let mapped = Self { base, ..self }.map_adapters(|slot, adapter| {
            names(slot).for_each(|(name, container)| mapper.enter_module(name, container));
            let adapter = adapter.map(mapper);
            names(slot).rev().for_each(|(name, container)| mapper.exit_module(name, container));
            adapter
        });
        // Only where there are gradients do the flags mean anything.
        let trains = mapped.devices().first().is_some_and(|device| B::ad_enabled(device));
        if trains { mapped.with_trained_by_flags() } else { mapped }
    }

    /// Takes over the adapters of the record, and what it has of the base.
    ///
    /// # Panics
    ///
    /// If the record is that of an overlay over another module.
    fn load_record(self, record: Self::Record) -> Self {
        let mut model = self.detach();
        let device = model.devices().first().cloned().unwrap_or_default();
        let mut layers = model.lora_layers();
        for PlacedAdapterRecord { path, adapter } in record.adapters {
            let layer = layers.0.iter_mut().find(|(known, _)| *known == path);
            let (_, layer) = layer.unwrap_or_else(|| {
                panic!("the record has an adapter of `{path}`, and the module no such layer")
            });
            layer.set_adapter(Some(LoraAdapter::from_record(adapter, &device)));
        }
        drop(layers);
        let paths = record.trained.iter().map(|it| it.path.clone()).collect();
        let base = trained::load(model.base, record.trained);
        Self { base, trained: paths, ..model }.refrozen()
    }

    fn into_record(self) -> Self::Record {
        let trained = trained::save(&self.base, &self.trained);
        let adapters = self.slots.into_iter().filter_map(|slot| {
            let adapter = slot.adapter?.into_record();
            Some(PlacedAdapterRecord { path: slot.path, adapter })
        });
        LoraRecord { adapters: adapters.collect(), trained }
    }
}

impl<B: AutodiffBackend, M: AutodiffModule<B>> AutodiffModule<B> for Lora<B, M> {
    type InnerModule = Lora<B::InnerBackend, M::InnerModule>;

    fn valid(&self) -> Self::InnerModule {
        let slots = self.slots.iter().map(|slot| slot.with(slot.adapter.valid()));
        Lora {
            base: self.base.valid(),
            slots: slots.collect(),
            trained: self.trained.clone(),
            has_statistics: self.has_statistics,
        }
    }

    fn from_inner(module: Self::InnerModule) -> Self {
        let Lora { base, slots, trained, has_statistics } = module;
        let slots = slots.into_iter().map(|mut slot| {
            let adapter = AutodiffModule::from_inner(slot.adapter.take());
            slot.with(adapter)
        });
        let (base, slots) = (M::from_inner(base), slots.collect());
        Self { base, slots, trained, has_statistics }.refrozen()
    }
}

impl<B, M> HasAutodiffModule<B> for Lora<B::InnerBackend, M>
where
    B: AutodiffBackend,
    M: Module<B::InnerBackend> + HasAutodiffModule<B>,
{
    type TrainModule = Lora<B, M::TrainModule>;
}

impl<B: Backend, M: Clone> Clone for Lora<B, M> {
    fn clone(&self) -> Self {
        Self {
            base: self.base.clone(),
            slots: self.slots.clone(),
            trained: self.trained.clone(),
            has_statistics: self.has_statistics,
        }
    }
}

impl<B: Backend, M: Module<B> + ModuleDisplay> ModuleDisplayDefault for Lora<B, M> {
    fn content(&self, content: Content) -> Option<Content> {
        let content = content.set_top_level_type("Lora").add("base", &self.base);
        let adapted = self.slots.iter().filter_map(|slot| Some((slot, slot.adapter.as_ref()?)));
        adapted
            .fold(content, |content, (slot, adapter)| content.add(&slot.path, adapter))
            .optional()
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
