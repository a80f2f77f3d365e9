//! An adapted model.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Deref,
    sync::OnceLock,
};

use burn::{module::Module, tensor::backend::Backend};

use super::{
    ParameterReport, attach, freeze,
    fully_trained::{self, Values},
    quantize::{self, QuantizationReport, QuantizeConfig},
    record, report,
    slot::{self, Slot},
    statistics, walk,
};
use crate::{
    adapters::{Extra, LoraAdapters},
    config::LoraConfig,
    error::LoraError,
    layer::LoraLayer,
    pattern::Pattern,
};

/// A model with adapters, of which only these train, and what was asked to train in full next to
/// them; all else is frozen.
///
/// It comes from [`LoraModule::attach`](crate::LoraModule::attach) or
/// [`switch`](crate::LoraModule::switch), and can be used as the model itself:
///
/// ```
/// use burn::{
///     backend::{Autodiff, Flex},
///     module::Module,
///     nn::{Linear, LinearConfig},
///     optim::{AdamWConfig, GradientsParams, Optimizer},
///     tensor::{Distribution, Tensor, activation::relu, backend::Backend},
/// };
/// use burn_lora::{Lora, LoraConfig, LoraLinear, LoraModule};
///
/// #[derive(Module, Debug)]
/// struct Net<B: Backend> {
///     body: LoraLinear<B>,
///     head: Linear<B>,
/// }
///
/// impl<B: Backend> Net<B> {
///     fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
///         self.head.forward(relu(self.body.forward(x)))
///     }
/// }
///
/// # fn main() -> Result<(), burn_lora::LoraError> {
/// type B = Autodiff<Flex>;
/// let device = Default::default();
/// let base: Net<B> = Net {
///     body: LinearConfig::new(8, 16).init(&device).into(),
///     head: LinearConfig::new(16, 2).init(&device),
/// };
/// let config = LoraConfig::new(4, 8.0).with_modules_to_save(["head"]);
/// let mut model: Lora<B, Net<B>> = base.attach(&config)?;
///
/// let mut optimizer = AdamWConfig::new().init();
/// let x = Tensor::random([4, 8], Distribution::Default, &device);
/// let grads = GradientsParams::from_grads(model.forward(x).powi_scalar(2).mean().backward(), &model);
/// model = optimizer.step(1e-3, model, grads);
///
/// let adapters = model.adapters(); // the head is among them
/// let plain: Net<B> = model.merge()?; // the adapted model, at no extra cost
/// let original: Net<B> = model.detach(); // the base, to the bit
/// # Ok(())
/// # }
/// ```
///
/// # What it remembers
///
/// - **What trains.** Whatever becomes of the module (a clone, a trip to another device, through
///   [`valid`](burn::module::AutodiffModule::valid) and back, a record), the same parameters train.
///   [`no_grad`](burn::module::Module::no_grad), or a mapper that sets the flags of parameters, changes
///   it.
/// - **The base.** The values that modules trained in full had before are kept, to be given back by
///   [`detach`](Self::detach). Weights under adapters never change.
///
/// Running statistics of batch norms move in passes on an autodiff backend, whether frozen or not, and
/// the base shares them; in passes through [`with_adapters`](Self::with_adapters) they do not.
///
/// # Records
///
/// The record holds the adapters, what trains in full, and running statistics, and nothing of what is
/// frozen: so do burn-train's checkpoints. It is loaded into a model that was adapted in the same way,
/// or into any base of the same shape in a [`Lora::new`], which it brings everything to: adapters,
/// values, and what trains. The ids by which an optimizer finds its state come along.
///
/// # Adapters on stock modules
///
/// [`Lora::overlay`] also adapts what has no LoRA layer: a stock `TransformerEncoder`, `Lstm` or
/// `Conv3d`, or a matrix of a model of your own. Every weight of two or more dimensions can carry an
/// adapter. For a forward pass the weights that have one are replaced, in a copy of the module that
/// shares everything else, by `W + s·A·B`:
///
/// ```
/// use burn::{backend::{Autodiff, Flex}, nn::{LstmConfig, Lstm}, tensor::Tensor};
/// use burn_lora::{Lora, LoraConfig};
///
/// # fn main() -> Result<(), burn_lora::LoraError> {
/// type B = Autodiff<Flex>;
/// let device = Default::default();
/// let lstm: Lstm<B> = LstmConfig::new(8, 16, true).init(&device);
///
/// let config = LoraConfig::new(2, 4.0).with_targets([".*_gate.input_transform"]);
/// let model = Lora::overlay(lstm).attach(&config)?;
/// let x = Tensor::ones([4, 10, 8], &device);
/// let (y, _) = model.with_adapters(|lstm| lstm.forward(x, None));
/// assert_eq!(y.dims(), [4, 10, 16]);
///
/// let lstm: Lstm<B> = model.merge()?;
/// # Ok(())
/// # }
/// ```
///
/// Such adapters are *dense*: `A·B` and its gradient exist for each adapted weight, in every step. A
/// training step takes about the time and memory of full fine-tuning: 0.98 and 1.08 times as much for
/// attention of width 512, where [`LoraMultiHeadAttention`](crate::nn::LoraMultiHeadAttention) takes 0.53
/// and 0.22 (`cargo bench`). Without autodiff the weights are composed in the first pass, and kept: for
/// one row and a layer of width 1024 that pass takes 9 times as long as one of the merged layer, and
/// every later one as long as that. The adapted weights then take their memory twice. Use LoRA layers
/// where you can change the model; the paths and the adapters are the same, and what was trained on one
/// can be [switched](Self::switch) onto the other.
///
/// A dense adapter does not see the layer's input: dropout on it is not possible, and attaching
/// adapters with dropout is an error; loaded ones train without. A bias of the adapter is added to the
/// layer's own, which must be there. Kernels of grouped convolutions look like those of others: their
/// adapters can be saved, but PEFT does not fit them onto the layer. One module that the model holds
/// twice has two adapters.
#[derive(Clone, Debug)]
pub struct Lora<B: Backend, M> {
    /// Boxed, since modules are moved a lot: unoptimized programs keep a copy for each move on the stack.
    pub(super) model: Box<M>,
    /// Where stock modules can carry dense adapters, if this is an overlay.
    pub(super) slots: Vec<Slot<B>>,
    /// The paths of the parameters that train.
    pub(super) trains: BTreeSet<String>,
    /// What the parameters that train in full were before.
    pub(super) originals: Values<B>,
    /// The modules that these are the parameters of, as a set of adapters names them.
    pub(super) modules: Vec<String>,
    /// What the file of the adapters said beyond what this crate uses.
    pub(super) described: BTreeMap<String, serde_json::Value>,
    /// Weights that the file of the adapters held as those of Hugging Face's `Conv1D`, by their names in
    /// it.
    pub(super) conv1d: BTreeSet<String>,
    /// The paths of running statistics.
    pub(super) statistics: BTreeSet<String>,
    /// The model with its dense adapters composed, once it was asked for without autodiff.
    pub(super) composed: OnceLock<Box<M>>,
}

impl<B: Backend, M: Module<B>> Lora<B, M> {
    /// The model as it is, with everything frozen but the adapters that it has already. Nothing is
    /// copied.
    pub fn new(model: M) -> Self {
        let statistics = walk::draw(&model);
        Self::unmarked(model, statistics, vec![]).training(&BTreeSet::new())
    }

    /// A copy of the model that shares every value with it. What trains in it is still to be marked.
    pub(super) fn of(model: &M) -> Self {
        let statistics = walk::draw(model);
        Self::unmarked(model.clone(), statistics, vec![])
    }

    /// The model with everything frozen, and with places for adapters
    /// [on stock modules](Self#adapters-on-stock-modules), too.
    pub fn overlay(model: M) -> Self {
        let (statistics, slots) = (walk::draw(&model), slot::find(&model));
        Self::unmarked(model, statistics, slots).training(&BTreeSet::new())
    }

    fn unmarked(model: M, statistics: BTreeSet<String>, slots: Vec<Slot<B>>) -> Self {
        if !statistics.is_empty() {
            statistics::sync(&model);
        }
        Self {
            slots,
            model: Box::new(model),
            trains: BTreeSet::new(),
            originals: Values::new(),
            modules: Vec::new(),
            described: Default::default(),
            conv1d: BTreeSet::new(),
            statistics,
            composed: OnceLock::new(),
        }
    }

    /// Marks exactly what trains.
    pub(super) fn refrozen(mut self) -> Self {
        let trains = std::mem::take(&mut self.trains);
        let lora = self.map_parts(&mut freeze::marker(|place| trains.contains(place.path())));
        Self { trains, ..lora }
    }

    /// Has the adapters train, and `in_full` next to them, whose values it remembers.
    pub(super) fn training(mut self, in_full: &BTreeSet<String>) -> Self {
        let unknown = in_full.iter().filter(|path| !self.originals.contains_key(*path)).cloned();
        let values = fully_trained::values(&*self.model, &unknown.collect());
        self.originals.extend(values);
        let mut marked = BTreeSet::new();
        let lora = self.map_parts(&mut freeze::marker(|place| {
            let trains = place.adapted_layer().is_some() || in_full.contains(place.path());
            if trains {
                marked.insert(place.path().to_owned());
            }
            trains
        }));
        Self { trains: marked, ..lora }
    }

    /// The model after `change` was at each of its LoRA layers. What trains in it is still to be marked.
    pub(super) fn change_layers(
        self,
        change: impl FnMut(&str, &mut dyn LoraLayer<B>) + 'static,
    ) -> Self {
        self.map_parts(&mut walk::changer(change))
    }

    /// The module itself, on which dense adapters have no effect.
    pub(crate) fn module(&self) -> &M {
        &self.model
    }

    /// Runs `pass` on the model with the adapters in effect, and returns its result.
    ///
    /// This is how a model with dense adapters is used in training; others can be used without it. The
    /// model that `pass` gets is good for one backward pass: a result that is kept for later must come
    /// from a call of its own. Running statistics are those from before when it returns.
    pub fn with_adapters<R>(&self, pass: impl FnOnce(&M) -> R) -> R {
        if self.is_exact() {
            // Without autodiff, running statistics do not move.
            let autodiff = self.devices().first().is_some_and(|device| B::ad_enabled(device));
            let moving = if autodiff { self.statistics.clone() } else { BTreeSet::new() };
            return statistics::unmoved::<B, M, R>(&*self.model, &moving, || pass(self));
        }
        let composed = slot::compose((*self.model).clone(), &self.slots);
        statistics::unmoved::<B, M, R>(&*self.model, &self.statistics, || pass(&composed))
    }

    /// The model without its adapters: the base as it was, to the bit, and frozen. What was trained in
    /// full is as it was before, too.
    ///
    /// Running statistics are as the last pass left them.
    pub fn detach(&self) -> M {
        *self.bare().model
    }

    /// The same without adapters, and with nothing trained in full.
    pub(super) fn bare(&self) -> Self {
        if self.trains.is_empty() && self.originals.is_empty() && record::adapters(self).is_empty()
        {
            return self.clone();
        }
        let lora = self.clone().change_layers(|_, layer| layer.set_adapter(None));
        let model = Box::new(fully_trained::restore(*lora.model, &self.originals));
        let (trains, originals, modules) = Default::default();
        let (described, conv1d) = Default::default();
        Self { model, trains, originals, modules, described, conv1d, ..lora }.refrozen()
    }

    /// The model with further adapters; see [`LoraModule::attach`](crate::LoraModule::attach).
    ///
    /// # Errors
    ///
    /// As there.
    pub fn attach(&self, config: &LoraConfig) -> Result<Self, LoraError> {
        attach::fresh(self, config)
    }

    /// The model with exactly these adapters, and with what was trained in full along with them; what
    /// it had before is taken off. See [`LoraModule::switch`](crate::LoraModule::switch).
    ///
    /// # Errors
    ///
    /// As there.
    pub fn switch(&self, adapters: &LoraAdapters<B>) -> Result<Self, LoraError> {
        attach::set(&self.bare(), adapters)
    }

    /// The model in which exactly the adapters that it has and what the patterns name train; see
    /// [`LoraModule::train_only`](crate::LoraModule::train_only).
    ///
    /// # Errors
    ///
    /// As there.
    pub fn train_only<S: AsRef<str>>(&self, patterns: &[S]) -> Result<Self, LoraError> {
        attach::train_in_full(self.clone(), &Pattern::all(patterns)?, "train_only")
    }

    /// The adapted model on a base in 4 or 8 bits, as [`LoraModule::quantize`](crate::LoraModule::quantize)
    /// makes it. The adapters stay as they are.
    ///
    /// # Errors
    ///
    /// As there, and if a chosen weight trains in full.
    pub fn quantize(
        &self,
        config: impl Into<QuantizeConfig>,
    ) -> Result<(Self, QuantizationReport), LoraError> {
        quantize::quantize(self.clone(), &config.into(), |layer| {
            self.originals.contains_key(&quantize::weight_path(layer))
        })
    }

    /// Everything that was trained, as a value: the adapters, and the modules that trained in full.
    /// Tensors are shared, not copied.
    pub fn adapters(&self) -> LoraAdapters<B> {
        let mut set = LoraAdapters::new(record::adapters(self));
        set.extras = fully_trained::read(&*self.model, &self.originals.keys().cloned().collect());
        for name in &self.conv1d {
            if let Some(extra) = set.extras.get_mut(name) {
                *extra = Extra { may_be_conv1d: true, ..extra.transposed() };
            }
        }
        set.modules_to_save = self.modules.clone();
        set.config = self.described.clone();
        set
    }

    /// The model with the adapters added to its weights: a plain model, which costs what it did
    /// without adapters. Sums are formed in `f32` or better. The adapted model is still there; that is
    /// the way back.
    ///
    /// To the result, the adapters are part of its weights: do not put them on once more.
    ///
    /// # Errors
    ///
    /// [`LoraError::NotFinite`] if a merged weight would be NaN or infinite.
    pub fn merge(&self) -> Result<M, LoraError> {
        attach::merged(self.clone())
    }

    /// The model itself, with its LoRA layers and the adapters in these. Dense adapters are dropped.
    pub fn into_inner(self) -> M {
        *self.model
    }

    /// What trains, per layer and in all, as [`LoraModule::parameters`](crate::LoraModule::parameters)
    /// does; on a backend without autodiff, too.
    pub fn parameters(&self) -> ParameterReport {
        report::of(self, |param| self.trains.contains(&param.path))
    }

    /// Whether the model by itself computes what it does with all adapters in effect, or a composed
    /// one that can be kept does.
    fn is_exact(&self) -> bool {
        self.dense().next().is_none_or(|(_, device)| !B::ad_enabled(&device))
    }

    /// The paths of dense adapters, and their devices.
    fn dense(&self) -> impl Iterator<Item = (&str, B::Device)> {
        let adapted = self.slots.iter().filter_map(|slot| Some((slot, slot.adapter.as_ref()?)));
        adapted.map(|(slot, adapter)| (slot.path.as_str(), adapter.a.device()))
    }
}

impl<B: Backend, M: Module<B>> Deref for Lora<B, M> {
    type Target = M;

    /// The model with the adapters in effect.
    ///
    /// # Panics
    ///
    /// If there are [dense adapters](Lora#adapters-on-stock-modules) on an autodiff backend, of which
    /// the model itself knows nothing: use [`with_adapters`](Lora::with_adapters) there.
    fn deref(&self) -> &M {
        let Some((path, _)) = self.dense().next() else { return &self.model };
        assert!(
            self.is_exact(),
            "`{path}` is a stock module with an adapter, which only `Lora::with_adapters` applies in \
             training: write `lora.with_adapters(|model| ..)` where `model` was used"
        );
        self.composed.get_or_init(|| Box::new(slot::compose((*self.model).clone(), &self.slots)))
    }
}
