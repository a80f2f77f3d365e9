//! How a walk through a model gets hold of the layers in it.
//!
//! Burn's visitors and mappers are shown parameters, and never the layer that holds them. So a walk
//! that wants the layer leaves a letter when it is told that it enters the layer's adapter, and the
//! layer takes it in its very next statement. Nothing else runs in between, and a letter never
//! leaves its thread.

use std::{any::Any, cell::RefCell};

use burn::tensor::backend::Backend;

use super::LoraLayer;

/// The name under which a layer shows its adapter, there or not, to visitors and mappers.
pub(crate) const ADAPTER: &str = "adapter";

/// The container that goes with [`ADAPTER`]. No struct can have this name, so that no module of a
/// user's is taken for a layer of this crate.
pub(crate) const TAG: &str = "burn-lora layer";

/// What a walk wants to read of a layer.
pub(crate) type Look<B> = Box<dyn FnOnce(&dyn LoraLayer<B>)>;

/// What a walk does to a layer.
pub(crate) type Change<B> = Box<dyn FnOnce(&mut dyn LoraLayer<B>)>;

thread_local! {
    static LETTER: RefCell<Option<Box<dyn Any>>> = const { RefCell::new(None) };
}

/// Leaves a [`Look`] for a layer that is being visited, or a [`Change`] for one that is being mapped.
pub(crate) fn send(letter: impl Any) {
    LETTER.set(Some(Box::new(letter)));
}

/// Shows the layer to the walk that visits it, if that has asked.
pub(crate) fn answer_look<B: Backend>(layer: &dyn LoraLayer<B>) {
    if let Some(look) = take::<Look<B>>() {
        look(layer);
    }
}

/// Lets the walk that maps the layer change it, if that has asked.
pub(crate) fn answer_change<B: Backend>(layer: &mut dyn LoraLayer<B>) {
    if let Some(change) = take::<Change<B>>() {
        change(layer);
    }
}

fn take<L: Any>() -> Option<L> {
    let letter = LETTER.take()?;
    Some(*letter.downcast().expect("the walk and the layer are on the same backend"))
}
