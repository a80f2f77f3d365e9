//! The adapters of a text.

use burn::tensor::backend::Backend;
use burn_lora::{
    LoraLinear,
    decode::{TableUpdate, Update},
};

use super::has_halves;
use crate::llama::{
    Layer, Llama,
    matrices::{LINEAR, place},
};

/// A set of adapters in the memory of the host.
#[derive(Clone, Debug)]
pub struct HostSet {
    /// Of each layer, by the names in [`LINEAR`].
    pub(super) layers: Vec<[Option<Update>; LINEAR.len()]>,
    pub(super) table: Option<TableUpdate>,
    pub(super) head: Option<Update>,
}

impl HostSet {
    /// The adapters of a model, for a decoder that is as exact. `None` with [DoRA](burn_lora::LoraConfig::dora)'s
    /// magnitudes.
    pub fn of<B: Backend>(adapted: &Llama<B>, exact: bool) -> Option<Self> {
        let update = |layer: &LoraLinear<B>| match layer.adapter() {
            Some(adapter) => Update::of(adapter, has_halves(layer.quantized(), exact)).map(Some),
            None => Some(None),
        };
        let of_layer = |layer: &Layer<B>| {
            let mut updates = [const { None }; LINEAR.len()];
            for (path, linear) in layer.linear() {
                updates[place(path)] = update(linear)?;
            }
            Some(updates)
        };
        let table = &adapted.model.embed_tokens;
        let table = match table.adapter() {
            Some(adapter) => Some(TableUpdate::of(adapter, has_halves(table.quantized(), exact))?),
            None => None,
        };
        let head = match &adapted.lm_head {
            Some(head) => update(head)?,
            None => None,
        };
        let layers = adapted.model.layers.iter().map(of_layer).collect::<Option<_>>()?;
        Some(Self { layers, table, head })
    }
}
