//! Training and judging a classifier of images with burn-train.

use std::{
    path::Path,
    sync::{Arc, Mutex},
};

use burn::{
    data::{
        dataloader::{DataLoader, DataLoaderBuilder, batcher::Batcher},
        dataset::InMemDataset,
    },
    lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig,
    module::AutodiffModule,
    nn::loss::CrossEntropyLossConfig,
    optim::AdamConfig,
    tensor::{Int, Tensor, TensorData, backend::Backend},
    train::{
        ClassificationOutput, InferenceStep, Learner, SupervisedTraining, TrainStep,
        metric::{AccuracyMetric, LossMetric},
    },
};

use super::{
    backend::{Plain, Train},
    file_name,
    progress::{History, Reporter, Timed},
};

const BATCH: usize = 64;

/// An image and what it shows.
pub trait Picture: Clone + Send + Sync + std::fmt::Debug + 'static {
    /// The values of its pixels.
    fn pixels(&self) -> &[u8];

    /// The class.
    fn label(&self) -> u8;
}

/// Images and what they show.
#[derive(Clone, Debug)]
pub struct Images<B: Backend> {
    /// Values from 0 to 1: `[batch, pixels]`.
    pub pixels: Tensor<B, 2>,
    /// The classes: `[batch]`.
    pub labels: Tensor<B, 1, Int>,
}

#[derive(Clone)]
struct Stack;

impl<B: Backend, P: Picture> Batcher<B, P, Images<B>> for Stack {
    fn batch(&self, items: Vec<P>, device: &B::Device) -> Images<B> {
        let bytes = items.iter().flat_map(|picture| picture.pixels());
        let pixels: Vec<f32> = bytes.map(|byte| f32::from(*byte) / 255.0).collect();
        let labels: Vec<i32> = items.iter().map(|picture| i32::from(picture.label())).collect();
        let shape = [items.len(), pixels.len() / items.len()];
        Images {
            pixels: Tensor::from_data(TensorData::new(pixels, shape), device),
            labels: Tensor::from_data(TensorData::new(labels, [items.len()]), device),
        }
    }
}

/// A model that gives each image a logit per class: `[batch, pixels]` to `[batch, classes]`.
pub trait Classifier<B: Backend> {
    fn logits(&self, pixels: Tensor<B, 2>) -> Tensor<B, 2>;

    fn classify(&self, images: Images<B>) -> ClassificationOutput<B> {
        let logits = self.logits(images.pixels);
        let loss = CrossEntropyLossConfig::new().init(&logits.device());
        let loss = loss.forward(logits.clone(), images.labels.clone());
        ClassificationOutput::new(loss, logits, images.labels)
    }
}

/// How to train.
pub struct Recipe<'a> {
    /// What it is called in the progress.
    pub name: &'a str,
    /// The learning rate to start with; it falls to zero along a cosine.
    pub learning_rate: f64,
    pub epochs: usize,
    pub seed: u64,
    /// The directory in which burn-train gets one for its logs.
    pub logs: &'a Path,
}

/// Trains what is trainable in `model`, with Adam.
pub fn fit<M, P: Picture>(
    recipe: &Recipe,
    model: M,
    pictures: &[P],
    test: &[P],
) -> (M::InnerModule, History)
where
    M: AutodiffModule<Train>
        + TrainStep<Input = Images<Train>, Output = ClassificationOutput<Train>>
        + std::fmt::Display
        + 'static,
    M::InnerModule:
        InferenceStep<Input = Images<Plain>, Output = ClassificationOutput<Plain>> + 'static,
{
    let history = Arc::new(Mutex::new(History::default()));
    let dir = recipe.logs.join(file_name(recipe.name));
    // burn-train adds to the logs that it finds.
    let _ = std::fs::remove_dir_all(&dir);
    let batches = loader::<Train, P>(pictures, Some(recipe.seed));
    let timed = Timed { loader: batches, history: history.clone() };
    let training = SupervisedTraining::new(&dir, Arc::new(timed), loader::<Plain, P>(test, None))
        .metrics((AccuracyMetric::new(), LossMetric::new()))
        .with_application_logger(None)
        .num_epochs(recipe.epochs);
    let reporter = Reporter::new(recipe.name, training.interrupter(), history.clone());
    let steps = recipe.epochs * pictures.len().div_ceil(BATCH);
    let schedule = CosineAnnealingLrSchedulerConfig::new(recipe.learning_rate, steps);
    let schedule = schedule.init().expect("the learning rate and the number of steps are positive");
    let learner = Learner::new(model, AdamConfig::new().init::<Train, M>(), schedule);
    let result = training.renderer(reporter).launch(learner);
    // The renderer ends with its thread, and lets go of the terminal.
    drop(result.renderer);
    let history = history.lock().expect("nobody panics with the lock").clone();
    (result.model, history)
}

/// The logits of all images, one row each.
pub fn logits<M: Classifier<Plain>>(model: &M, pictures: &[impl Picture]) -> Tensor<Plain, 2> {
    let batches = pictures.chunks(500).map(|pictures| {
        let images: Images<Plain> = Stack.batch(pictures.to_vec(), &Default::default());
        model.logits(images.pixels)
    });
    Tensor::cat(batches.collect(), 0)
}

/// The share of images whose largest logit is that of their class, in percent.
pub fn accuracy(logits: Tensor<Plain, 2>, pictures: &[impl Picture]) -> f64 {
    let classes = logits.argmax(1).into_data().convert::<i64>().to_vec::<i64>();
    let classes = classes.expect("the data was converted to this type");
    let right = classes.iter().zip(pictures);
    let right = right.filter(|(class, it)| **class == i64::from(it.label()));
    100.0 * right.count() as f64 / pictures.len() as f64
}

/// Batches of the images, shuffled anew for each epoch if there is a seed.
fn loader<B: Backend, P: Picture>(
    pictures: &[P],
    seed: Option<u64>,
) -> Arc<dyn DataLoader<B, Images<B>>> {
    let mut builder = DataLoaderBuilder::new(Stack).batch_size(BATCH);
    if let Some(seed) = seed {
        builder = builder.shuffle(seed);
    }
    builder.build(InMemDataset::new(pictures.to_vec()))
}
