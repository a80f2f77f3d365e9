//! A model's adapters as a value.

mod combine;
pub(crate) mod low_rank;

use std::{collections::BTreeMap, fmt};

use burn::tensor::{Tensor, backend::Backend};

use crate::{LoraAdapter, peft::Targets};

pub use combine::Combination;
pub use low_rank::Approximation;

/// The adapters of a whole model, by the paths of its layers, apart from the model. A model that goes
/// by other names in Python says so in [`LoraModule::peft_name`](crate::LoraModule::peft_name); those
/// are then the paths here.
///
/// This is what training produces, what a file holds, and what is swapped: taken from a model by
/// [`LoraModule::adapters`](crate::LoraModule::adapters), put on one by
/// [`LoraModule::switch`](crate::LoraModule::switch), and stored as a directory that Python's PEFT
/// library reads and writes ([`save`](Self::save), [`load`](Self::load)). Besides the adapters it
/// holds the parameters that were trained in full, such as a new head.
///
/// ```no_run
/// use burn::tensor::backend::Backend;
/// use burn_lora::{LoraAdapters, LoraError, LoraModule};
///
/// fn adapted<B: Backend, M: LoraModule<B>>(base: &M, device: &B::Device) -> Result<M, LoraError> {
///     let adapters = LoraAdapters::load("adapters/rotated", device)?;
///     println!("{adapters}");
///     base.switch(&adapters)
/// }
/// ```
#[derive(Clone, Debug)]
pub struct LoraAdapters<B: Backend> {
    /// Boxed, since the nodes of a map leave room for more values than they hold.
    pub(crate) adapters: BTreeMap<String, Box<LoraAdapter<B>>>,
    /// What was trained in full, by PyTorch's name and in PyTorch's layout: only a model knows what
    /// of it to transpose.
    pub(crate) extras: BTreeMap<String, Extra<B>>,
    /// The modules that the extras are the parameters of.
    pub(crate) modules_to_save: Vec<String>,
    /// The layers that the adapters were made for, if a file said so.
    pub(crate) targets: Option<Targets>,
    /// What a file said beyond what this crate uses, to be saved again.
    pub(crate) config: BTreeMap<String, serde_json::Value>,
}

/// A tensor of any rank.
#[derive(Clone, Debug)]
pub(crate) struct Extra<B: Backend> {
    /// The elements, row by row.
    pub values: Tensor<B, 1>,
    pub shape: Vec<usize>,
}

impl<B: Backend> LoraAdapters<B> {
    /// A set of the given adapters, by the paths of their layers.
    pub fn new<S: Into<String>>(adapters: impl IntoIterator<Item = (S, LoraAdapter<B>)>) -> Self {
        Self {
            adapters: adapters.into_iter().map(|(path, it)| (path.into(), Box::new(it))).collect(),
            extras: BTreeMap::new(),
            modules_to_save: Vec::new(),
            targets: None,
            config: BTreeMap::new(),
        }
    }

    /// The adapter of the layer at `path`.
    pub fn get(&self, path: &str) -> Option<&LoraAdapter<B>> {
        self.adapters.get(path).map(Box::as_ref)
    }

    /// The layers' paths and adapters, in alphabetical order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &LoraAdapter<B>)> {
        self.adapters.iter().map(|(path, adapter)| (path.as_str(), adapter.as_ref()))
    }

    /// The number of adapters.
    pub fn len(&self) -> usize {
        self.adapters.len()
    }

    /// Whether there are no adapters.
    pub fn is_empty(&self) -> bool {
        self.adapters.is_empty()
    }

    /// The number of parameters, those trained in full included.
    pub fn num_params(&self) -> usize {
        let adapters = self.adapters.values().map(|it| it.num_trainable());
        adapters.chain(self.extras.values().map(Extra::num_elements)).sum()
    }

    /// The bytes that the parameters take in memory.
    pub fn num_bytes(&self) -> usize {
        let adapters = self.adapters.values();
        let adapters = adapters.map(|it| it.num_trainable() * it.a.dtype().size());
        let extras = self.extras.values().map(|it| it.num_elements() * it.values.dtype().size());
        adapters.chain(extras).sum()
    }
}

impl<B: Backend> Extra<B> {
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }
}

impl<B: Backend> fmt::Display for LoraAdapters<B> {
    /// A table of the layers, and one line on the whole.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.adapters.keys().chain(self.extras.keys());
        let width = names.map(String::len).max().unwrap_or(0).max(5);
        writeln!(
            f,
            "{:<width$}  {:>15}  {:>4}  {:>9}  {:>11}",
            "layer", "weight", "rank", "scale", "parameters"
        )?;
        for (path, adapter) in &self.adapters {
            let [d_input, d_output] = adapter.shape();
            writeln!(
                f,
                "{path:<width$}  {:>15}  {:>4}  {:>9.4}  {:>11}",
                format!("{d_input}x{d_output}"),
                adapter.rank(),
                adapter.scale(),
                adapter.num_trainable(),
            )?;
        }
        for (name, extra) in &self.extras {
            let shape: Vec<_> = extra.shape.iter().map(usize::to_string).collect();
            writeln!(
                f,
                "{name:<width$}  {:>15}  {:>4}  {:>9}  {:>11}",
                shape.join("x"),
                "full",
                "",
                extra.num_elements(),
            )?;
        }
        write!(
            f,
            "{} adapters, {} parameters, {} bytes",
            self.len(),
            self.num_params(),
            self.num_bytes()
        )
    }
}
