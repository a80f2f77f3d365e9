//! Whole-model operations.

mod layers;

use std::collections::{BTreeMap, BTreeSet};

use burn::{module::Module, tensor::backend::Backend};

use crate::{
    Approximation, LayerReport, LoraAdapter, LoraAdapters, LoraConfig, LoraError, LoraLayer,
    Merged, ParameterReport,
    adapter::at_least_f32,
    adapters::low_rank,
    error::Mismatch,
    layer::fresh,
    pattern::{Pattern, require_matches},
    walk,
};

use layers::{listed, named, paths};

pub use layers::LoraLayers;

/// A model with layers that can carry adapters.
///
/// A model says once which layers those are, and gets every operation on the whole of it:
///
/// ```
/// use burn::{module::Module, nn::LinearConfig, tensor::{Tensor, backend::Backend}};
/// use burn_lora::{LoraConfig, LoraLayers, LoraLinear, LoraModule};
///
/// #[derive(Module, Debug)]
/// struct Mlp<B: Backend> {
///     fc1: LoraLinear<B>,
///     fc2: LoraLinear<B>,
/// }
///
/// impl<B: Backend> LoraModule<B> for Mlp<B> {
///     fn lora_layers(&mut self) -> LoraLayers<'_, B> {
///         LoraLayers::new().with("fc1", &mut self.fc1).with("fc2", &mut self.fc2)
///     }
/// }
///
/// # fn main() -> Result<(), burn_lora::LoraError> {
/// type B = burn::backend::Autodiff<burn::backend::Flex>;
/// let device = Default::default();
/// let model: Mlp<B> = Mlp {
///     fc1: LinearConfig::new(784, 256).init(&device).into(),
///     fc2: LinearConfig::new(256, 10).init(&device).into(),
/// };
/// let adapted = model.attach(&LoraConfig::new(8, 16.0).with_targets(["fc1"]))?;
/// assert_eq!(adapted.parameters().trainable, 8 * (784 + 256));
/// let merged = adapted.merge()?;
/// # Ok(())
/// # }
/// ```
///
/// Models are values: each operation returns a new one and leaves `self` as it was, also when it
/// fails. Weights are shared, not copied, until they change. A parameter that was never used draws
/// its value when its model is first operated on, so that all models made from it agree.
///
/// # Panics
///
/// Every operation panics if [`lora_layers`](Self::lora_layers) forgets a layer or gives it another
/// name than its field has, and says which.
pub trait LoraModule<B: Backend>: Module<B> {
    /// Lists the fields that can carry adapters, or hold modules that can, by their names.
    fn lora_layers(&mut self) -> LoraLayers<'_, B>;

    /// The name that the module or parameter at `path` has in [`LoraAdapters`] and their files: the
    /// path itself, unless this is overridden.
    ///
    /// A model whose twin in Python calls its modules otherwise translates here, and exchanges
    /// adapters with PEFT all the same. Parameters of norms come under PyTorch's names, `weight` and
    /// `bias`. Patterns in a [`LoraConfig`] mean the model's own paths, as ever. Of nested models the
    /// outermost is asked. Two layers or parameters of one name are refused
    /// with a panic when a model's adapters are taken or switched.
    fn peft_name(path: &str) -> String {
        path.to_owned()
    }

    /// The model with fresh adapters on the layers that `config` chooses. Everything but the
    /// adapters and `config.modules_to_save` is frozen.
    ///
    /// # Errors
    ///
    /// If `config` is [invalid](LoraConfig::validate), if one of its patterns matches nothing, if a
    /// chosen layer has an adapter already or cannot take a bias or a dropout that `config` asks for, or if
    /// `config.modules_to_save` names a parameter of a chosen layer, which is frozen.
    fn attach(&self, config: &LoraConfig) -> Result<Self, LoraError> {
        config.validate()?;
        let mut model = freeze(self, &config.modules_to_save, "modules_to_save")?;
        let params = walk::visit(&model).params;
        let mut layers = listed(&mut model);
        let chosen = choose(config, &paths(&layers))?;
        let extras = Pattern::all(&config.modules_to_save)?;
        let frozen = params.iter().find(|param| {
            !param.in_adapter
                && chosen.iter().any(|layer| within(layer, &param.path))
                && extras.iter().any(|extra| extra.covers(&param.path))
        });
        if let Some(param) = frozen {
            let field = "modules_to_save";
            let problem = format!("names `{}` of an adapted layer, which is frozen", param.path);
            return Err(LoraError::InvalidConfig { field, problem });
        }
        layers.retain(|(path, _)| chosen.contains(path));

        let adapted = layers.iter().filter(|(_, layer)| layer.adapter().is_some());
        let paths: Vec<_> = adapted.map(|(path, _)| path.clone()).collect();
        if !paths.is_empty() {
            return Err(LoraError::AlreadyAttached { paths });
        }
        for (field, wanted, takes) in [
            ("bias", config.bias, (|it| it.takes_bias()) as fn(&dyn LoraLayer<B>) -> bool),
            ("dropout", config.dropout > 0.0, |it| it.takes_dropout()),
        ] {
            if let Some((path, _)) = layers.iter().find(|(_, layer)| wanted && !takes(&**layer)) {
                let problem = format!("is set, and the adapter of `{path}` cannot have one");
                return Err(LoraError::InvalidConfig { field, problem });
            }
        }
        for (path, mut layer) in layers {
            let adapter = fresh(&config.for_layer(&path)?, &*layer);
            layer.set_adapter(Some(adapter));
        }
        Ok(model)
    }

    /// The model without its adapters: the base as it was before they were attached, and still
    /// frozen. What was trained in full beside them stays as it is; the originals are in the model
    /// that the adapters were put on.
    fn detach(&self) -> Self {
        let mut model = initialized(self);
        for (_, mut layer) in listed(&mut model) {
            layer.set_adapter(None);
        }
        model
    }

    /// The model's adapters as a value, along with what `config.modules_to_save` names: what was
    /// trained, and nothing else. Tensors are shared, not copied.
    ///
    /// # Errors
    ///
    /// If a pattern of `config.modules_to_save` is invalid or matches nothing, or covers running
    /// statistics of a batch norm, which Burn shares between a model and its clones.
    fn adapters(&self, config: &LoraConfig) -> Result<LoraAdapters<B>, LoraError> {
        let mut model = initialized(self);
        let patterns = Pattern::all(&config.modules_to_save)?;
        let params = walk::visit(&model).params;
        let paths: Vec<_> = params.iter().map(|param| param.path.clone()).collect();
        require_matches("modules_to_save", &patterns, &paths, Pattern::covers)?;

        let wanted = |path: &str| patterns.iter().any(|pattern| pattern.covers(path));
        let mut statistics = params.iter().filter(|param| param.is_statistic);
        if let Some(statistic) = statistics.find(|param| wanted(&param.path)) {
            return Err(running_statistic(&statistic.path));
        }
        let extras = walk::read_extras(&model, &wanted, Self::peft_name);
        let own = params.iter().filter(|param| !param.in_adapter);
        let modules = own.filter_map(|param| {
            let module = patterns.iter().find_map(|pattern| pattern.covering(&param.path))?;
            // A norm's parameters by themselves go by PyTorch's names.
            let name = if module == param.path { &param.torch_name } else { module };
            Some(Self::peft_name(name))
        });
        let modules: BTreeSet<_> = modules.collect();
        let adapters = named(&mut model).into_iter();
        let adapters = adapters.filter_map(|(path, layer)| Some((path, layer.adapter()?.clone())));
        let mut set = LoraAdapters::new(adapters);
        set.extras = extras;
        set.modules_to_save = modules.into_iter().collect();
        Ok(set)
    }

    /// The model with exactly these adapters, and with the parameters that were trained in full
    /// along with them; adapters that it had are taken off. No weight of the base is touched or
    /// copied. As after [`attach`](Self::attach), only what was put on trains.
    ///
    /// Biases of adapted layers that a file brings along (PEFT's `bias`) are put on, but do not train
    /// any further.
    ///
    /// To switch between sets that hold different modules trained in full, switch each on the base,
    /// which has the originals.
    ///
    /// # Errors
    ///
    /// [`LoraError::Mismatch`], listing every adapter and parameter that the model has no place for,
    /// or one of another shape, and every layer that the adapters' configuration means and that they
    /// leave out. [`LoraError::Unsupported`] if there are running statistics of a batch norm among
    /// them.
    fn switch(&self, adapters: &LoraAdapters<B>) -> Result<Self, LoraError> {
        let mut model = initialized(self);
        let mut mismatch = Mismatch::default();
        let params = walk::visit(&model).params;
        for (name, extra) in &adapters.extras {
            let mut params = params.iter().filter(|param| !param.in_adapter);
            match params.find(|param| Self::peft_name(&param.torch_name) == *name) {
                None => mismatch.unexpected.push(name.clone()),
                Some(param) if param.is_statistic => return Err(running_statistic(name)),
                Some(param) if param.torch_shape != extra.shape => {
                    let (expected, found) = (&param.torch_shape, &extra.shape);
                    let text = format!("{name} (expected {expected:?}, found {found:?})");
                    mismatch.misshapen.push(text);
                }
                Some(_) => {}
            }
        }
        let layers = named(&mut model);
        let known = |path: &str| layers.iter().any(|(it, _)| it == path);
        for path in adapters.adapters.keys().filter(|path| !known(path)) {
            mismatch.unexpected.push(path.clone());
        }
        for (path, layer) in &layers {
            match adapters.get(path) {
                Some(adapter) if adapter.shape() != layer.weight_shape() => {
                    let (expected, found) = (layer.weight_shape(), adapter.shape());
                    let text = format!("{path} (expected {expected:?}, found {found:?})");
                    mismatch.misshapen.push(text);
                }
                Some(adapter) if !adapter.layout.fits(&layer.weight_layout()) => {
                    let (expected, found) = (layer.weight_layout(), &adapter.layout);
                    let text = format!("{path} (expected {expected:?}, found {found:?})");
                    mismatch.misshapen.push(text);
                }
                Some(adapter) if adapter.bias.is_some() && !layer.takes_bias() => {
                    mismatch.unexpected.push(format!("{path} (a bias)"));
                }
                None if adapters.targets.as_ref().is_some_and(|it| it.matches(path)) => {
                    mismatch.missing.push(path.clone());
                }
                _ => {}
            }
        }
        if let Some(targets) = &adapters.targets {
            let paths = layers.iter().map(|(path, _)| path.as_str());
            mismatch.unmatched_targets = targets.unmatched(paths);
        }
        mismatch.into_result("the set of adapters")?;

        for (path, mut layer) in layers {
            let adapter = adapters.get(&path).cloned();
            let device = layer.device();
            layer.set_adapter(adapter.map(|adapter| adapter.fork(&device)));
        }
        Ok(walk::write_extras(model, &adapters.extras, Self::peft_name))
    }

    /// Adapters that turn this model into `tuned`, a version of it that was trained in full, as well
    /// as the ranks in `config` allow: the best approximation of the difference of each weight that
    /// `config` chooses. Biases, and layers that were not chosen, are left out; what
    /// `config.modules_to_save` names is taken from `tuned`.
    ///
    /// # Errors
    ///
    /// As for [`attach`](Self::attach).
    ///
    /// # Panics
    ///
    /// If the two models' layers differ, or a difference is not finite.
    fn extract(&self, tuned: &Self, config: &LoraConfig) -> Result<Approximation<B>, LoraError> {
        config.validate()?;
        let (mut base, mut tuned) = (initialized(self), initialized(tuned));
        let mut set = tuned.adapters(config)?;
        set.adapters.clear();
        let layers = listed(&mut base);
        let chosen = choose(config, &paths(&layers))?;
        let tuned_layers = listed(&mut tuned);
        assert_eq!(paths(&layers), paths(&tuned_layers), "the two models' layers must be the same");
        let adapted = layers.iter().chain(&tuned_layers);
        let adapted = adapted.filter(|(path, it)| chosen.contains(path) && it.adapter().is_some());
        let paths: Vec<_> = adapted.map(|(path, _)| path.clone()).collect();
        if !paths.is_empty() {
            return Err(LoraError::AlreadyAttached { paths });
        }
        let mut kept = BTreeMap::new();
        for ((path, layer), (_, tuned)) in layers.into_iter().zip(tuned_layers) {
            if chosen.contains(&path) {
                let rank = config.for_layer(&path)?.rank;
                let [tuned, base] =
                    [tuned.weight_matrix(), layer.weight_matrix()].map(at_least_f32);
                let delta = tuned - base;
                let (adapter, share) = low_rank::extract(delta, rank);
                let adapter = LoraAdapter { layout: layer.weight_layout(), ..adapter };
                let name = Self::peft_name(&path);
                set.adapters.insert(name.clone(), Box::new(adapter));
                kept.insert(name, share);
            }
        }
        Ok(Approximation { adapters: set, kept })
    }

    /// The model with its adapters merged into the base, which then costs what it did without them.
    /// Sums are formed in `f32` or better.
    ///
    /// # Errors
    ///
    /// [`LoraError::NotFinite`] if a merged weight would be NaN or infinite.
    fn merge(&self) -> Result<Merged<Self>, LoraError> {
        let original = initialized(self);
        let mut plain = original.clone();
        for (path, mut layer) in listed(&mut plain) {
            if !layer.merge_adapter() {
                return Err(LoraError::NotFinite { path });
            }
        }
        Ok(Merged::new(plain, original))
    }

    /// The model with every parameter frozen but those of its adapters, and of the modules that a
    /// pattern in `except` names: `model.freeze(&["head"])` trains the head alone.
    ///
    /// Only on an autodiff backend can a parameter be marked as trainable; on others, what `except`
    /// names is frozen too.
    ///
    /// # Errors
    ///
    /// If a pattern is invalid or matches nothing.
    fn freeze(&self, except: &[&str]) -> Result<Self, LoraError> {
        let except: Vec<_> = except.iter().map(|&pattern| pattern.to_owned()).collect();
        freeze(self, &except, "except")
    }

    /// The model with every parameter trainable, but for the base under an adapter.
    fn unfreeze(&self) -> Self {
        walk::mark_trainable(initialized(self), |_| true)
    }

    /// What trains, per layer and in all.
    fn parameters(&self) -> ParameterReport {
        let mut model = initialized(self);
        let params: Vec<_> =
            walk::visit(&model).params.into_iter().filter(|it| !it.is_statistic).collect();
        let count = |prefix: &str| {
            let mut counts = (0, 0);
            for param in params.iter().filter(|param| within(prefix, &param.path)) {
                if param.in_adapter || param.requires_grad {
                    counts.0 += param.num_elements;
                }
                if !param.in_adapter {
                    counts.1 += param.num_elements;
                }
            }
            counts
        };
        let layers = listed(&mut model)
            .into_iter()
            .map(|(path, layer)| {
                let (trainable, total) = count(&path);
                let adapter = layer.adapter().map(|it| (it.rank(), it.scale()));
                LayerReport { path, shape: layer.weight_shape(), adapter, trainable, total }
            })
            .collect();
        let (trainable, total) = count("");
        ParameterReport { trainable, total, layers }
    }
}

/// Burn keeps running statistics in a cell that all clones share: to put them on one model would
/// change all others.
fn running_statistic(name: &str) -> LoraError {
    LoraError::Unsupported {
        file: "the set of adapters".to_owned(),
        field: name.to_owned(),
        reason: ": Burn shares running statistics between clones; name the parameters of the norm \
                 (`gamma`, `beta`) instead of the norm"
            .to_owned(),
    }
}

/// Whether the parameter at `path` is `module` or belongs to it; everything belongs to the model
/// itself.
fn within(module: &str, path: &str) -> bool {
    let rest = path.strip_prefix(module);
    module.is_empty() || rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// A clone that shares every value with the model, also those that were not drawn yet.
fn initialized<B: Backend, M: Module<B>>(model: &M) -> M {
    walk::visit(model);
    model.clone()
}

/// The paths of the layers to adapt.
fn choose(config: &LoraConfig, paths: &[String]) -> Result<Vec<String>, LoraError> {
    let targets = Pattern::all(&config.targets)?;
    let excludes = Pattern::all(&config.excludes)?;
    let extras = Pattern::all(&config.modules_to_save)?;
    require_matches("targets", &targets, paths, Pattern::matches)?;
    require_matches("excludes", &excludes, paths, Pattern::matches)?;
    for (field, patterns) in [
        ("rank_pattern", config.rank_pattern.iter().map(|(path, _)| path.clone()).collect()),
        ("alpha_pattern", config.alpha_pattern.iter().map(|(path, _)| path.clone()).collect()),
    ] {
        let patterns: Vec<String> = patterns;
        require_matches(field, &Pattern::all(&patterns)?, paths, Pattern::matches)?;
    }

    let is_chosen = |path: &&String| {
        (targets.is_empty() || targets.iter().any(|target| target.matches(path)))
            && !excludes.iter().any(|exclude| exclude.matches(path))
            && !extras.iter().any(|extra| extra.covers(path))
    };
    let chosen: Vec<_> = paths.iter().filter(is_chosen).cloned().collect();
    if chosen.is_empty() {
        let field = "targets, less excludes and modules_to_save,";
        let (patterns, available) = (config.targets.clone(), paths.to_vec());
        return Err(LoraError::Unmatched { field, patterns, available });
    }
    Ok(chosen)
}

fn freeze<B: Backend, M: LoraModule<B>>(
    model: &M,
    except: &[String],
    field: &'static str,
) -> Result<M, LoraError> {
    let except = Pattern::all(except)?;
    let findings = walk::visit(model);
    let paths: Vec<_> = findings.params.into_iter().map(|param| param.path).collect();
    require_matches(field, &except, &paths, Pattern::covers)?;
    let trains = |path: &str| except.iter().any(|pattern| pattern.covers(path));
    Ok(walk::mark_trainable(model.clone(), trains))
}
