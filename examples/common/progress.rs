//! What a person sees of a training: burn-train's dashboard in a terminal, and one line per epoch
//! elsewhere. Either way, what was seen is kept.

use std::{
    fs,
    io::{IsTerminal, stdout},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use burn::{
    data::dataloader::{DataLoader, DataLoaderIterator, Progress},
    tensor::backend::Backend,
    train::{
        Interrupter, LearnerSummary,
        metric::{MetricDefinition, MetricId, NumericEntry},
        renderer::{
            EvaluationName, EvaluationProgress, MetricState, MetricsRenderer,
            MetricsRendererEvaluation, MetricsRendererTraining, ProgressType, TrainingProgress,
            tui::TuiMetricsRendererWrapper,
        },
    },
};
use serde::{Deserialize, Serialize};

use super::{Context, Result, download::write_atomically};

/// What a training left behind.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct History {
    /// The training loss of every step.
    pub losses: Vec<f64>,
    /// The accuracy on what is watched after each epoch, in percent.
    pub accuracies: Vec<f64>,
    /// How long the steps of each epoch took; evaluation is not counted.
    pub durations: Vec<Duration>,
}

/// The file next to the checkpoints.
const HISTORY: &str = "history.json";

impl History {
    /// What was kept in `dir`; nothing if it is not there.
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

    /// Forgets all but the first epochs.
    pub fn truncate(&mut self, epochs: usize) {
        let steps = self.losses.len() / self.accuracies.len().max(1);
        self.losses.truncate(epochs * steps);
        self.accuracies.truncate(epochs);
        self.durations.truncate(epochs);
    }
}

pub type SharedHistory = Arc<Mutex<History>>;

/// Shows the progress of one training, and records its [`History`].
pub struct Reporter {
    name: String,
    dashboard: Option<TuiMetricsRendererWrapper>,
    history: SharedHistory,
    /// Where the history is kept, if it is.
    kept: Option<PathBuf>,
    /// The metrics' ids and names.
    metrics: Vec<(MetricId, String)>,
    /// Sums over the epoch, of values and of counts.
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

    fn take(&mut self) -> f64 {
        let Mean { sum, count } = std::mem::take(self);
        sum / count
    }
}

impl Reporter {
    pub fn new(
        name: &str,
        interrupter: Interrupter,
        history: SharedHistory,
        kept: Option<PathBuf>,
    ) -> Self {
        let dashboard =
            stdout().is_terminal().then(|| TuiMetricsRendererWrapper::new(interrupter, None));
        Self {
            name: name.to_owned(),
            dashboard,
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

    fn end_epoch(&mut self, progress: &Progress) {
        let (accuracy, loss) = (self.accuracy.take(), self.loss.take());
        let mut history = self.history.lock().expect("nobody panics with the lock");
        history.accuracies.push(accuracy);
        if let Some(dir) = &self.kept
            && let Err(error) = history.write(dir)
        {
            eprintln!("warning: {error}");
        }
        if self.dashboard.is_none() {
            let seconds = history.durations.last().map_or(0.0, Duration::as_secs_f64);
            println!(
                "{:<24} epoch {}/{}  loss {loss:.4}  accuracy {accuracy:6.2} %  {seconds:6.2} s",
                self.name, progress.items_processed, progress.items_total,
            );
        }
    }
}

impl MetricsRendererTraining for Reporter {
    fn update_train(&mut self, state: MetricState) {
        if let Some(("Loss", value, count)) = self.read(&state) {
            self.loss.add(value, count);
            self.history.lock().expect("nobody panics with the lock").losses.push(value);
        }
        if let Some(dashboard) = &mut self.dashboard {
            dashboard.update_train(state);
        }
    }

    fn update_valid(&mut self, state: MetricState) {
        if let Some(("Accuracy", value, count)) = self.read(&state) {
            self.accuracy.add(value, count);
        }
        if let Some(dashboard) = &mut self.dashboard {
            dashboard.update_valid(state);
        }
    }

    fn render_train(&mut self, item: TrainingProgress, indicators: Vec<ProgressType>) {
        if let Some(dashboard) = &mut self.dashboard {
            dashboard.render_train(item, indicators);
        }
    }

    fn render_valid(&mut self, item: TrainingProgress, indicators: Vec<ProgressType>) {
        if item.progress.as_ref().is_some_and(|it| it.items_processed >= it.items_total) {
            self.end_epoch(&item.global_progress);
        }
        if let Some(dashboard) = &mut self.dashboard {
            dashboard.render_valid(item, indicators);
        }
    }

    fn on_train_end(
        &mut self,
        summary: Option<LearnerSummary>,
    ) -> std::result::Result<(), Box<dyn std::error::Error>> {
        self.dashboard.as_mut().map_or(Ok(()), |dashboard| dashboard.on_train_end(summary))
    }
}

impl MetricsRendererEvaluation for Reporter {
    fn update_test(&mut self, name: EvaluationName, state: MetricState) {
        if let Some(dashboard) = &mut self.dashboard {
            dashboard.update_test(name, state);
        }
    }

    fn render_test(&mut self, item: EvaluationProgress, indicators: Vec<ProgressType>) {
        if let Some(dashboard) = &mut self.dashboard {
            dashboard.render_test(item, indicators);
        }
    }
}

impl MetricsRenderer for Reporter {
    fn manual_close(&mut self) {
        if let Some(dashboard) = &mut self.dashboard {
            dashboard.manual_close();
        }
    }

    fn register_metric(&mut self, definition: MetricDefinition) {
        self.metrics.push((definition.metric_id.clone(), definition.name.clone()));
        if let Some(dashboard) = &mut self.dashboard {
            dashboard.register_metric(definition);
        }
    }
}

/// A data loader that records how long each pass over it takes, and with it what is done for each
/// batch.
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
