//! Putting adapters on a model: fresh ones, those of a set, or into the weights for good.

use std::{borrow::Cow, cell::RefCell, collections::BTreeSet, rc::Rc};

use burn::{
    module::{Module, Param},
    tensor::{ElementConversion, Tensor, backend::Backend},
};

use super::{Lora, fully_trained, names, norms, quantize, record, saved};
use crate::{
    adapter::{Tie, WeightLayout, is_part},
    adapters::LoraAdapters,
    config::{LoraConfig, Plan},
    error::{LoraError, Mismatch, named},
    layer::{Capabilities, LoraLayer, fresh as fresh_adapter, is_quantized},
    pattern::{Pattern, require_matches},
    traverse::{self, Place, Visit, stock_weights},
};

/// What has to be known of a layer before it gets an adapter.
struct Layer {
    path: String,
    shape: [usize; 2],
    layout: WeightLayout,
    capabilities: Capabilities,
    is_adapted: bool,
}

fn layers<B: Backend, M: Module<B>>(model: &M) -> Vec<Layer> {
    traverse::layers(model, |path, layer: &dyn LoraLayer<B>| Layer {
        path: path.to_owned(),
        shape: layer.weight_shape(),
        layout: layer.weight_layout(),
        capabilities: layer.capabilities(),
        is_adapted: layer.adapter().is_some(),
    })
}

/// An error if the backend cannot compute with the weights of these layers, or if the model holds adapters that are of
/// no layer.
fn require_usable<B: Backend, M: Module<B>>(
    model: &M,
    is_layer: impl Fn(&str) -> bool,
) -> Result<(), LoraError> {
    struct Check<F> {
        is_layer: F,
        result: Result<(), LoraError>,
        /// The paths of adapters that no walk finds.
        loose: BTreeSet<String>,
    }
    impl<B: Backend, F: Fn(&str) -> bool> Visit<B> for Check<F> {
        fn param<const D: usize>(&mut self, place: &Place, param: &Param<Tensor<B, D>>) {
            if place.adapted_layer().is_none() && is_part(place.container()) {
                self.loose.insert(place.module().to_owned());
            }
            let (dtype, device) = (param.dtype(), param.lazy_device());
            let problem = if is_quantized(dtype) {
                B::ad_enabled(&device).then(|| {
                    "its weight is quantized, and Burn has no autodiff for that: use the model \
                     without autodiff, or dequantize the weight"
                        .to_owned()
                })
            } else {
                (!B::supports_dtype(&device, dtype)).then(|| {
                    let name = B::name(&device);
                    format!(
                        "its weight is in {dtype:?}, which the backend `{name}` does not compute \
                         with: cast it to F32"
                    )
                })
            };
            let Some(problem) = problem else { return };
            let mut paths = [place.module(), place.path()].into_iter();
            if place.adapted_layer().is_none()
                && let Some(path) = paths.find(|path| (self.is_layer)(path))
            {
                self.result = Err(LoraError::Unusable { path: path.to_owned(), problem });
            }
        }
    }
    let mut check = Check { is_layer, result: Ok(()), loose: BTreeSet::new() };
    traverse::visit(model, &mut check);
    match check.loose.is_empty() {
        true => check.result,
        false => Err(LoraError::LooseAdapters { paths: check.loose.into_iter().collect() }),
    }
}

/// The model with fresh adapters on the layers that `config` chooses.
pub(super) fn fresh<B: Backend, M: Module<B>>(
    lora: &Lora<B, M>,
    config: &LoraConfig,
) -> Result<Lora<B, M>, LoraError> {
    let layers = layers::<B, _>(lora);
    let plan = resolve(lora, config, &layers)?;
    norms::require_frozen(lora)?;
    let saved = plan.modules_to_save();
    // A walk is most of the time that attaching takes.
    let params = if saved.is_empty() { vec![] } else { traverse::params(lora) };
    let is_saved = |path: &str| saved.iter().any(|module| module.covers(path));
    for param in params.iter().filter(|it| !it.in_adapter && is_saved(&it.path)) {
        if param.is_base_of(|path| plan.contains(path)) {
            let field = MODULES_TO_SAVE;
            let problem = format!("names `{}` of an adapted layer, which is frozen", param.path);
            return Err(LoraError::InvalidConfig { field, problem });
        }
    }

    let adapted = layers.iter().filter(|it| it.is_adapted && plan.contains(&it.path));
    let paths: Vec<_> = adapted.map(|it| it.path.clone()).collect();
    if !paths.is_empty() {
        return Err(LoraError::AlreadyAttached { paths });
    }
    require_usable(&*lora.model, |path| plan.contains(path))?;
    for layer in layers.iter().filter(|it| plan.contains(&it.path)) {
        for (field, wanted, takes) in [
            ("bias", config.bias, layer.capabilities.bias),
            ("dropout", config.dropout > 0.0, layer.capabilities.dropout),
        ] {
            if wanted && !takes {
                let problem =
                    format!("is set, and the adapter of `{}` cannot have one", layer.path);
                return Err(LoraError::InvalidConfig { field, problem });
            }
        }
        if config.freeze_a && layer.layout == WeightLayout::Embedding {
            let problem =
                format!("is set, and A of the embedding `{}` is zero at first", layer.path);
            return Err(LoraError::InvalidConfig { field: "freeze_a", problem });
        }
    }
    let plan = Rc::new(plan);
    if config.reads_weight() {
        require_finite(lora, plan.clone())?;
    }
    let configs = plan.clone();
    let lora = lora.clone().unshared().change_layers(move |path, layer| {
        if let Some(config) = configs.get(path) {
            layer.set_adapter(Some(fresh_adapter(config, layer)));
        }
    });
    train_in_full(lora, plan.modules_to_save(), MODULES_TO_SAVE)
}

/// Fails if a weight that initial values are computed from is not finite.
fn require_finite<B: Backend, M: Module<B>>(
    lora: &Lora<B, M>,
    plan: Rc<Plan>,
) -> Result<(), LoraError> {
    let found = traverse::layers(lora, move |path, layer: &dyn LoraLayer<B>| {
        let is_bad = || !layer.weight_matrix().is_finite().all().into_scalar().elem::<bool>();
        (plan.contains(path) && is_bad()).then(|| path.to_owned())
    });
    match found.into_iter().flatten().next() {
        Some(path) => {
            let problem =
                "it holds NaN or infinite values, of which no initial values can be computed";
            Err(LoraError::Unusable { path, problem: problem.to_owned() })
        }
        None => Ok(()),
    }
}

/// What each layer of the model gets. The error for a model without LoRA layers says what keeps it from being
/// adapted.
fn resolve<B: Backend, M: Module<B>>(
    lora: &Lora<B, M>,
    config: &LoraConfig,
    layers: &[Layer],
) -> Result<Plan, LoraError> {
    let paths: Vec<_> = layers.iter().map(|it| it.path.clone()).collect();
    config.resolve(&paths).map_err(|error| {
        let LoraError::Unmatched { field, patterns, .. } = &error else { return error };
        if let Err(loose) = require_usable(&*lora.model, |_| false) {
            return loose;
        }
        if patterns.is_empty() && !paths.is_empty() {
            return error;
        }
        // Those that mean LoRA layers, or modules with some, are told so.
        let mut wanted = Pattern::all(patterns).unwrap_or_default();
        wanted.retain(|it| !paths.iter().any(|path| it.covers(path)));
        let is_wanted = |path: &str| match patterns.is_empty() {
            true => true,
            false => wanted.iter().any(|it| it.covers(path)),
        };
        let stock = stock_weights::<B, M>(&*lora.model).into_iter().map(|it| it.path);
        let stock = stock.filter(|path| !paths.contains(path) && is_wanted(path));
        let stock: Vec<_> = stock.collect();
        if !stock.is_empty() {
            return LoraError::StockLayers { paths: stock };
        }
        let params = traverse::params(lora).into_iter();
        let mut others =
            params.filter(|it| !it.is_base_of(|path| paths.iter().any(|it| it == path)));
        match others.find(|it| *field == "targets" && is_wanted(&it.path)) {
            Some(param) => {
                let problem = format!(
                    "names `{}`, which is no weight matrix: train it in full by `modules_to_save`",
                    param.path
                );
                LoraError::InvalidConfig { field: "targets", problem }
            }
            None => error,
        }
    })
}

/// The field of the configuration that names what trains in full.
pub(super) const MODULES_TO_SAVE: &str = "modules_to_save";

/// The model in which exactly its adapters and what the patterns name train. `field` is the field or the argument
/// that holds the patterns.
pub(super) fn train_in_full<B: Backend, M: Module<B>>(
    mut lora: Lora<B, M>,
    patterns: &[Pattern],
    field: &'static str,
) -> Result<Lora<B, M>, LoraError> {
    if patterns.is_empty() {
        return Ok(lora.training(&BTreeSet::new()));
    }
    let adapted: BTreeSet<_> = record::adapters(&lora).into_iter().map(|(path, _)| path).collect();
    let is_adapted = |path: &str| adapted.contains(path);
    let cannot_train = |path: &str| {
        let problem = format!("names `{path}`, which is quantized, and cannot train");
        match field {
            MODULES_TO_SAVE => LoraError::InvalidConfig { field, problem },
            argument => LoraError::InvalidArgument { argument, problem },
        }
    };
    if let Some(path) = quantize::meant::<B, _>(&lora, patterns, is_adapted) {
        return Err(cannot_train(&path));
    }
    let params = traverse::params(&lora).into_iter().filter(|it| !it.in_adapter);
    let params: Vec<_> = params.collect();
    let paths: Vec<_> = params.iter().map(|param| param.path.clone()).collect();
    require_matches(field, patterns, &paths, Pattern::covers)?;

    // The base under an adapter is a constant, whatever its flags say.
    let covered = params.iter().filter_map(|param| {
        let module = patterns.iter().find_map(|pattern| pattern.covering(&param.path))?;
        (!param.is_base_of(is_adapted)).then_some((param, module))
    });
    let mut covered: Vec<_> = covered.collect();
    let is_covered = |path: &str| covered.iter().any(|(param, _)| param.path == path);
    let mut moving = norms::moving(&params, is_covered);
    moving.retain(|param| !is_covered(&param.path));
    covered.extend(moving.into_iter().map(|param| (param, param.path.as_str())));
    if let Some((param, _)) = covered.iter().find(|(param, _)| param.is_quantized) {
        return Err(cannot_train(&param.path));
    }
    let trains: BTreeSet<_> = covered.iter().map(|(param, _)| param.path.clone()).collect();
    saved::note(&mut lora.modules, &params, &covered);
    Ok(lora.training(&trains))
}

/// The model, which must not have any adapters, with those of `set`.
pub(super) fn set<B: Backend, M: Module<B>>(
    bare: &Lora<B, M>,
    set: &LoraAdapters<B>,
) -> Result<Lora<B, M>, LoraError> {
    let layers = layers::<B, _>(bare);
    let set = &*untied(set, &layers);
    // A walk is most of the time that this takes.
    let needs_params = !set.extras.is_empty() || set.asks_for_parameters();
    let mut params = if needs_params { traverse::params::<B, M>(&*bare.model) } else { vec![] };
    params.retain(|it| !it.in_adapter);
    let mut mismatch = Mismatch::default();
    let misshapen = |name: &str, expected: &dyn std::fmt::Debug, found: &dyn std::fmt::Debug| {
        format!("{} (expected {expected:?}, found {found:?})", named(name))
    };
    // The parameters that the set brings along, and whether they train: not those under an adapter.
    let mut brought = BTreeSet::new();
    let mut trains = BTreeSet::new();
    let stays = norms::staying(bare, set, &params);
    // Those that are stored as a `Conv1D` of Hugging Face.
    let mut conv1d = BTreeSet::new();
    for (name, extra) in &set.extras {
        let Some(param) = params.iter().find(|param| param.torch_name == *name) else {
            // The table of a tied head is in the file once more, under the name of the head.
            let known = |it: &str| params.iter().any(|param| param.torch_name == it);
            let mut others = set.extras.iter().filter(|(name, _)| known(name));
            if set.trains_in_full(name) || !others.any(|(_, it)| it.equals(extra)) {
                mismatch.unexpected.push(name.clone());
            }
            continue;
        };
        if param.is_shared && bare.own.is_none() {
            if stays.contains(&param.path) {
                continue;
            }
            return Err(LoraError::SharedStatistics { paths: vec![param.module.clone()] });
        }
        let mut shape = extra.shape.clone();
        if extra.may_be_conv1d && param.transposed {
            if shape[0] == shape[1] {
                return Err(ambiguous(name));
            }
            if shape != param.torch_shape {
                shape.swap(0, 1);
                conv1d.insert(name.clone());
            }
        }
        if param.torch_shape != shape {
            mismatch.misshapen.push(misshapen(name, &param.torch_shape, &extra.shape));
            continue;
        }
        brought.insert(param.path.clone());
        let is_base = param.is_base_of(|path| set.get(path).is_some());
        if set.trains_in_full(name) && !is_base && !stays.contains(&param.path) {
            trains.insert(param.path.clone());
        }
    }
    // What the base holds there is not what was trained.
    let left_out = params.iter().filter(|param| {
        !param.is_base_of(|path| set.get(path).is_some())
            && set.must_hold(&param.torch_name)
            && !set.extras.contains_key(&param.torch_name)
    });
    mismatch
        .missing
        .extend(left_out.map(|param| format!("{} (modules_to_save)", param.torch_name)));
    let unknown = set.adapters.keys().filter(|path| !layers.iter().any(|it| it.path == **path));
    let unknown: Vec<_> = unknown.cloned().collect();
    if !unknown.is_empty() {
        let shapes = layers.iter().map(|it| (it.path.as_str(), it.shape)).collect();
        mismatch.hint = names::hint(&unknown, set, &shapes);
        let stock: BTreeSet<_> =
            stock_weights::<B, M>(&*bare.model).into_iter().map(|it| it.path).collect();
        mismatch.unexpected.extend(unknown.into_iter().map(|path| match stock.contains(&path) {
            true => format!("{} (a stock module: see `Lora::overlay`)", named(&path)),
            false => named(&path).to_owned(),
        }));
    }
    // PyTorch has the weights of linear layers transposed.
    let linear: BTreeSet<_> =
        params.iter().filter(|it| it.transposed).map(|it| it.module.as_str()).collect();
    for Layer { path, shape, layout, capabilities, .. } in &layers {
        match set.get(path) {
            Some(adapter) if adapter.shape() != *shape => {
                mismatch.misshapen.push(misshapen(path, shape, &adapter.shape()));
            }
            Some(adapter) if !adapter.layout.fits(layout) => {
                mismatch.misshapen.push(misshapen(path, layout, &adapter.layout));
            }
            Some(adapter) if adapter.bias.is_some() && !capabilities.bias => {
                mismatch.unexpected.push(format!("{} (a bias)", named(path)));
            }
            None if set.is_target(path, linear.contains(path.as_str())) => {
                mismatch.missing.push(named(path).to_owned())
            }
            _ => {}
        }
    }
    require_usable(&*bare.model, |path| set.get(path).is_some())?;
    norms::require_frozen(bare)?;
    let paths: Vec<_> = layers.into_iter().map(|it| it.path).collect();
    mismatch.unmatched_targets = set.unmatched_targets(&paths);
    mismatch.into_result("the set of adapters")?;

    let mut adapters = set.adapters.clone();
    let mut lora = bare.clone().unshared().change_layers(move |path, layer| {
        if let Some(adapter) = adapters.remove(path) {
            layer.set_adapter(Some(adapter.fork(&layer.device())));
        }
    });
    lora.originals.extend(traverse::values(&*lora.model, &brought));
    let mut extras = set.extras.clone();
    for name in &conv1d {
        extras.entry(name.clone()).and_modify(|extra| *extra = extra.transposed());
    }
    lora.model = Box::new(fully_trained::write(*lora.model, &extras));
    lora.conv1d = conv1d;
    lora.modules = set.modules_to_save.clone();
    lora = norms::remembered(lora);
    lora.described = set.config.clone();
    Ok(lora.training(&trains))
}

/// The set for a model with these layers, with regard to a tied head: if the model has a layer for the
/// head, that gets its own adapter. If it does not, the head's adapter is not needed.
fn untied<'a, B: Backend>(set: &'a LoraAdapters<B>, layers: &[Layer]) -> Cow<'a, LoraAdapters<B>> {
    let heads = set.adapters.iter().filter(|(_, adapter)| adapter.tie == Tie::Repeats);
    let heads: Vec<_> = heads.map(|(path, _)| path.clone()).collect();
    if heads.is_empty() {
        return Cow::Borrowed(set);
    }
    let mut set = set.clone();
    let (own, repeated): (Vec<_>, Vec<_>) =
        heads.into_iter().partition(|head| layers.iter().any(|it| it.path == *head));
    for head in repeated {
        set.adapters.remove(&head);
    }
    if !own.is_empty() {
        for adapter in set.adapters.values_mut() {
            let is_table = adapter.layout == WeightLayout::Embedding;
            adapter.tie = if is_table { Tie::Leaves } else { Tie::Moves };
        }
    }
    Cow::Owned(set)
}

/// A square weight may be stored either way.
fn ambiguous(name: &str) -> LoraError {
    LoraError::Unsupported {
        file: "the set of adapters".to_owned(),
        field: name.to_owned(),
        reason: Some(
            "the file says `fan_in_fan_out`, and the weight is square, so that it may be a \
                 `Conv1D`'s or a `Linear`'s, which is its transpose; store it in the file as a \
                 `Linear` has it, `[d_output, d_input]`, with `fan_in_fan_out` false"
                .to_owned(),
        ),
    }
}

/// The model with its adapters in its weights.
pub(super) fn merged<B: Backend, M: Module<B>>(lora: Lora<B, M>) -> Result<M, LoraError> {
    let not_finite = Rc::new(RefCell::new(None));
    let failed = not_finite.clone();
    let lora = lora.change_layers(move |path, layer| {
        if failed.borrow().is_none() && !layer.merge_adapter() {
            failed.replace(Some(path.to_owned()));
        }
    });
    match not_finite.take() {
        Some(path) => Err(LoraError::NotFinite { path }),
        None => Ok(*lora.model),
    }
}
