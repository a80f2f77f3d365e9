//! Adapters that start as what rounding took from the weights.

use std::collections::BTreeMap;

use burn::{
    module::{Module, Param},
    tensor::{ElementConversion, Tensor, backend::Backend},
};

use super::{Lora, LoraModule, QuantizeConfig, norms};
use crate::{
    adapter::LoraAdapter,
    config::{Init, LoraConfig},
    error::LoraError,
    layer::LoraLayer,
    tensors::frozen,
    traverse,
};

pub(super) fn attach<B: Backend, M: Module<B>>(
    lora: &Lora<B, M>,
    to: &QuantizeConfig,
    config: &LoraConfig,
    iterations: usize,
) -> Result<Lora<B, M>, LoraError> {
    assert!(iterations > 0, "LoftQ needs at least one iteration, got 0");
    norms::require_frozen(lora)?;
    let bare = lora.bare();
    let base = bare.clone().into_inner();
    // The updates alone: what trains in full is put on by `attach`.
    let alone = LoraConfig { modules_to_save: Vec::new(), ..config.clone() };
    let (adapted, _) = lora.quantize(to.clone())?;
    let mut quantized = adapted.bare().into_inner();
    let mut updates = quantized.extract(&base, &alone)?.adapters;
    for _ in 1..iterations {
        let rest: M = bare.switch(&updates.scaled(-1.0))?.merge()?;
        quantized = rest.quantize(to.clone())?.0;
        updates = quantized.extract(&base, &alone)?.adapters;
    }
    let weights = traverse::layers(&quantized, |path, layer: &dyn LoraLayer<B>| {
        Some((path.to_owned(), layer.quantized()?.clone()))
    });
    let weights: BTreeMap<_, _> = weights.into_iter().flatten().collect();
    let adapted = adapted.change_layers(move |path, layer| {
        if let Some(weight) = weights.get(path) {
            assert!(layer.set_quantized(weight.clone()), "`{path}` was quantized before");
        }
    });
    // LoftQ has initial values of its own.
    let lora = adapted.attach(&config.clone().with_init(Init::default()))?;
    Ok(lora.change_layers(move |path, layer| {
        let (Some(adapter), Some(update)) = (layer.adapter(), updates.get(path)) else { return };
        let (adapter, update) = (adapter.clone(), update.clone());
        let is_zero = |factor: &Param<Tensor<B, 2>>| {
            factor.val().abs().max().into_scalar().elem::<f64>() == 0.0
        };
        // Two factors of zero would never learn.
        if !is_zero(&update.a) {
            let adapter = started(adapter, &update);
            let adapter = match adapter.magnitude {
                Some(_) => adapter.with_magnitude(layer.weight_matrix()),
                None => adapter,
            };
            layer.set_adapter(Some(adapter));
        }
    }))
}

/// The adapter with the factors of `update`, whose scale is 1, divided so that its own scale gives the same.
fn started<B: Backend>(adapter: LoraAdapter<B>, update: &LoraAdapter<B>) -> LoraAdapter<B> {
    // A small layer has fewer directions than the adapter was asked for.
    let scale = adapter.scaling.scale(adapter.alpha, update.rank());
    let root = scale.abs().sqrt();
    let put = |param: Param<Tensor<B, 2>>, value: &Param<Tensor<B, 2>>, by: f64| {
        let value = frozen(value).div_scalar(by);
        param.map(|it| value.set_require_grad(it.is_require_grad()))
    };
    LoraAdapter {
        a: put(adapter.a, &update.a, root),
        b: put(adapter.b, &update.b, root * scale.signum()),
        ..adapter
    }
}
