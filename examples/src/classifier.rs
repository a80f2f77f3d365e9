//! Trains a classifier with burn-train, and evaluates it.

use std::{
    fmt::Debug,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use burn::{
    data::{
        dataloader::{DataLoader, DataLoaderBuilder, batcher::Batcher},
        dataset::InMemDataset,
    },
    lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig,
    module::{AutodiffModule, Module, ModuleDisplay},
    nn::loss::CrossEntropyLossConfig,
    optim::AdamConfig,
    record::{FullPrecisionSettings, NamedMpkFileRecorder},
    tensor::{Int, Tensor, TensorData, backend::Backend},
    train::{
        ClassificationOutput, InferenceStep, Learner, SupervisedTraining, TrainOutput, TrainStep,
        metric::{AccuracyMetric, LossMetric},
    },
};
use burn_lora::{
    Lora, LoraModule,
    nn::Precision,
    train::{AtomicRecorder, Backward, LoraPlus, Workers, last_checkpoint},
};
use burn_lora_llm::{Context, Result, cli::file_name};

use super::{
    backend::{Plain, Train},
    progress::{History, Plan, Reporter, Timed},
    resume::Resumed,
};

/// Something to classify.
pub trait Sample: Clone + Send + Sync + Debug + 'static {
    /// A batch of samples, as a model reads it.
    type Input<B: Backend>: Clone + Send + Debug + 'static;

    /// The number of samples in a training step.
    const BATCH: usize = 64;

    /// The class.
    fn label(&self) -> u8;

    fn stack<B: Backend>(samples: &[Self], device: &B::Device) -> Self::Input<B>;

    /// Batches of the samples. With a seed, each epoch has its own random order.
    fn batches<B: Backend>(
        samples: &[Self],
        seed: Option<u64>,
    ) -> Arc<dyn DataLoader<B, Vec<Self>>> {
        shuffled(DataLoaderBuilder::new(AsTheyAre).batch_size(Self::BATCH), seed)
            .build(InMemDataset::new(samples.to_vec()))
    }
}

/// Leaves the samples to the workers, each of which stacks its own.
#[derive(Clone)]
struct AsTheyAre;

impl<B: Backend, S: Sample> Batcher<B, S, Vec<S>> for AsTheyAre {
    fn batch(&self, samples: Vec<S>, _: &B::Device) -> Vec<S> {
        samples
    }
}

/// Makes the loader shuffle, if there is a seed.
pub fn shuffled<B: Backend, I, O>(
    builder: DataLoaderBuilder<B, I, O>,
    seed: Option<u64>,
) -> DataLoaderBuilder<B, I, O>
where
    I: Send + Sync + Clone + Debug + 'static,
    O: Send + Clone + Debug + 'static,
{
    match seed {
        Some(seed) => builder.shuffle(seed),
        None => builder,
    }
}

/// Images as rows of values from 0 to 1: `[batch, pixels]`.
pub fn stack_images<'a, B: Backend>(
    images: impl ExactSizeIterator<Item = &'a [u8]>,
    device: &B::Device,
) -> Tensor<B, 2> {
    let rows = images.len();
    let values: Vec<f32> = images.flatten().map(|byte| f32::from(*byte) / 255.0).collect();
    let shape = [rows, values.len() / rows];
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// A model that computes a logit per class for each sample.
pub trait Classifier<B: Backend> {
    type Sample: Sample;

    /// The logits: `[batch, classes]`.
    fn logits(&self, input: <Self::Sample as Sample>::Input<B>) -> Tensor<B, 2>;

    fn classify(&self, samples: &[Self::Sample]) -> ClassificationOutput<B> {
        let device = Default::default();
        let labels: Vec<i32> = samples.iter().map(|sample| i32::from(sample.label())).collect();
        let labels = Tensor::<B, 1, Int>::from_ints(&*labels, &device);
        let logits = self.logits(Self::Sample::stack(samples, &device));
        let loss = CrossEntropyLossConfig::new().init(&device);
        let loss = loss.forward(logits.clone(), labels.clone());
        ClassificationOutput::new(loss, logits, labels)
    }
}

/// A model in the form that burn-train expects. Its checkpoints hold only what trains.
#[derive(Module, Debug)]
struct Task<B: Backend, M> {
    model: Lora<B, M>,
    #[module(skip)]
    workers: Arc<Workers>,
}

impl<M: Learns> TrainStep for Task<Train, M> {
    type Input = Vec<SampleOf<M>>;
    type Output = ClassificationOutput<Train>;

    /// The workers share the samples.
    fn step(&self, samples: Self::Input) -> TrainOutput<Self::Output> {
        let size = samples.len().div_ceil(self.workers.count());
        let parts: Vec<_> = samples.chunks(size).enumerate().collect();
        let outputs = Mutex::new(vec![None; parts.len()]);
        let Backward { loss, gradients } =
            self.workers.backward(&self.model, parts, |model, (index, part)| {
                let output = model.classify(part);
                let share = part.len() as f64 / samples.len() as f64;
                outputs.lock().expect(UNPOISONED)[index] =
                    Some((output.output.detach(), output.targets));
                Backward::new(model, output.loss * share)
            });
        let outputs = outputs.into_inner().expect(UNPOISONED).into_iter().flatten();
        let (logits, labels) = outputs.unzip();
        let loss = Tensor::from_floats([loss], &Default::default());
        let item = ClassificationOutput::new(loss, Tensor::cat(logits, 0), Tensor::cat(labels, 0));
        TrainOutput { grads: gradients, item }
    }
}

const UNPOISONED: &str = "nobody panics with the lock";

impl<M: Classifier<Plain> + Module<Plain> + ModuleDisplay> InferenceStep for Task<Plain, M> {
    type Input = Vec<M::Sample>;
    type Output = ClassificationOutput<Plain>;

    fn step(&self, samples: Self::Input) -> Self::Output {
        self.model.classify(&samples)
    }
}

/// A model that [`fit`] can train.
pub trait Learns:
    AutodiffModule<
        Train,
        InnerModule: Classifier<Plain, Sample = <Self as Classifier<Train>>::Sample>
                         + ModuleDisplay
                         + 'static,
    > + Classifier<Train>
    + ModuleDisplay
    + 'static
{
}

impl<M> Learns for M
where
    M: Classifier<Train> + AutodiffModule<Train> + ModuleDisplay + 'static,
    M::InnerModule:
        Classifier<Plain, Sample = <M as Classifier<Train>>::Sample> + ModuleDisplay + 'static,
{
}

/// How to train.
pub struct Recipe<'a> {
    /// The name of the training in the output.
    pub name: &'a str,
    /// The learning rate at the start. It falls to zero along a cosine.
    pub learning_rate: f64,
    pub epochs: usize,
    pub seed: u64,
    /// The learning rate of B as a multiple of A's (LoRA+).
    pub lora_plus: f64,
    /// The precision of the products of layers, in the training alone.
    pub precision: Precision,
    /// The number of threads that share a step.
    pub workers: usize,
    /// Where to start. `None` means from the model, without checkpoints.
    pub start: Option<Start>,
    /// The directory for the logs. Each training gets a directory in it.
    pub logs: PathBuf,
}

/// Where a training with checkpoints starts.
#[derive(Clone, Copy, PartialEq)]
pub enum Start {
    /// From the model as it is.
    Fresh,
    /// From the last checkpoint, if there is one.
    Checkpoint,
}

type Recorder = AtomicRecorder<NamedMpkFileRecorder<FullPrecisionSettings>>;

/// Trains what is trainable in `model`, with Adam.
pub fn fit<M: Learns>(
    recipe: &Recipe,
    model: Lora<Train, M>,
    samples: &[SampleOf<M>],
    test: &[SampleOf<M>],
) -> Result<(Trained<M>, History)> {
    let dir = recipe.logs.join(file_name(recipe.name));
    let (done, history) = match recipe.start {
        Some(Start::Checkpoint) => last_epoch(&dir)?,
        _ => (0, History::default()),
    };
    // burn-train would read old logs as those of this run, from the first epoch on.
    let stale =
        if done > 0 { vec![dir.join("train"), dir.join("valid")] } else { vec![dir.clone()] };
    for dir in stale.into_iter().filter(|dir| dir.exists()) {
        fs::remove_dir_all(&dir).context(dir.display())?;
    }
    let history = Arc::new(Mutex::new(history));
    let batches = SampleOf::<M>::batches::<Train>(samples, Some(recipe.seed));
    let batches = Arc::new(Resumed::new(batches, done));
    let timed = Timed { loader: batches, history: history.clone() };
    let test = SampleOf::<M>::batches::<Plain>(test, None);
    let plan = Plan {
        epochs: recipe.epochs,
        done,
        train_items: timed.num_items(),
        test_items: test.num_items(),
    };
    let mut training = SupervisedTraining::new(&dir, Arc::new(timed), test)
        .metrics((AccuracyMetric::new(), LossMetric::new()))
        .with_application_logger(None)
        .num_epochs(recipe.epochs);
    if recipe.start.is_some() {
        training = training.with_file_checkpointer(Recorder::default());
    }
    if done > 0 {
        println!("{:<24} goes on after epoch {done}/{}", recipe.name, recipe.epochs);
        training = training.checkpoint(done);
    }
    let kept = recipe.start.is_some().then(|| dir.clone());
    let interrupter = training.interrupter();
    let reporter = Reporter::new(recipe.name, plan, history.clone(), kept);
    let steps = recipe.epochs * samples.len().div_ceil(SampleOf::<M>::BATCH);
    let schedule = CosineAnnealingLrSchedulerConfig::new(recipe.learning_rate, steps);
    let schedule = schedule.init().expect("the learning rate and the number of steps are positive");
    // With a ratio of 1 this is plain Adam.
    let adam = LoraPlus::new(AdamConfig::new().init::<Train, Task<Train, M>>(), recipe.lora_plus);
    let workers = Arc::new(Workers::new(recipe.workers));
    let model = model.with_precision(recipe.precision);
    let learner = Learner::new(Task { model, workers }, adam, schedule);
    let result = training.renderer(reporter).launch(learner);
    // Clears the progress from the terminal.
    drop(result.renderer);
    // burn-train stops if it cannot write a checkpoint.
    if interrupter.should_stop() {
        let reason = interrupter.get_message().unwrap_or_default();
        return Err(format!("{}: stopped: {reason}", dir.display()));
    }
    let history = history.lock().expect(UNPOISONED).clone();
    Ok((result.model.model.with_precision(Precision::F32), history))
}

/// The last complete epoch in `dir`, and the history up to it.
fn last_epoch(dir: &Path) -> Result<(usize, History)> {
    let checkpoint = last_checkpoint(dir).context(dir.display())?.unwrap_or(0);
    let mut history = History::read(dir)?;
    // The history may be one epoch behind. The last two epochs have checkpoints.
    let done = checkpoint.min(history.accuracies.len());
    if done + 1 < checkpoint {
        let known = history.accuracies.len();
        return Err(format!(
            "{}: there is a checkpoint of epoch {checkpoint}, and history.json knows {known} epochs",
            dir.display(),
        ));
    }
    history.truncate(done);
    Ok((done, history))
}

/// A trained model.
pub type Trained<M> = Lora<Plain, <M as AutodiffModule<Train>>::InnerModule>;

/// The samples of a model.
pub type SampleOf<M> = <M as Classifier<Train>>::Sample;

/// The logits of all samples, one row each.
pub fn logits<M: Classifier<Plain>>(model: &M, samples: &[M::Sample]) -> Tensor<Plain, 2> {
    let batches = samples.chunks(200);
    let batches =
        batches.map(|samples| model.logits(M::Sample::stack(samples, &Default::default())));
    Tensor::cat(batches.collect(), 0)
}

/// The percentage of samples whose largest logit is that of their class.
pub fn accuracy(logits: Tensor<Plain, 2>, samples: &[impl Sample]) -> f64 {
    let classes = logits.argmax(1).into_data().convert::<i64>().to_vec::<i64>();
    let classes = classes.expect("the data was converted to this type");
    let right = classes.iter().zip(samples);
    let right = right.filter(|(class, it)| **class == i64::from(it.label()));
    100.0 * right.count() as f64 / samples.len() as f64
}
