//! Operations on whole models.

mod attach;
mod eva;
mod extract;
mod freeze;
mod fully_trained;
mod loftq;
mod lora;
mod mix;
mod module;
mod names;
mod norms;
mod plain;
mod precision;
mod quantize;
mod record;
mod report;
mod saved;

use std::collections::BTreeMap;

use burn::{
    module::{AutodiffModule, Module},
    tensor::backend::{AutodiffBackend, Backend},
};

use crate::{
    adapters::{Approximation, LoraAdapters},
    config::LoraConfig,
    error::LoraError,
    precision::Precision,
    quantized::QuantizedWeight,
    traverse,
};

pub use lora::Lora;
pub(crate) use mix::{ByPath, mixed};
pub use plain::IntoPlain;
pub use quantize::{QuantizationReport, QuantizeConfig, QuantizedLayer};
pub(crate) use record::adapters as adapters_of;
pub use record::{LoraRecord, ParameterRecord, PlacedAdapterRecord};
pub use report::{LayerReport, ParameterReport};

/// What LoRA does with a whole model. There is nothing to implement: every Burn module has these
/// methods, and they find its LoRA layers wherever these are, in `Vec`, `Option`, arrays, tuples,
/// enums, and modules within modules.
///
/// ```
/// use burn::{backend::{Autodiff, Flex}, module::Module, nn::LinearConfig, tensor::backend::Backend};
/// use burn_lora::{LoraConfig, LoraLinear, LoraModule};
///
/// #[derive(Module, Debug)]
/// struct Mlp<B: Backend> {
///     layers: Vec<LoraLinear<B>>,
/// }
///
/// # fn main() -> Result<(), burn_lora::LoraError> {
/// let device = Default::default();
/// let layer = |d_input, d_output| LinearConfig::new(d_input, d_output).init(&device).into();
/// let base: Mlp<Autodiff<Flex>> = Mlp { layers: vec![layer(784, 256), layer(256, 10)] };
///
/// let model = base.attach(&LoraConfig::peft(8, 16.0).with_targets(["layers.0"]))?;
/// assert_eq!(model.parameters().trainable, 8 * (784 + 256));
/// # Ok(())
/// # }
/// ```
///
/// Models are values: each operation returns a new one and leaves `self` as it was, also when it
/// fails. Weights are shared, not copied, until they change. A parameter that was never used draws
/// its value when its model is first operated on, so that all models made from it agree. The adapted
/// model is a [`Lora`], with further operations: its adapters as a value, and the ways back.
pub trait LoraModule<B: Backend>: Module<B> {
    /// The model with fresh adapters on the layers that `config` chooses. Everything but the
    /// adapters and `config.modules_to_save` is frozen.
    ///
    /// # Errors
    ///
    /// If `config` is [invalid](LoraConfig::validate), if one of its patterns matches nothing, if a
    /// chosen layer has an adapter already or cannot take a bias or a dropout that `config` asks for, or
    /// if `config.modules_to_save` names a parameter of a chosen layer, which is frozen. On a backend with
    /// autodiff, [`LoraError::SharedStatistics`] if the model has batch norms of Burn's, whose passes would change
    /// the base: see [`nn::BatchNorm`](crate::nn::BatchNorm). Stock layers are adapted by [`Lora::overlay`] alone.
    /// [`LoraError::LooseAdapters`] if a layer of your own holds a [`LoraAdapter`](crate::LoraAdapter) as a field,
    /// outside of this crate's layers.
    ///
    /// No error are layers whose adapters PEFT's files cannot hold, convolutions with groups and transposed ones, because
    /// records can. [`parameters`](Self::parameters) warns of them.
    fn attach(&self, config: &LoraConfig) -> Result<Lora<B, Self>, LoraError> {
        Lora::of(self).attach(config)
    }

    /// The model with exactly these adapters, and with the parameters that were trained in full
    /// along with them. No weight of the base is touched or copied. As after [`attach`](Self::attach),
    /// only what was put on trains.
    ///
    /// Biases of adapted layers that a file brings along (PEFT's `bias`) are put on, but do not train
    /// any further.
    ///
    /// # Errors
    ///
    /// [`LoraError::Mismatch`], listing every adapter and parameter that the model has no place for,
    /// or one of another shape, and every layer that the adapters' configuration means and that they
    /// leave out. [`LoraError::SharedStatistics`] as for [`attach`](Self::attach), and also without autodiff if
    /// there are running statistics of such norms among them, which all clones of the model would get.
    fn switch(&self, adapters: &LoraAdapters<B>) -> Result<Lora<B, Self>, LoraError> {
        Lora::of(self).switch(adapters)
    }

    /// The model in which exactly the adapters that it has and what the patterns name train:
    /// `base.train_only(&["head"])` trains the head alone, and `base.train_only(&[".*"])` is full
    /// fine-tuning.
    ///
    /// A pattern means parameters, or modules with all that they hold, as in
    /// [`LoraConfig::targets`]. Running statistics never train.
    ///
    /// # Errors
    ///
    /// If a pattern is invalid or matches nothing, and [`LoraError::SharedStatistics`] as for
    /// [`attach`](Self::attach).
    fn train_only(&self, patterns: &[&str]) -> Result<Lora<B, Self>, LoraError> {
        Lora::of(self).train_only(patterns)
    }

    /// Adapters that turn this model into `tuned`, a version of it that was trained in full, as well
    /// as the ranks in `config` allow: the best approximation of the difference of each weight that
    /// `config` chooses. Biases, and layers that were not chosen, are left out; what
    /// `config.modules_to_save` names is taken from `tuned`.
    ///
    /// # Errors
    ///
    /// As for [`attach`](Self::attach), and [`LoraError::Unusable`] if a difference is not finite.
    ///
    /// # Panics
    ///
    /// If the two models' layers differ.
    fn extract(&self, tuned: &Self, config: &LoraConfig) -> Result<Approximation<B>, LoraError> {
        extract::extract(&drawn(self), &drawn(tuned), config)
    }

    /// The model with running statistics of its own, which may move: see [`Lora::with_own_statistics`].
    fn with_own_statistics(&self) -> Lora<B, Self>
    where
        B: AutodiffBackend,
        Self: AutodiffModule<B>,
    {
        Lora::of(self).with_own_statistics()
    }

    /// The model with the weights of its layers in 4, 8 or 16 bits (QLoRA,
    /// [Dettmers et al. 2023](https://arxiv.org/abs/2305.14314)), and what that changed. The adapters that are
    /// put on it train as on any base.
    ///
    /// ```
    /// use burn::{backend::{Autodiff, Flex}, nn::LinearConfig};
    /// use burn_lora::{LoraConfig, LoraLinear, LoraModule, quantize::Quantization};
    ///
    /// # fn main() -> Result<(), burn_lora::LoraError> {
    /// type B = Autodiff<Flex>;
    /// let base: LoraLinear<B> = LinearConfig::new(512, 256).init(&Default::default()).into();
    /// let (base, report) = base.quantize(Quantization::Nf4)?;
    /// assert!(report.bytes() * 7 < report.bytes_before());
    /// let model = base.attach(&LoraConfig::peft(8, 16.0))?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// Each [`LoraLinear`](crate::LoraLinear), also those of attention, and each
    /// [`LoraEmbedding`](crate::nn::LoraEmbedding) can be quantized. A [`QuantizeConfig`] in place of the
    /// [`Quantization`](crate::quantize::Quantization) chooses some of them: leave out a model's head, which everything
    /// goes through. What is quantized is frozen for good.
    ///
    /// # Errors
    ///
    /// If a pattern is invalid or matches nothing, or a chosen weight is quantized already, empty, or not
    /// finite.
    fn quantize(
        &self,
        config: impl Into<QuantizeConfig>,
    ) -> Result<(Self, QuantizationReport), LoraError> {
        quantize::quantize(drawn(self), &config.into(), |_| false)
    }

    /// The model quantized, with adapters that start as what rounding took from the weights (LoftQ,
    /// [Li et al. 2023](https://arxiv.org/abs/2310.08659)): the first output is nearer to that of the model than
    /// without adapters.
    ///
    /// In each iteration the weight less the update is rounded, and the update becomes the best approximation
    /// of what is missing, of the rank in `config`. One iteration is PEFT's default. Unlike in PEFT, the factors
    /// are divided by the root of the scale, so that the update is right for any scale. Chosen layers that are
    /// not quantized get fresh adapters.
    ///
    /// ```
    /// use burn::{backend::{Autodiff, Flex}, nn::LinearConfig};
    /// use burn_lora::{LoraConfig, LoraLinear, LoraModule, quantize::Quantization};
    ///
    /// # fn main() -> Result<(), burn_lora::LoraError> {
    /// type B = Autodiff<Flex>;
    /// let base: LoraLinear<B> = LinearConfig::new(512, 256).init(&Default::default()).into();
    /// let model = base.attach_loftq(Quantization::Nf4, &LoraConfig::peft(8, 16.0), 1)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As for [`quantize`](Self::quantize) and [`attach`](Self::attach).
    ///
    /// # Panics
    ///
    /// If there are no iterations.
    fn attach_loftq(
        &self,
        to: impl Into<QuantizeConfig>,
        config: &LoraConfig,
        iterations: usize,
    ) -> Result<Lora<B, Self>, LoraError> {
        loftq::attach(&Lora::new(drawn(self)), &to.into(), config, iterations)
    }

    /// Puts fresh adapters on the model that start with what its linear layers see (EVA,
    /// [Paischer et al. 2024](https://arxiv.org/abs/2410.07170)): A is the directions in which a layer's inputs
    /// vary the most, and B is zero. Ranks go to the layers where directions have the largest shares of the
    /// variance; a layer can end with up to `rho` times its rank in `config`, or without an adapter. The sum of
    /// the ranks and each layer's scale stay.
    ///
    /// `see` runs the model on data like that to come, one batch or many: a few hundred examples are enough. The
    /// model that it gets behaves like the base. Padding counts as input, so leave it out, or keep it short.
    /// Meanwhile each layer needs memory for a matrix of its width. Layers that are not linear get adapters as
    /// [`attach`](Self::attach) makes them.
    ///
    /// ```
    /// use burn::{
    ///     backend::Flex,
    ///     nn::LinearConfig,
    ///     tensor::{Distribution, Tensor},
    /// };
    /// use burn_lora::{LoraConfig, LoraLinear, LoraModule};
    ///
    /// # fn main() -> Result<(), burn_lora::LoraError> {
    /// let device = Default::default();
    /// let base: LoraLinear<Flex> = LinearConfig::new(64, 32).init(&device).into();
    /// let model = base.attach_eva(&LoraConfig::peft(4, 8.0), 2.0, |model| {
    ///     for _ in 0..8 {
    ///         let batch = Tensor::<Flex, 2>::random([16, 64], Distribution::Default, &device);
    ///         model.forward(batch);
    ///     }
    /// })?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As for [`attach`](Self::attach), and if the model saw nothing, or something that is not finite, or if
    /// `config` has other initial values than [`Init::KaimingUniform`](crate::Init::KaimingUniform) or
    /// [`Init::Gaussian`](crate::Init::Gaussian).
    ///
    /// # Panics
    ///
    /// If `rho` is below 1.
    fn attach_eva(
        &self,
        config: &LoraConfig,
        rho: f64,
        see: impl FnOnce(&Lora<B, Self>),
    ) -> Result<Lora<B, Self>, LoraError> {
        eva::attach(&Lora::of(self), config, rho, see)
    }

    /// The model with the products of its layers in another [`Precision`]. Weights and adapters stay as they are. It is no
    /// part of records and files, so it is set again after one is loaded into a new model.
    ///
    /// ```
    /// use burn::{backend::{Autodiff, Flex}, nn::LinearConfig};
    /// use burn_lora::{LoraConfig, LoraLinear, LoraModule, nn::Precision};
    ///
    /// type B = Autodiff<Flex>;
    /// let base: LoraLinear<B> = LinearConfig::new(512, 256).init(&Default::default()).into();
    /// let fast = if Precision::bf16_is_fast() { Precision::Bf16 } else { Precision::F32 };
    /// let base = base.with_precision(fast);
    /// assert_eq!(base.precision(), fast);
    /// ```
    fn with_precision(&self, precision: Precision) -> Self {
        precision::set(drawn(self), precision)
    }

    /// The model with its quantized weights unpacked, in full and frozen: for files of other programs, say.
    fn dequantize(&self) -> Self {
        quantize::dequantize(self.clone())
    }

    /// The model with these weights for the layers at these paths, such as those of a
    /// [GGUF file](QuantizedWeight::from_gguf). Weights that were never used are drawn one at a time, and dropped,
    /// so that the model never needs memory for all of them.
    ///
    /// # Errors
    ///
    /// [`LoraError::Mismatch`], listing every path at which the model has no layer that can be quantized, or
    /// one of another shape.
    fn with_quantized(
        self,
        weights: BTreeMap<String, QuantizedWeight<B>>,
    ) -> Result<Self, LoraError> {
        quantize::with_weights(self, weights)
    }

    /// What trains, per layer and in all. On a backend without autodiff, where nothing can be marked,
    /// these are the adapters.
    fn parameters(&self) -> ParameterReport {
        let autodiff = self.devices().first().is_some_and(|device| B::ad_enabled(device));
        report::of(self, |param| if autodiff { param.requires_grad } else { param.in_adapter })
    }
}

impl<B: Backend, M: Module<B>> LoraModule<B> for M {}

/// A clone that shares every value with the model, also those that were not drawn yet.
fn drawn<B: Backend, M: Module<B>>(model: &M) -> M {
    traverse::draw(model);
    model.clone()
}
