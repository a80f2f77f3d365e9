//! An adapted model.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Deref,
};

use burn::{
    module::{AutodiffModule, Module},
    tensor::backend::{AutodiffBackend, Backend},
};

use super::{
    ParameterReport, attach, eva, freeze, fully_trained, loftq, norms,
    plain::IntoPlain,
    quantize::{self, QuantizationReport, QuantizeConfig},
    record, report,
};
use crate::{
    adapters::{Extra, LoraAdapters},
    config::LoraConfig,
    error::LoraError,
    layer::LoraLayerMut,
    pattern::Pattern,
    traverse::{self, Values, statistics},
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
/// let config = LoraConfig::peft(4, 8.0).with_modules_to_save(["head"]);
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
/// # Batch norms
///
/// [`nn::BatchNorm`](crate::nn::BatchNorm) is frozen with its model. Burn's is not: its running statistics
/// move in each pass on an autodiff backend, and all clones of a model share them, so that adapters on such a model
/// would change the base. `attach` and its kin refuse it there. With
/// [`with_own_statistics`](Self::with_own_statistics) the statistics move in the adapted model alone, and are part
/// of its set of adapters. A clone of that model shares them, as clones do in Burn; with
/// [`with_own_statistics`](Self::with_own_statistics) once more it does not.
///
/// # Records
///
/// The record holds the adapters, what trains in full, and running statistics that move, and nothing of what is
/// frozen: so do burn-train's checkpoints. It is loaded into a model that was adapted in the same way,
/// or into any base of the same shape in a [`Lora::new`], which it brings everything to: adapters,
/// values, and what trains. The ids by which an optimizer finds its state come along.
///
/// # Adapters on stock modules
///
/// [`Lora::overlay`] also adapts what has no LoRA layer: see [`Overlay`](crate::overlay::Overlay).
#[derive(Clone, Debug)]
pub struct Lora<B: Backend, M> {
    /// Boxed, since modules are moved a lot: unoptimized programs keep a copy for each move on the stack.
    pub(super) model: Box<M>,
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
    /// The paths of running statistics that clones share.
    pub(super) statistics: BTreeSet<String>,
    /// A copy of the model whose statistics are its own, if it may have them.
    pub(super) own: Option<fn(&M) -> M>,
}

impl<B: Backend, M: Module<B>> Lora<B, M> {
    /// The model as it is, with everything frozen but the adapters that it has already. Nothing is
    /// copied.
    ///
    /// # Panics
    ///
    /// If the model has adapters and batch norms of Burn's, on a backend with autodiff: keep the `Lora` that it was in.
    pub fn new(model: M) -> Self {
        let statistics = traverse::draw(&model);
        let lora = Self::unmarked(model, statistics).training(&BTreeSet::new());
        if let (false, Err(error)) = (lora.trains.is_empty(), norms::require_frozen(&lora)) {
            panic!("{error}");
        }
        lora
    }

    /// A copy of the model that shares every value with it. What trains in it is still to be marked.
    pub(super) fn of(model: &M) -> Self {
        let statistics = traverse::draw(model);
        Self::unmarked(model.clone(), statistics)
    }

    fn unmarked(model: M, statistics: BTreeSet<String>) -> Self {
        if !statistics.is_empty() {
            statistics::sync(&model);
        }
        Self {
            model: Box::new(model),
            trains: BTreeSet::new(),
            originals: Values::new(),
            modules: Vec::new(),
            described: Default::default(),
            conv1d: BTreeSet::new(),
            statistics,
            own: None,
        }
    }

    /// Marks exactly what trains.
    pub(super) fn refrozen(mut self) -> Self {
        let trains = std::mem::take(&mut self.trains);
        let lora = self.map_model(&mut freeze::marker(|place| trains.contains(place.path())));
        Self { trains, ..lora }
    }

    /// Has the adapters train, and `in_full` next to them, whose values it remembers. Running statistics among them
    /// are remembered alone.
    pub(super) fn training(mut self, in_full: &BTreeSet<String>) -> Self {
        let unknown = in_full.iter().filter(|path| !self.originals.contains_key(*path)).cloned();
        let values = traverse::values(&*self.model, &unknown.collect());
        self.originals.extend(values);
        let mut marked = BTreeSet::new();
        let lora = self.map_model(&mut freeze::marker(|place| {
            let in_full = in_full.contains(place.path()) && !place.is_statistic();
            let trains = place.adapted_layer().is_some() || in_full;
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
        change: impl FnMut(&str, &mut dyn LoraLayerMut<B>) + 'static,
    ) -> Self {
        self.map_model(&mut traverse::changer(change))
    }

    /// The model with running statistics of its own, which move in passes on this backend: for models with
    /// Burn's [`BatchNorm`](burn::nn::BatchNorm), which this backend has no way to freeze.
    ///
    /// ```
    /// use burn::{backend::{Autodiff, Flex}, module::Module, nn, tensor::backend::Backend};
    /// use burn_lora::{LoraConfig, LoraError, LoraLinear, LoraModule};
    ///
    /// #[derive(Module, Debug)]
    /// struct Net<B: Backend> {
    ///     fc: LoraLinear<B>,
    ///     norm: nn::BatchNorm<B>,
    /// }
    ///
    /// # fn main() -> Result<(), LoraError> {
    /// let device = Default::default();
    /// let base = Net::<Autodiff<Flex>> {
    ///     fc: nn::LinearConfig::new(8, 16).init(&device).into(),
    ///     norm: nn::BatchNormConfig::new(16).init(&device),
    /// };
    /// let config = LoraConfig::peft(4, 8.0);
    /// assert!(matches!(base.attach(&config), Err(LoraError::SharedStatistics { .. })));
    /// let model = base.with_own_statistics().attach(&config)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// The norms are part of the set of adapters then, with their statistics: so the files, a record and the merged
    /// model give the outputs that the model gives. As PEFT does with norms in `modules_to_save`. On a model that
    /// comes from this one, [`switch`](Self::switch) puts them back.
    ///
    /// While it trains, the model computes with the statistics of the batch, and when it is evaluated with the
    /// moved ones: that asks for batches like those to come. [`nn::BatchNorm`](crate::nn::BatchNorm) computes the
    /// same in both.
    pub fn with_own_statistics(&self) -> Self
    where
        B: AutodiffBackend,
        M: AutodiffModule<B>,
    {
        norms::remembered(Self { own: Some(norms::own::<B, M>), ..self.clone() }.unshared())
    }

    /// The same with running statistics that no other model shares, where there is a way to that.
    pub(super) fn unshared(self) -> Self {
        match self.own {
            Some(own) if !self.statistics.is_empty() => {
                Self { model: Box::new(own(&self.model)), ..self }.refrozen()
            }
            _ => self,
        }
    }

    /// The model without its adapters: the base as it was, to the bit, and frozen. What was trained in
    /// full is as it was before, too.
    ///
    /// Of an [`Overlay`](crate::overlay::Overlay), the base is the stock module.
    pub fn detach<P>(&self) -> P
    where
        M: IntoPlain<P>,
    {
        self.bare().into_inner().into_plain()
    }

    /// The same without adapters, and with nothing trained in full.
    pub(super) fn bare(&self) -> Self {
        if self.trains.is_empty() && self.originals.is_empty() && record::adapters(self).is_empty()
        {
            return self.clone().unshared();
        }
        let lora = self.clone().unshared().change_layers(|_, layer| layer.set_adapter(None));
        let model = Box::new(traverse::restore(*lora.model, &self.originals));
        let (trains, originals, modules) = Default::default();
        let (described, conv1d) = Default::default();
        let bare = Self { model, trains, originals, modules, described, conv1d, ..lora };
        norms::remembered(bare.refrozen())
    }

    /// The model with further adapters; see [`LoraModule::attach`](crate::LoraModule::attach).
    ///
    /// # Errors
    ///
    /// As there.
    pub fn attach(&self, config: &LoraConfig) -> Result<Self, LoraError> {
        attach::fresh(self, config)
    }

    /// The model with further adapters that start with what its layers see; see
    /// [`LoraModule::attach_eva`](crate::LoraModule::attach_eva). What it has already is in effect meanwhile,
    /// and stays.
    ///
    /// # Errors
    ///
    /// As there.
    ///
    /// # Panics
    ///
    /// As there.
    pub fn attach_eva(
        &self,
        config: &LoraConfig,
        rho: f64,
        see: impl FnOnce(&Self),
    ) -> Result<Self, LoraError> {
        eva::attach(self, config, rho, see)
    }

    /// The model quantized, with further adapters that start as what rounding took from the weights; see
    /// [`LoraModule::attach_loftq`](crate::LoraModule::attach_loftq). What it has already stays.
    ///
    /// # Errors
    ///
    /// As there, and if a chosen weight trains in full.
    ///
    /// # Panics
    ///
    /// As there.
    pub fn attach_loftq(
        &self,
        to: impl Into<QuantizeConfig>,
        config: &LoraConfig,
        iterations: usize,
    ) -> Result<Self, LoraError> {
        loftq::attach(self, &to.into(), config, iterations)
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
        norms::require_frozen(self)?;
        let lora = self.clone().unshared();
        attach::train_in_full(lora, &Pattern::all(patterns)?, "train_only")
    }

    /// The adapted model on a base in 4, 8 or 16 bits, as [`LoraModule::quantize`](crate::LoraModule::quantize)
    /// makes it. The adapters stay as they are.
    ///
    /// # Errors
    ///
    /// As there, and if a chosen weight trains in full.
    pub fn quantize(
        &self,
        config: impl Into<QuantizeConfig>,
    ) -> Result<(Self, QuantizationReport), LoraError> {
        quantize::quantize(self.clone().unshared(), &config.into(), |layer| {
            self.originals.contains_key(&quantize::weight_path(layer))
        })
    }

    /// Everything that was trained, as a value: the adapters, and the modules that trained in full.
    /// Tensors are shared, not copied.
    pub fn adapters(&self) -> LoraAdapters<B> {
        if !self.statistics.is_empty() {
            statistics::sync::<B, M>(&self.model);
        }
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
    /// To the result, the adapters are part of its weights: do not put them on once more. Of an
    /// [`Overlay`](crate::overlay::Overlay), it is the stock module.
    ///
    /// # Errors
    ///
    /// [`LoraError::NotFinite`] if a merged weight would be NaN or infinite.
    pub fn merge<P>(&self) -> Result<P, LoraError>
    where
        M: IntoPlain<P>,
    {
        attach::merged(self.clone().unshared()).map(IntoPlain::into_plain)
    }

    /// The model itself, with its LoRA layers and the adapters in these.
    pub fn into_inner(self) -> M {
        *self.model
    }

    /// What trains, per layer and in all, as [`LoraModule::parameters`](crate::LoraModule::parameters)
    /// does; on a backend without autodiff, too.
    pub fn parameters(&self) -> ParameterReport {
        report::of(self, |param| self.trains.contains(&param.path))
    }
}

impl<B: Backend, M: Module<B>> Deref for Lora<B, M> {
    type Target = M;

    /// The model with its adapters.
    fn deref(&self) -> &M {
        &self.model
    }
}
