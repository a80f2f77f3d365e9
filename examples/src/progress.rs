//! Shows and records the progress of a training with burn-train.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use burn::{
    data::dataloader::{DataLoader, DataLoaderIterator, Progress},
    tensor::backend::Backend,
    train::{
        metric::{MetricDefinition, MetricId, NumericEntry},
        renderer::{
            EvaluationName, EvaluationProgress, MetricState, MetricsRenderer,
            MetricsRendererEvaluation, MetricsRendererTraining, ProgressType, TrainingProgress,
        },
    },
};
use serde::{Deserialize, Serialize};

use burn_lora_llm::{
    Context, Result,
    cli::live::{Live, Position},
    files::write_atomically,
};

/// The record of a training.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct History {
    /// The training loss of every step.
    pub losses: Vec<f64>,
    /// The accuracy after each epoch, in percent.
    pub accuracies: Vec<f64>,
    /// The duration of each epoch, without evaluation.
    pub durations: Vec<Duration>,
}

/// The file next to the checkpoints.
const HISTORY: &str = "history.json";

impl History {
    /// The history saved in `dir`. It is empty if there is none.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(HISTORY);
        match fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            bytes => {
                let bytes = bytes.context(path.display())?;
                serde_json::from_slice(&bytes).context(path.display())
            }
        }
    }

    fn write(&self, dir: &Path) -> Result<()> {
        let path = dir.join(HISTORY);
        let json = serde_json::to_vec(self).context(path.display())?;
        write_atomically(&path, &json).context(path.display())
    }

    /// Keeps only the first epochs.
    pub fn truncate(&mut self, epochs: usize) {
        let steps = self.losses.len() / self.accuracies.len().max(1);
        self.losses.truncate(epochs * steps);
        self.accuracies.truncate(epochs);
        self.durations.truncate(epochs);
    }
}

pub type SharedHistory = Arc<Mutex<History>>;

/// What a pass over a sample costs in training, as a multiple of what it costs in evaluation: a backward
/// pass takes about twice as long as a forward pass.
const TRAINING_COST: usize = 3;

/// What one training has to do.
pub struct Plan {
    pub epochs: usize,
    /// How many of the epochs an earlier run has done.
    pub done: usize,
    /// How many items each epoch trains on.
    pub train_items: usize,
    /// How many items are evaluated after each epoch.
    pub test_items: usize,
}

impl Plan {
    /// How far the training is after the items of an epoch.
    fn position(&self, epoch: usize, trained: usize, tested: usize) -> Position {
        let cost = |trained, tested| (TRAINING_COST * trained + tested) as f64;
        let of_part = cost(trained, tested) / cost(self.train_items, self.test_items);
        let before = epoch.saturating_sub(self.done + 1) as f64;
        let epochs = self.epochs.saturating_sub(self.done).max(1) as f64;
        Position { part: self.part(epoch), of_part, of_all: (before + of_part) / epochs }
    }

    fn part(&self, epoch: usize) -> String {
        format!("epoch {epoch}/{}", self.epochs)
    }
}

/// Shows the progress of one training, and records its [`History`].
pub struct Reporter {
    plan: Plan,
    live: Live,
    history: SharedHistory,
    /// The directory in which the history is saved, if it is.
    kept: Option<PathBuf>,
    /// The metrics' ids and names.
    metrics: Vec<(MetricId, String)>,
    /// Means over the epoch.
    accuracy: Mean,
    loss: Mean,
}

#[derive(Default)]
struct Mean {
    sum: f64,
    count: f64,
}

impl Mean {
    fn add(&mut self, value: f64, count: f64) {
        self.sum += value * count;
        self.count += count;
    }

    fn value(&self) -> f64 {
        self.sum / self.count
    }
}

impl Reporter {
    pub fn new(name: &str, plan: Plan, history: SharedHistory, kept: Option<PathBuf>) -> Self {
        let live = Live::new(name, plan.part(plan.epochs.min(plan.done + 1)));
        Self {
            plan,
            live,
            history,
            kept,
            metrics: Vec::new(),
            accuracy: Mean::default(),
            loss: Mean::default(),
        }
    }

    /// The name, the value and the number of items of a numeric metric.
    fn read(&self, state: &MetricState) -> Option<(&str, f64, f64)> {
        let MetricState::Numeric(entry, value) = state else { return None };
        let name = self.metrics.iter().find(|(id, _)| *id == entry.metric_id)?.1.as_str();
        Some(match value {
            NumericEntry::Value(value) => (name, *value, 1.0),
            NumericEntry::Aggregated { aggregated_value, count } => {
                (name, *aggregated_value, *count as f64)
            }
        })
    }

    fn end_epoch(&mut self, epoch: usize) {
        let [accuracy, loss] = [&mut self.accuracy, &mut self.loss];
        let [accuracy, loss] = [accuracy, loss].map(|mean| std::mem::take(mean).value());
        let mut history = self.history.lock().expect("nobody panics with the lock");
        history.accuracies.push(accuracy);
        if let Some(dir) = &self.kept
            && let Err(error) = history.write(dir)
        {
            self.live.warn(error);
        }
        let seconds = history.durations.last().map_or(0.0, Duration::as_secs_f64);
        self.live.line(format_args!(
            "{}  loss {loss:.4}  accuracy {accuracy:6.2} %  {seconds:6.2} s",
            self.plan.part(epoch),
        ));
    }
}

impl MetricsRendererTraining for Reporter {
    fn update_train(&mut self, state: MetricState) {
        if let Some(("Loss", value, count)) = self.read(&state) {
            self.loss.add(value, count);
            self.history.lock().expect("nobody panics with the lock").losses.push(value);
        }
    }

    fn update_valid(&mut self, state: MetricState) {
        if let Some(("Accuracy", value, count)) = self.read(&state) {
            self.accuracy.add(value, count);
        }
    }

    fn render_train(&mut self, item: TrainingProgress, _: Vec<ProgressType>) {
        if let Some(Progress { items_processed, .. }) = item.progress {
            let epoch = item.global_progress.items_processed;
            let position = self.plan.position(epoch, items_processed, 0);
            self.live.update(&position, self.loss.value());
        }
    }

    fn render_valid(&mut self, item: TrainingProgress, _: Vec<ProgressType>) {
        if let Some(Progress { items_processed, items_total }) = item.progress {
            let epoch = item.global_progress.items_processed;
            let position = self.plan.position(epoch, self.plan.train_items, items_processed);
            self.live.update(&position, self.loss.value());
            if items_processed >= items_total {
                self.end_epoch(epoch);
            }
        }
    }
}

impl MetricsRendererEvaluation for Reporter {
    fn update_test(&mut self, _: EvaluationName, _: MetricState) {}

    fn render_test(&mut self, _: EvaluationProgress, _: Vec<ProgressType>) {}
}

impl MetricsRenderer for Reporter {
    fn manual_close(&mut self) {}

    fn register_metric(&mut self, definition: MetricDefinition) {
        self.metrics.push((definition.metric_id.clone(), definition.name));
    }
}

/// A data loader that records the duration of each epoch, with the work done for each batch.
pub struct Timed<B: Backend, O> {
    pub loader: Arc<dyn DataLoader<B, O>>,
    pub history: SharedHistory,
}

impl<B: Backend, O: 'static> DataLoader<B, O> for Timed<B, O> {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<O> + 'a> {
        let (batches, history) = (self.loader.iter(), self.history.clone());
        Box::new(TimedIterator { batches, history, start: Instant::now() })
    }

    fn num_items(&self) -> usize {
        self.loader.num_items()
    }

    fn to_device(&self, device: &B::Device) -> Arc<dyn DataLoader<B, O>> {
        Arc::new(Self { loader: self.loader.to_device(device), history: self.history.clone() })
    }

    fn slice(&self, start: usize, end: usize) -> Arc<dyn DataLoader<B, O>> {
        Arc::new(Self { loader: self.loader.slice(start, end), history: self.history.clone() })
    }
}

struct TimedIterator<'a, O> {
    batches: Box<dyn DataLoaderIterator<O> + 'a>,
    history: SharedHistory,
    start: Instant,
}

impl<O> Iterator for TimedIterator<'_, O> {
    type Item = O;

    fn next(&mut self) -> Option<O> {
        let batch = self.batches.next();
        if batch.is_none() {
            let mut history = self.history.lock().expect("nobody panics with the lock");
            history.durations.push(self.start.elapsed());
        }
        batch
    }
}

impl<O> DataLoaderIterator<O> for TimedIterator<'_, O> {
    fn progress(&self) -> Progress {
        self.batches.progress()
    }
}
