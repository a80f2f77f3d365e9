//! An overlay as a Burn module: its parameters are those of the model, and then those of the adapters, each at the
//! path that it would have in a LoRA layer.

use std::{fmt, sync::OnceLock};

use burn::{
    module::{
        AutodiffModule, Content, Devices, HasAutodiffModule, Module, ModuleDisplay,
        ModuleDisplayDefault, ModuleMapper, ModuleVisitor,
    },
    record::Record,
    tensor::backend::{AutodiffBackend, Backend},
};

use super::{
    Overlay,
    slot::{Slot, SlotMut, SlotRef},
};
use crate::{
    adapter::LoraAdapter,
    layer::{
        LoraLayerMut,
        access::{self, ADAPTER, TAG},
    },
    model::PlacedAdapterRecord,
};

/// What a record holds of an [`Overlay`].
#[derive(Record)]
pub struct OverlayRecord<B: Backend, M: Module<B>> {
    /// The model's.
    pub model: M::Record,
    /// The adapters.
    pub adapters: Vec<PlacedAdapterRecord<B>>,
}

impl<B: Backend, M: Module<B>> Overlay<B, M> {
    /// The same with other adapters, made of those that there are.
    fn map_adapters(self, mut change: impl FnMut(LoraAdapter<B>) -> LoraAdapter<B>) -> Self {
        let slots = self.slots.into_iter().map(|Slot { place, adapter }| {
            let adapter = adapter.map(&mut change);
            Slot { place, adapter }
        });
        Self { slots: slots.collect(), composed: OnceLock::new(), ..self }
    }
}

/// The names to enter on the way to a slot's adapter, and their containers.
fn names<B: Backend>(slot: &Slot<B>) -> Vec<(String, &'static str)> {
    let path = slot.place.path.split('.').filter(|name| !name.is_empty());
    let path = path.map(|name| (name.to_owned(), "Struct:Overlay"));
    path.chain([(ADAPTER.to_owned(), TAG)]).collect()
}

impl<B: Backend, M: Module<B>> Module<B> for Overlay<B, M> {
    type Record = OverlayRecord<B, M>;

    fn collect_devices(&self, devices: Devices<B>) -> Devices<B> {
        let devices = self.model.collect_devices(devices);
        self.slots.iter().fold(devices, |devices, slot| slot.adapter.collect_devices(devices))
    }

    fn fork(self, device: &B::Device) -> Self {
        let model = Box::new(self.model.fork(device));
        Self { model, ..self }.map_adapters(|adapter| adapter.fork(device))
    }

    fn to_device(self, device: &B::Device) -> Self {
        let model = Box::new(self.model.to_device(device));
        Self { model, ..self }.map_adapters(|adapter| adapter.to_device(device))
    }

    fn visit<V: ModuleVisitor<B>>(&self, visitor: &mut V) {
        self.model.visit(visitor);
        for slot in &self.slots {
            let names = names(slot);
            names.iter().for_each(|(name, container)| visitor.enter_module(name, container));
            access::provide(&SlotRef { module: &*self.model, slot });
            slot.adapter.visit(visitor);
            names.iter().rev().for_each(|(name, container)| visitor.exit_module(name, container));
        }
    }

    fn map<Map: ModuleMapper<B>>(self, mapper: &mut Map) -> Self {
        let mut model = Box::new(self.model.map(mapper));
        let mut slots = Vec::new();
        for mut slot in self.slots {
            let names = names(&slot);
            names.iter().for_each(|(name, container)| mapper.enter_module(name, container));
            access::provide_mut(&mut SlotMut { module: &mut *model, slot: &mut slot });
            slot.adapter = Module::map(slot.adapter, mapper);
            names.iter().rev().for_each(|(name, container)| mapper.exit_module(name, container));
            slots.push(slot);
        }
        Self { model, slots, composed: OnceLock::new() }
    }

    /// Takes over the recorded model, and the recorded adapters.
    ///
    /// # Panics
    ///
    /// If the record is one of another model.
    fn load_record(self, record: Self::Record) -> Self {
        let device = self.devices().first().cloned().unwrap_or_default();
        let mut overlay = Self {
            model: Box::new(self.model.load_record(record.model)),
            composed: OnceLock::new(),
            ..self
        };
        for PlacedAdapterRecord { path, adapter } in record.adapters {
            let slot = overlay.slots.iter_mut().find(|slot| slot.place.path == path);
            let slot = slot.unwrap_or_else(|| {
                panic!("the record has an adapter of `{path}`, and the model no such weight")
            });
            let adapter = LoraAdapter::from_record(adapter, &device);
            SlotMut { module: &mut *overlay.model, slot }.set_adapter(Some(adapter));
        }
        overlay
    }

    fn into_record(self) -> Self::Record {
        let adapters = self.slots.into_iter().filter_map(|slot| {
            let (path, adapter) = (slot.place.path, slot.adapter?.into_record());
            Some(PlacedAdapterRecord { path, adapter })
        });
        OverlayRecord { adapters: adapters.collect(), model: self.model.into_record() }
    }
}

impl<B: AutodiffBackend, M: AutodiffModule<B>> AutodiffModule<B> for Overlay<B, M> {
    type InnerModule = Overlay<B::InnerBackend, M::InnerModule>;

    fn valid(&self) -> Self::InnerModule {
        let slots = self.slots.iter().map(|Slot { place, adapter }| {
            let (place, adapter) = (place.clone(), adapter.valid());
            Slot { place, adapter }
        });
        Overlay {
            model: Box::new(self.model.valid()),
            slots: slots.collect(),
            composed: OnceLock::new(),
        }
    }

    fn from_inner(module: Self::InnerModule) -> Self {
        let slots = module.slots.into_iter().map(|Slot { place, adapter }| {
            let adapter = AutodiffModule::from_inner(adapter);
            Slot { place, adapter }
        });
        Self {
            model: Box::new(M::from_inner(*module.model)),
            slots: slots.collect(),
            composed: OnceLock::new(),
        }
    }
}

impl<B, M> HasAutodiffModule<B> for Overlay<B::InnerBackend, M>
where
    B: AutodiffBackend,
    M: Module<B::InnerBackend> + HasAutodiffModule<B>,
{
    type TrainModule = Overlay<B, M::TrainModule>;
}

impl<B: Backend, M: Module<B> + ModuleDisplay> ModuleDisplayDefault for Overlay<B, M> {
    fn content(&self, content: Content) -> Option<Content> {
        let content = content.set_top_level_type("Overlay").add("model", &*self.model);
        let adapted = self.slots.iter().filter_map(|slot| Some((slot, slot.adapter.as_ref()?)));
        adapted
            .fold(content, |content, (slot, adapter)| content.add(&slot.place.path, adapter))
            .optional()
    }

    fn num_params(&self) -> usize {
        Module::num_params(self)
    }
}

impl<B: Backend, M: Module<B> + ModuleDisplay> ModuleDisplay for Overlay<B, M> {}

impl<B: Backend, M: Module<B> + ModuleDisplay> fmt::Display for Overlay<B, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.format(Default::default()))
    }
}
