//! The experiment of several examples: trains a base on one task, adapts it to another task with different
//! methods, and compares these.
//!
//! [`Experiment::train_base`], [`Experiment::compare`] and [`Experiment::finish`] are its steps.

mod options;
mod results;

use std::time::Duration;

use burn::{
    module::Module,
    tensor::{Device, Tensor, backend::Backend},
};
use burn_lora::{
    Lora, LoraAdapters, LoraConfig, LoraModule, peft::Renaming, report::ParameterReport,
};
use burn_lora_llm::{
    Context, Result,
    cli::{file_name, live::during, size_of_files},
};
use serde::Serialize;

pub use options::{Options, default, default_if, help};
pub use results::{Ending, Method, Results, draw_curves};

use super::{
    backend::{Plain, Train},
    classifier::{Classifier, Learns, Recipe, Sample, Trained, accuracy, fit, logits},
    tensors::{bits, largest},
};

/// The samples of a task.
pub struct Samples<'a, S> {
    pub train: &'a [S],
    /// What is evaluated after each epoch.
    pub watched: &'a [S],
    pub test: &'a [S],
}

impl<'a, S> Samples<'a, S> {
    /// Evaluates on all of `test` after each epoch.
    pub fn new(train: &'a [S], test: &'a [S]) -> Self {
        Self { train, watched: test, test }
    }

    pub fn none() -> Self {
        Self::new(&[], &[])
    }
}

/// Two tasks, and how to train.
pub struct Experiment<'a, S> {
    pub options: &'a Options,
    pub config: LoraConfig,
    /// The task of the base. It has no samples if it is another kind of task.
    pub old: Samples<'a, S>,
    /// The task that the base is adapted to.
    pub new: Samples<'a, S>,
    /// From the names of the model's modules in Python to their paths here.
    pub names: Renaming,
}

/// A trained base, and its accuracy on both tasks.
pub struct Base<M: Learns> {
    model: M::InnerModule,
    /// Those of the test samples of the old task.
    logits: Tensor<Plain, 2>,
    /// In percent.
    pub accuracy_old: f64,
    pub accuracy_new: f64,
}

impl<M: Learns> Base<M> {
    /// A copy to train.
    pub fn to_train(&self) -> M {
        M::from_inner(self.model.clone())
    }
}

/// A method that trains only some of the base's layers.
pub struct Part<'a> {
    pub name: &'a str,
    /// Patterns of the layers' names.
    pub layers: &'a [&'a str],
    pub learning_rate: f64,
}

impl Part<'_> {
    /// Trains only the layer `head`, at the learning rate of LoRA.
    pub fn last_layer(options: &Options) -> Self {
        let learning_rate = options.lora_learning_rate;
        Self { name: "last layer", layers: &["head"], learning_rate }
    }
}

/// The base, and the results of the methods.
pub struct Comparison<M: Learns> {
    pub base: Base<M>,
    pub methods: Vec<Method>,
    /// The base with adapters.
    adapted: Trained<M>,
}

impl<'a, S: Sample> Experiment<'a, S> {
    pub fn new(
        options: &'a Options,
        config: LoraConfig,
        old: Samples<'a, S>,
        new: Samples<'a, S>,
    ) -> Self {
        Self { options, config, old, new, names: Renaming::default() }
    }

    /// Trains a base on the old task. `init` creates the model, with random numbers from the seed.
    pub fn train_base<M: Learns + Classifier<Train, Sample = S>>(
        &self,
        recipe: &Recipe,
        init: impl FnOnce(&Device<Train>) -> M,
    ) -> Result<Base<M>> {
        let device = Default::default();
        Plain::seed(&device, self.options.seed);
        let model = init(&device);
        // Reports wrong targets before the training. The clone draws the initial values, in the order of the
        // model's fields.
        model.clone().with_own_statistics().attach(&self.config).context("attaching adapters")?;
        let model = model.with_own_statistics();
        let model = model.train_only(&[".*"]).context("training the base")?;
        let (model, _) = fit(recipe, model, self.old.train, self.old.test)?;
        Ok(self.evaluate(model))
    }

    /// Evaluates a trained base on both tasks.
    pub fn evaluate<M: Learns + Classifier<Train, Sample = S>>(&self, base: Trained<M>) -> Base<M> {
        let model = base.into_inner();
        let [old, new] = [self.old.test, self.new.test];
        let [old_logits, new_logits] =
            during("testing the base", || [old, new].map(|test| logits(&model, test)));
        let accuracy_old = accuracy(old_logits.clone(), old);
        Base { model, logits: old_logits, accuracy_old, accuracy_new: accuracy(new_logits, new) }
    }

    /// Adapts the base to the new task by full fine-tuning, by LoRA, and by training a part of it. Draws the
    /// losses and accuracies of the three.
    pub fn compare<M: Learns + Classifier<Train, Sample = S>>(
        &self,
        base: Base<M>,
        part: &Part,
    ) -> Result<Comparison<M>> {
        // Only norms of Burn's need this.
        let start = base.to_train().with_own_statistics();
        let full = start.train_only(&[".*"]).context("full fine-tuning")?;
        let lora = start.attach(&self.config).context("attaching adapters")?;
        let frozen = start.train_only(part.layers).context("freezing")?;
        println!("{}\n", lora.parameters());
        let adapt = |name, model, learning_rate| {
            self.adapt(&self.options.recipe(name, learning_rate), model, &self.new)
        };
        let (full, _) = adapt("full fine-tuning", full, self.options.learning_rate)?;
        let (lora, adapted) = adapt("LoRA", lora, self.options.lora_learning_rate)?;
        let (frozen, _) = adapt(part.name, frozen, part.learning_rate)?;
        let methods = vec![full, lora, frozen];
        draw_curves(&self.options.curves(), &methods, base.accuracy_new)?;
        Ok(Comparison { base, methods, adapted })
    }

    /// Trains a model on a new task, and evaluates it on this and on the old one. Saves its adapters.
    pub fn adapt<M: Learns + Classifier<Train, Sample = S>>(
        &self,
        recipe: &Recipe,
        model: Lora<Train, M>,
        new: &Samples<S>,
    ) -> Result<(Method, Trained<M>)> {
        let ParameterReport { trainable, total, layers, .. } = model.parameters();
        let adapted = layers.iter().any(|layer| layer.adapter.is_some());
        let old_accuracy = |model: &M::InnerModule| {
            let old = (!self.old.test.is_empty()).then_some(self.old.test);
            old.map(|test| accuracy(logits(model, test), test))
        };
        let (model, history) = fit(recipe, model, new.train, new.watched)?;
        let seconds = history.durations.iter().sum::<Duration>().as_secs_f64();
        let (accuracy_new, accuracy_old, accuracy_old_switched_off) =
            during(&format!("testing {}", recipe.name), || {
                let accuracy_new = accuracy(logits(&*model, new.test), new.test);
                let detached = adapted.then(|| old_accuracy(&model.detach())).flatten();
                (accuracy_new, old_accuracy(&model), detached)
            });
        let method = Method {
            name: recipe.name.to_owned(),
            trainable,
            total,
            epoch_seconds: seconds / history.durations.len() as f64,
            accuracy_new,
            accuracy_old,
            accuracy_old_switched_off,
            bytes: match adapted {
                true => self.save(recipe.name, model.adapters())?,
                false => (trainable * size_of::<f32>()) as u64,
            },
            history,
        };
        Ok((method, model))
    }

    /// Merges and detaches the adapters, and reports the results. `own` is what the example adds to
    /// `summary.json`.
    pub fn finish<M: Learns + Classifier<Train, Sample = S>>(
        &self,
        comparison: Comparison<M>,
        own: &impl Serialize,
    ) -> Result<()> {
        let Comparison { base, methods, adapted } = comparison;
        let restored = logits(&adapted.detach(), self.old.test);
        let ending = Ending {
            max_abs_logit_diff_merged: self.merge(&adapted)?,
            base_restored_exactly: bits(restored) == bits(base.logits),
        };
        println!(
            "Without them, the model computes {} what the base does: {:.2} %.\n",
            ending.exactly(),
            base.accuracy_old,
        );
        let (base_accuracy_old, base_accuracy_new) = (Some(base.accuracy_old), base.accuracy_new);
        let results = Results { base_accuracy_old, base_accuracy_new, methods, ending };
        results.report(self.options, own)
    }

    /// Merges the adapters, and returns the largest change of a logit: next to nothing.
    pub fn merge<M: Module<Plain> + Classifier<Plain, Sample = S>>(
        &self,
        adapted: &Lora<Plain, M>,
    ) -> Result<f64> {
        let merged = adapted.merge().context("merging")?;
        let before = logits(&**adapted, self.new.test);
        let change = largest(logits(&merged, self.new.test) - before.clone());
        println!(
            "\nMerging the adapters changes the logits by at most {change:.1e} (they are up to {:.0}).",
            largest(before),
        );
        Ok(change)
    }

    /// Saves the adapters under their names in Python, and returns the size of the files.
    fn save(&self, name: &str, adapters: LoraAdapters<Plain>) -> Result<u64> {
        let dir = self.options.adapters().join(file_name(name));
        let adapters = adapters.renamed(&self.names.inverse()).context("renaming the adapters")?;
        adapters.save(&dir).context("saving the adapters")?;
        size_of_files(&dir)
    }
}
