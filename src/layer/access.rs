//! How a walk through a model gets access to the layers in it.
//!
//! Burn's visitors and mappers see parameters, but not the layer that holds them. A walk that needs the
//! layer leaves a *request*, which is a closure, in a thread-local variable when it enters the layer's
//! adapter. The layer's next statement takes the request and calls it with the layer. Nothing else runs
//! in between.

use std::{any::Any, cell::RefCell};

use burn::tensor::backend::Backend;

use super::{LoraLayer, LoraLayerMut, Statistic};

/// The name under which a layer passes its adapter to visitors and mappers, even if it has none.
pub(crate) const ADAPTER: &str = "adapter";

/// The container name that goes with [`ADAPTER`]. No struct can have this name, so no module of another
/// crate is taken for a layer of this crate.
pub(crate) const TAG: &str = "burn-lora layer";

/// The container name with which a [`Statistic`] announces itself to visitors and mappers, just before its value.
pub(crate) const OWN: &str = "burn-lora statistic";

/// A request to read a layer.
pub(crate) type Read<B> = Box<dyn FnOnce(&dyn LoraLayer<B>)>;

/// A request to change a layer.
pub(crate) type Change<B> = Box<dyn FnOnce(&mut dyn LoraLayerMut<B>)>;

/// A request to read a running statistic, or to move it.
pub(crate) type Reach<B> = Box<dyn FnOnce(&Statistic<B>)>;

thread_local! {
    static REQUEST: RefCell<Option<Box<dyn Any>>> = const { RefCell::new(None) };
}

/// Leaves a request for a layer: a [`Read`] if it is being visited, a [`Change`] if it is being mapped. Or a
/// [`Reach`] for a statistic that is being visited.
pub(crate) fn request(request: impl Any) {
    REQUEST.set(Some(Box::new(request)));
}

/// Passes the layer to the [`Read`] of the walk that visits it, if there is one.
pub(crate) fn provide<B: Backend>(layer: &dyn LoraLayer<B>) {
    if let Some(read) = take::<Read<B>>() {
        read(layer);
    }
}

/// Passes the layer to the [`Change`] of the walk that maps it, if there is one.
pub(crate) fn provide_mut<B: Backend>(layer: &mut dyn LoraLayerMut<B>) {
    if let Some(change) = take::<Change<B>>() {
        change(layer);
    }
}

/// Passes the statistic to the [`Reach`] of the walk that visits it, if there is one.
pub(super) fn provide_statistic<B: Backend>(statistic: &Statistic<B>) {
    if let Some(reach) = take::<Reach<B>>() {
        reach(statistic);
    }
}

fn take<R: Any>() -> Option<R> {
    let request = REQUEST.take()?;
    Some(*request.downcast().expect("the walk and the layer are on the same backend"))
}
