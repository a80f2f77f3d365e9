//! One base with many sets of adapters, of which each sample of a batch uses one.

use std::{collections::BTreeMap, sync::Arc};

use burn::{
    module::Module,
    tensor::{BasicOps, Int, Tensor, TensorData, backend::Backend},
};

use super::MemoryReport;
use crate::{
    adapters::LoraAdapters,
    error::LoraError,
    layer::LoraLayer,
    model::{ByPath, LoraModule, adapters_of, mixed},
    traverse::{draw, layers},
};

/// How a set can be used that no batch can hold.
const ALONE: &str = "use the set alone, by `base.switch(&set)` or `AdapterStore::model`";

/// One base and many sets of adapters, by name, for batches in which each sample uses one of them.
///
/// ```
/// use burn::{backend::Flex, nn::LinearConfig, tensor::Tensor};
/// use burn_lora::{Init, LoraConfig, LoraLinear, LoraModule, serve::MultiLora};
///
/// # fn main() -> Result<(), burn_lora::LoraError> {
/// let device = Default::default();
/// let base: LoraLinear<Flex> = LinearConfig::new(8, 4).init(&device).into();
/// let config = LoraConfig::new(2, 4.0).with_init(Init::RandomBoth);
/// let (small, large) = (base.attach(&config)?, base.attach(&LoraConfig { rank: 4, ..config })?);
///
/// let mut models = MultiLora::new(base)?;
/// models.insert("small", &small.adapters())?;
/// models.insert("large", &large.adapters())?;
///
/// // Three samples: one for each set, and one for the base alone.
/// let batch = models.batch(&[Some("large"), None, Some("small")])?;
/// let x = Tensor::ones([3, 8], &device);
/// let y = batch.run(x, |model, x| model.forward(x));
/// assert_eq!(y.dims(), [3, 4]);
/// # Ok(())
/// # }
/// ```
///
/// Each layer computes the base once for the whole batch, and then the update of each adapter for the samples
/// that use it. The samples are sorted by their sets for that, once for a pass through the model. Sets can
/// have different ranks, scales and layers.
#[derive(Clone, Debug)]
pub struct MultiLora<B: Backend, M> {
    base: M,
    /// Shared by the batches that are being computed.
    sets: BTreeMap<String, Arc<ByPath<B>>>,
}

impl<B: Backend, M: Module<B>> MultiLora<B, M> {
    /// A base without any sets.
    ///
    /// # Errors
    ///
    /// [`LoraError::NotMixable`] if the backend has autodiff: a batch of several sets is for inference, so call
    /// [`valid`](burn::module::AutodiffModule::valid) first. [`LoraError::AlreadyAttached`] if the base has
    /// adapters of its own.
    pub fn new(base: M) -> Result<Self, LoraError> {
        if base.devices().first().is_some_and(|device| B::ad_enabled(device)) {
            let problem =
                "the base is on a backend with autodiff, and does not train in a mixed batch: use \
                           its `valid()`"
                    .to_owned();
            return Err(LoraError::NotMixable { what: "the model".to_owned(), problem });
        }
        let paths: Vec<_> = adapters_of(&base).into_iter().map(|(path, _)| path).collect();
        if !paths.is_empty() {
            return Err(LoraError::AlreadyAttached { paths });
        }
        draw(&base);
        Ok(Self { base, sets: BTreeMap::new() })
    }

    /// Adds a set, or replaces the one of that name. Its tensors are shared, not copied.
    ///
    /// # Errors
    ///
    /// As for [`LoraModule::switch`], and [`LoraError::NotMixable`] if the set has parameters that were trained
    /// in full, such as a new head, which the samples of a batch share, or [DoRA](crate::LoraConfig::dora)'s
    /// magnitudes, or if an adapter is for a stock module in an [`Overlay`](crate::overlay::Overlay).
    pub fn insert(
        &mut self,
        name: impl Into<String>,
        set: &LoraAdapters<B>,
    ) -> Result<(), LoraError> {
        let name = name.into();
        if let Some((extra, _)) = set.extras.iter().next() {
            let problem = format!(
                "it was trained in full, and all samples of a batch share it: {ALONE}, or without it, by \
                 `LoraAdapters::without_modules_to_save`"
            );
            return Err(LoraError::NotMixable { what: format!("`{extra}` of `{name}`"), problem });
        }
        if let Some((path, _)) = set.iter().find(|(_, adapter)| adapter.magnitude.is_some()) {
            let problem = format!(
                "it has DoRA's magnitudes, which concern the layer and not its output: {ALONE}"
            );
            return Err(LoraError::NotMixable { what: format!("`{path}` of `{name}`"), problem });
        }
        let adapted = self.base.switch(set)?;
        let shared = layers(&adapted, |path, layer: &dyn LoraLayer<B>| {
            let takes = layer.adapter().is_none() || layer.capabilities().mixed;
            (!takes).then(|| path.to_owned())
        });
        if let Some(path) = shared.into_iter().flatten().next() {
            let problem = "it is for a stock module in an overlay, whose weight all samples of a batch share: use \
                           this crate's layers"
                .to_owned();
            return Err(LoraError::NotMixable { what: format!("`{path}` of `{name}`"), problem });
        }
        self.sets.insert(name, Arc::new(adapters_of(&adapted).into_iter().collect()));
        Ok(())
    }

    /// Removes the set, and tells whether it was there.
    pub fn remove(&mut self, name: &str) -> bool {
        self.sets.remove(name).is_some()
    }

    /// The names of the sets, in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.sets.keys().map(String::as_str)
    }

    /// What the base and each set take in memory.
    pub fn memory(&self) -> MemoryReport {
        let bytes = |set: &ByPath<B>| set.values().map(|it| it.num_bytes()).sum();
        let sets = self.sets.iter().map(|(name, set)| (name.clone(), bytes(set)));
        MemoryReport { base: self.base.parameters().base_bytes, sets: sets.collect() }
    }

    /// The base.
    pub fn base(&self) -> &M {
        &self.base
    }

    /// The model for a batch in which each sample uses the set of its name, or the base alone. It can be used
    /// again for the next batch of the same names.
    ///
    /// # Errors
    ///
    /// [`LoraError::UnknownAdapters`] if there is no set of a name.
    ///
    /// # Panics
    ///
    /// If there are no samples.
    pub fn batch<S: AsRef<str>>(&self, samples: &[Option<S>]) -> Result<MixedBatch<M>, LoraError> {
        assert!(!samples.is_empty(), "a batch must have samples");
        let name = |sample: usize| samples[sample].as_ref().map(AsRef::as_ref);
        let unknown: Vec<_> = (0..samples.len())
            .filter_map(name)
            .filter(|it| !self.sets.contains_key(*it))
            .map(str::to_owned)
            .collect();
        if !unknown.is_empty() {
            let available = self.names().map(str::to_owned).collect();
            return Err(LoraError::UnknownAdapters { names: unknown, available });
        }
        let mut order: Vec<_> = (0..samples.len()).collect();
        order.sort_by_key(|&sample| name(sample));
        let groups = order.chunk_by(|&a, &b| name(a) == name(b));
        let groups = groups.map(|it| (it.len(), name(it[0]).map(|name| self.sets[name].clone())));
        let model = mixed(self.base.clone(), groups.collect());
        Ok(MixedBatch { model, order })
    }
}

/// A model for a batch whose samples use different sets of adapters; see [`MultiLora`].
#[derive(Clone, Debug)]
pub struct MixedBatch<M> {
    model: M,
    /// The samples, as they are sorted.
    order: Vec<usize>,
}

impl<M> MixedBatch<M> {
    /// Runs the model on a batch, and returns its result: `[batch, ..]` to `[batch, ..]`. In between, the samples
    /// are sorted.
    ///
    /// # Panics
    ///
    /// If the input or the result has not as many samples as the batch, or a layer gets an input whose first
    /// dimension is not a multiple of that.
    pub fn run<B: Backend, const I: usize, const O: usize, K: BasicOps<B>>(
        &self,
        input: Tensor<B, I, K>,
        pass: impl FnOnce(&M, Tensor<B, I, K>) -> Tensor<B, O>,
    ) -> Tensor<B, O> {
        self.unsorted(pass(&self.model, self.sorted(input)))
    }

    /// The model. It takes inputs that are [sorted](Self::sorted), and its results are to be put
    /// [back](Self::unsorted): this is for models that have several inputs, or several results.
    ///
    /// It is for passes alone. Merging, saving and switching know nothing of its adapters.
    pub fn model(&self) -> &M {
        &self.model
    }

    /// Which sample comes where: the first of the sorted samples is sample `order()[0]` of the batch.
    pub fn order(&self) -> &[usize] {
        &self.order
    }

    /// The samples in the order in which the model takes them: `[batch, ..]`.
    ///
    /// # Panics
    ///
    /// If the first dimension is not the number of samples.
    pub fn sorted<B: Backend, const D: usize, K: BasicOps<B>>(
        &self,
        batch: Tensor<B, D, K>,
    ) -> Tensor<B, D, K> {
        self.select(batch, &self.order)
    }

    /// The samples in the order of the batch again.
    ///
    /// # Panics
    ///
    /// As [`sorted`](Self::sorted).
    pub fn unsorted<B: Backend, const D: usize, K: BasicOps<B>>(
        &self,
        sorted: Tensor<B, D, K>,
    ) -> Tensor<B, D, K> {
        let mut places = vec![0; self.order.len()];
        for (place, &sample) in self.order.iter().enumerate() {
            places[sample] = place;
        }
        self.select(sorted, &places)
    }

    fn select<B: Backend, const D: usize, K: BasicOps<B>>(
        &self,
        batch: Tensor<B, D, K>,
        order: &[usize],
    ) -> Tensor<B, D, K> {
        let (size, samples) = (batch.dims()[0], order.len());
        assert!(
            size == samples,
            "a mixed batch of {samples} samples: expected [{samples}, ..], got {:?}",
            batch.dims(),
        );
        if order.is_sorted() {
            return batch;
        }
        let order: Vec<_> = order.iter().map(|&it| it as i32).collect();
        let device = batch.device();
        batch.select(0, Tensor::<B, 1, Int>::from_data(TensorData::from(&*order), &device))
    }
}
