//! The adapters of a model, as a value, and what combining them needs.

mod combine;
pub(crate) mod low_rank;
pub(crate) mod peft_targets;
pub(crate) mod renaming;

use std::{collections::BTreeMap, fmt};

use burn::tensor::{ElementConversion, Tensor, TensorData, backend::Backend};
use sha2::{Digest, Sha256};

use crate::{
    adapter::LoraAdapter,
    error::{shown, some_of},
    table::{grouped, table},
};
use peft_targets::{Targets, within_any};

pub use combine::Combination;
pub use low_rank::Approximation;
use renaming::Renaming;

/// Fields of PEFT's configuration that say what the adapters are for.
pub(crate) const BASE_MODEL: &str = "base_model_name_or_path";
pub(crate) const TASK_TYPE: &str = "task_type";

/// The adapters of a whole model, by the paths of its layers, separate from the model.
///
/// [`Lora::adapters`](crate::Lora::adapters) takes such a set from a model, and
/// [`LoraModule::switch`](crate::LoraModule::switch) puts one on a model. [`save`](Self::save) and
/// [`load`](Self::load) store it as a directory that Python's PEFT library reads and writes. Besides the
/// adapters, a set holds the parameters that were trained in full, such as a new head.
///
/// ```no_run
/// use burn::{module::Module, tensor::backend::Backend};
/// use burn_lora::{Lora, LoraAdapters, LoraError, LoraModule};
///
/// fn adapted<B: Backend, M: Module<B>>(
///     base: &M,
///     device: &B::Device,
/// ) -> Result<Lora<B, M>, LoraError> {
///     let adapters = LoraAdapters::load("adapters/rotated", device)?;
///     println!("{adapters}");
///     base.switch(&adapters)
/// }
/// ```
///
/// If the same model in Python has other module names, use a [`Renaming`] to exchange adapters.
#[derive(Clone, Debug)]
pub struct LoraAdapters<B: Backend> {
    /// Boxed, because the nodes of a map allocate space for more values than they hold.
    pub(crate) adapters: BTreeMap<String, Box<LoraAdapter<B>>>,
    /// The parameters that were trained in full, by PyTorch's names and in PyTorch's layout. Only a
    /// model knows which of them Burn stores transposed.
    pub(crate) extras: BTreeMap<String, Extra<B>>,
    /// The modules that the parameters in `extras` belong to.
    pub(crate) modules_to_save: Vec<String>,
    /// The layers that the configuration in a file targets, if the set was loaded from one.
    pub(crate) targets: Option<Targets>,
    /// The renamings from the paths here to the names in the file, which `targets` uses.
    pub(crate) names_in_file: Vec<Renaming>,
    /// The fields of a file's configuration that this crate does not use. They are saved again.
    pub(crate) config: BTreeMap<String, serde_json::Value>,
    /// The keys in the file that were not used.
    pub(crate) unused: Vec<String>,
}

/// A tensor of any rank.
#[derive(Clone, Debug)]
pub(crate) struct Extra<B: Backend> {
    /// The elements, row by row.
    pub values: Tensor<B, 1>,
    pub shape: Vec<usize>,
    /// Whether it may be the weight of Hugging Face's `Conv1D`, `[d_input, d_output]`, which is the
    /// transpose of a `Linear`'s.
    pub may_be_conv1d: bool,
}

impl<B: Backend> LoraAdapters<B> {
    /// A set of the given adapters, by the paths of their layers.
    pub fn new<S: Into<String>>(adapters: impl IntoIterator<Item = (S, LoraAdapter<B>)>) -> Self {
        Self {
            adapters: adapters.into_iter().map(|(path, it)| (path.into(), Box::new(it))).collect(),
            extras: BTreeMap::new(),
            modules_to_save: Vec::new(),
            targets: None,
            names_in_file: Vec::new(),
            config: BTreeMap::new(),
            unused: Vec::new(),
        }
    }

    /// The same set with the name of its base, `base_model_name_or_path` in PEFT's configuration: a name on Hugging
    /// Face's hub, or a path. `AutoPeftModelForCausalLM` and its kin load the base by it. A set that was made here
    /// has none; one that was loaded keeps what its file says.
    pub fn with_base_model(self, name: impl Into<String>) -> Self {
        self.with_field(BASE_MODEL, name.into())
    }

    /// The same set with the task of its base, `task_type` in PEFT's configuration, such as `CAUSAL_LM` or
    /// `SEQ_CLS`, by which these classes know whether the set is for them. A set that was made here has none; one
    /// that was loaded keeps what its file says.
    pub fn with_task_type(self, task: impl Into<String>) -> Self {
        self.with_field(TASK_TYPE, task.into())
    }

    /// The name of its base, if it was [told](Self::with_base_model) or a file says it.
    pub fn base_model(&self) -> Option<&str> {
        self.config.get(BASE_MODEL)?.as_str()
    }

    fn with_field(mut self, name: &str, value: String) -> Self {
        self.config.insert(name.to_owned(), value.into());
        self
    }

    /// The adapter of the layer at `path`.
    pub fn get(&self, path: &str) -> Option<&LoraAdapter<B>> {
        self.adapters.get(path).map(Box::as_ref)
    }

    /// The layers' paths and adapters, in alphabetical order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &LoraAdapter<B>)> {
        self.adapters.iter().map(|(path, adapter)| (path.as_str(), adapter.as_ref()))
    }

    /// The keys in the file that the set was loaded from that are not used. In PEFT's directories, PEFT does not use
    /// them either: the weight or the bias of an adapted layer under its plain name, `base_model.model.fc.weight`. PEFT
    /// knows an adapted layer's own parameters as `fc.base_layer.weight` only. In files of image models, they belong
    /// to parts that the model does not have, such as text encoders.
    pub fn unused(&self) -> &[String] {
        &self.unused
    }

    /// Whether the file that the set was loaded from targets the layer at `path`, so that its tensors must be there.
    pub(crate) fn is_target(&self, path: &str, is_linear: bool) -> bool {
        let targets = self.targets.as_ref();
        targets.is_some_and(|targets| targets.require(&self.name_in_file(path), is_linear))
    }

    /// Whether the file that the set was loaded from must hold the parameter `name`, because a module that it is in was
    /// trained in full.
    pub(crate) fn must_hold(&self, name: &str) -> bool {
        self.targets.as_ref().is_some_and(|targets| targets.saves(&self.name_in_file(name)))
    }

    /// Whether it takes the parameters of a model to find out whether anything is missing in the file that the set was
    /// loaded from.
    pub(crate) fn asks_for_parameters(&self) -> bool {
        self.targets.as_ref().is_some_and(Targets::ask_for_parameters)
    }

    /// The targets in the file that the set was loaded from that match none of the layers at `paths`.
    pub(crate) fn unmatched_targets(&self, paths: &[String]) -> Vec<String> {
        let names: Vec<_> = paths.iter().map(|path| self.name_in_file(path)).collect();
        let targets = self.targets.as_ref();
        targets.map_or(vec![], |it| it.unmatched(names.iter().map(String::as_str)))
    }

    /// Whether the parameter `name` trains, or was only saved because PEFT does so.
    pub(crate) fn trains_in_full(&self, name: &str) -> bool {
        let is_bias = name == "bias" || name.ends_with(".bias");
        is_bias || within_any(&self.modules_to_save, name)
    }

    /// The same updates by A and B alone, as files have them.
    pub(crate) fn standalone(&self) -> Self {
        let mut set = self.clone();
        for adapter in set.adapters.values_mut() {
            **adapter = adapter.standalone();
        }
        set
    }

    fn name_in_file(&self, path: &str) -> String {
        self.names_in_file.iter().fold(path.to_owned(), |path, names| names.apply(&path))
    }

    /// The number of adapters.
    pub fn len(&self) -> usize {
        self.adapters.len()
    }

    /// Whether there are no adapters.
    pub fn is_empty(&self) -> bool {
        self.adapters.is_empty()
    }

    /// The number of parameters that train, including those that were trained in full.
    pub fn num_params(&self) -> usize {
        let adapters = self.adapters.values().map(|it| it.num_trainable());
        adapters.chain(self.extras.values().map(Extra::num_elements)).sum()
    }

    /// The number of bytes that the parameters take in memory.
    pub fn num_bytes(&self) -> usize {
        let adapters = self.adapters.values().map(|it| it.num_bytes());
        let extras = self.extras.values().map(|it| it.num_elements() * it.values.dtype().size());
        adapters.chain(extras).sum()
    }

    /// 32 hexadecimal digits that distinguish this set from others: the same for the same layers, scales and
    /// bits, wherever they are. It is the beginning of a SHA-256.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        let mut add = |name: &str, numbers: &TensorData| {
            hash.update(format!("{name} {:?} {:?}\n", numbers.shape, numbers.dtype));
            hash.update(numbers.as_bytes());
        };
        for (path, adapter) in self.iter() {
            // The digits of a float tell it exactly.
            let name = format!("{path} {:?} {:?}", adapter.scale(), adapter.tie);
            let [a, b] = adapter.factors();
            add(&name, &a.into_data());
            add("b", &b.into_data());
            for (name, vector) in [("bias", &adapter.bias), ("magnitude", &adapter.magnitude)] {
                if let Some(vector) = vector {
                    add(name, &vector.val().into_data());
                }
            }
        }
        for (name, extra) in &self.extras {
            add(&format!("{name} {:?}", extra.shape), &extra.values.to_data());
        }
        hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
    }
}

impl<B: Backend> Extra<B> {
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The matrix, transposed.
    pub fn transposed(&self) -> Self {
        let [rows, columns] = self.shape[..] else { panic!("{:?} is not a matrix", self.shape) };
        let values = self.values.clone();
        // A vector stays as it is: Burn's wgpu backend gets the reshape of a transposed one wrong.
        let values = match rows == 1 || columns == 1 {
            true => values,
            false => values.reshape([rows, columns]).transpose().reshape([rows * columns]),
        };
        Self { values, shape: vec![columns, rows], ..*self }
    }

    /// Whether both have the same shape and elements.
    pub fn equals(&self, other: &Self) -> bool {
        let equal = || self.values.clone().equal(other.values.clone()).all().into_scalar().elem();
        self.shape == other.shape && equal()
    }
}

impl<B: Backend> fmt::Display for LoraAdapters<B> {
    /// A table of the layers, and a line with the totals.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shape =
            |dims: &[usize]| dims.iter().map(usize::to_string).collect::<Vec<_>>().join("x");
        let mut rows = Vec::new();
        for (path, adapter) in &self.adapters {
            rows.push([
                shown(path),
                shape(&adapter.shape()),
                adapter.rank().to_string(),
                format!("{:.4}", adapter.scale()),
                grouped(adapter.num_trainable()),
            ]);
        }
        for (name, extra) in &self.extras {
            let (shape, parameters) = (shape(&extra.shape), grouped(extra.num_elements()));
            rows.push([shown(name), shape, "full".to_owned(), String::new(), parameters]);
        }
        let headers = ["layer", "weight", "rank", "scale", "parameters"];
        let (parameters, bytes) = (grouped(self.num_params()), grouped(self.num_bytes()));
        writeln!(f, "{}", table(&headers, &rows))?;
        write!(f, "{} adapters, {parameters} parameters, {bytes} bytes", self.len())?;
        match self.unused.as_slice() {
            [] => Ok(()),
            unused => write!(f, "\nnot used: {}", some_of(unused)),
        }
    }
}
