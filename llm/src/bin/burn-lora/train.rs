//! Trains a decoder: its adapters, or all of it.

use std::{
    f64::consts::PI,
    hash::{DefaultHasher, Hash, Hasher},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use burn::{
    module::{AutodiffModule, Module, ModuleVisitor, Param},
    optim::{AdamConfig, GradientsParams, Optimizer},
    tensor::Tensor,
};
use burn_lora::{
    Lora,
    train::{Backward, Replicas, Workers, fingerprint},
};
use burn_lora_llm::{
    Context, Result,
    cli::{
        live::{Live, Position},
        replicas::Counted,
    },
    data::{Text, deal_to, pack, tokens},
    llama::Llama,
    loss::{evaluate, gradients},
};

use crate::{
    TASK,
    backend::{Plain, Train},
    checkpoint::{self, Checkpoint},
    memory,
    remembered::Remembered,
};
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
use serde::{Deserialize, Serialize};

/// How to train.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// What is trained, in reports.
    pub name: &'static str,
    /// The number of steps of the optimizer.
    pub iters: usize,
    /// The number of texts of a batch, which all replicas share.
    pub batch: usize,
    /// The number of batches of a step.
    pub accumulate: usize,
    pub learning_rate: f64,
    /// In the first steps, the learning rate grows to its full value.
    pub warmup: usize,
    /// The greatest norm of all gradients together; longer ones are scaled down to it.
    pub clip: f64,
    /// Put several texts of a batch into one row of this length.
    pub pack: Option<usize>,
    /// The number of steps between two evaluations.
    pub eval_every: usize,
    pub seed: u64,
    /// The number of threads that share a step.
    pub workers: usize,
    /// Compute each layer again in the backward pass, to need less memory.
    pub segments: bool,
}

/// What a training came to.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct History {
    /// The mean loss per target of each step.
    pub losses: Vec<f64>,
    /// After how many steps the model was evaluated, and its mean loss per target.
    pub valid: Vec<(usize, f64)>,
    pub tokens: usize,
    /// The time of the steps, without evaluations.
    pub seconds: f64,
    /// The bytes that this replica sent to the others, and the time that it took to add up what all have.
    #[serde(default)]
    pub sent: usize,
    #[serde(default)]
    pub sending: f64,
}

impl Recipe {
    /// The learning rate of step `step`, the first of which is 0: it grows along a line, and then falls
    /// to zero along a cosine.
    pub fn rate(&self, step: usize) -> f64 {
        if step < self.warmup {
            return self.learning_rate * (step + 1) as f64 / self.warmup as f64;
        }
        let rest = (self.iters - self.warmup).max(1) as f64;
        let done = (step - self.warmup) as f64 / rest;
        self.learning_rate * 0.5 * (1.0 + (PI * done).cos())
    }

    /// The texts of a batch in rows.
    fn rows<'a>(&self, batch: &[&'a Text]) -> Vec<Vec<&'a Text>> {
        match self.pack {
            Some(length) => pack(batch, length),
            None => batch.iter().map(|&text| vec![text]).collect(),
        }
    }
}

/// A decoder, of which some parameters train.
pub type Model = Lora<Train, Llama<Train>>;

/// The directories of the adapters and of the checkpoints, in that of the run.
pub const ADAPTER: &str = "adapter";
pub const CHECKPOINTS: &str = "checkpoints";

/// Where a training is kept, and what its adapters say of it.
#[derive(Clone, Debug)]
pub struct Keeping<'a> {
    /// The directory of the run.
    pub out: &'a Path,
    /// The name of the model.
    pub base: &'a str,
    pub remembered: Remembered,
}

impl Keeping<'_> {
    /// Saves the adapters, if there are any: where all weights train there are none.
    fn save(&self, model: &Model) -> Result<()> {
        let adapters = model.adapters();
        if adapters.is_empty() {
            return Ok(());
        }
        let dir = self.out.join(ADAPTER);
        let adapters = adapters.with_base_model(self.base).with_task_type(TASK);
        adapters.save(&dir).context("the adapters cannot be saved")?;
        self.remembered.write(&dir)
    }
}

/// Trains on `texts` from the last checkpoint in the directory of `keeping`, if there is one. After each evaluation
/// it saves the adapters and a checkpoint there. It does so, too, and ends, when `stop` becomes true. Without
/// `keeping`, nothing is saved.
///
/// Each of the `replicas` knows all texts, and computes its part of each batch, so that any number of them
/// trains on the same batches. Only the first evaluates, saves, and is heard.
///
/// # Errors
///
/// If the loss is not a number, in which case the adapters and checkpoints stay as they were last saved; if
/// these cannot be saved or read; or if the replicas differ.
pub fn train(
    model: Model,
    texts: &[Text],
    valid: &[Text],
    recipe: &Recipe,
    keeping: Option<&Keeping>,
    stop: &AtomicBool,
    replicas: &Counted,
) -> Result<(Model, History)> {
    let device = Default::default();
    // As PyTorch's.
    let adam = AdamConfig::new().with_epsilon(1e-8);
    let optimizer = adam.init::<Train, Model>();
    let begun = match keeping {
        Some(it) => checkpoint::load(&it.out.join(CHECKPOINTS), model, optimizer)?,
        None => Checkpoint::begin(model, optimizer),
    };
    let Checkpoint { mut model, mut optimizer, mut history, passed } = begun;
    let done = history.losses.len();
    if replicas.count() > 1 {
        let mut hasher = DefaultHasher::new();
        texts.hash(&mut hasher);
        let texts = format!("{} texts {:016x}", texts.len(), hasher.finish());
        let done = format!("steps done: {done}");
        let lines = [format!("{recipe:#?}"), texts, done, fingerprint(&model)];
        replicas.agree(&lines.join("\n")).context("the replicas differ")?;
    }
    let mut order = Order::new(texts.len(), recipe.seed);
    order.skip(done * recipe.accumulate * recipe.batch);
    let workers = Workers::new(recipe.workers);
    let part = format!("step {}/{}", done + 1, recipe.iters);
    let mut live = replicas.is_first().then(|| Live::new(recipe.name, part));
    let watch = |live: &mut Live, model: &Model, history: &mut History| {
        let loss = evaluate::<Plain>(&model.valid(), valid, recipe.batch, &device);
        let step = history.losses.len();
        let recent = &history.losses[step.saturating_sub(recipe.eval_every)..];
        let trained = match recent.len() {
            0 => String::new(),
            known => format!("training loss {:.4}  ", recent.iter().sum::<f64>() / known as f64),
        };
        let perplexity = loss.exp();
        live.line(format_args!(
            "step {step}/{}  {trained}validation loss {loss:.4}  perplexity {perplexity:.2}",
            recipe.iters,
        ));
        history.valid.push((step, loss));
    };
    if let Some(live) = &mut live {
        for problem in passed {
            live.warn(format_args!("{problem}; the checkpoint before it is used"));
        }
        match history.valid.is_empty() {
            true => watch(live, &model, &mut history),
            false => live.line(format_args!("goes on after step {done}/{}", recipe.iters)),
        }
    }
    if let Some(live) = &live {
        let mut ahead = Order::new(texts.len(), recipe.seed);
        ahead.skip(done * recipe.accumulate * recipe.batch);
        let foreseen = 0..FORESEEN.min(recipe.iters - done);
        let steps = foreseen.map(|_| {
            let batch: Vec<_> = (0..recipe.batch).map(|_| &texts[ahead.next()]).collect();
            deal_to(recipe.rows(&batch), workers.count(), replicas.index(), replicas.count())
        });
        let steps: Vec<_> = steps.collect();
        if let Some(warning) = memory::warning(&model, &steps, recipe.segments) {
            live.warn(warning);
        }
    }
    for step in done..recipe.iters {
        let start = Instant::now();
        // The texts of all batches first: the loss is a mean over the targets of the whole step.
        let batches: Vec<Vec<&Text>> = (0..recipe.accumulate)
            .map(|_| (0..recipe.batch).map(|_| &texts[order.next()]).collect())
            .collect();
        let targets: usize = batches.iter().flatten().map(|text| text.targets()).sum();
        let passes = batches.iter().map(|texts| {
            let rows = recipe.rows(texts);
            history.tokens += rows.iter().map(|row| tokens(row)).sum::<usize>();
            let own = deal_to(rows, workers.count(), replicas.index(), replicas.count());
            workers.backward(&model, own, |model, rows| gradients(model, &rows, recipe.segments))
        });
        let own = Backward::sum(&model, passes);
        let before = replicas.sent();
        let Backward { loss, mut gradients } = own.all_reduce(&model, replicas);
        history.sent += replicas.sent().bytes - before.bytes;
        history.sending += replicas.sent().seconds - before.seconds;
        let loss = loss / targets as f64;
        if !loss.is_finite() {
            return Err(format!(
                "the loss is {loss} in step {}. The adapters of the last evaluation are kept, if there was \
                 one. Try a smaller --learning-rate",
                step + 1,
            ));
        }
        scale(&model, &mut gradients, 1.0 / targets as f64);
        // Large sums may be formed in another order each time, and all must scale by the same number.
        let norm = replicas.of_first(norm(&model, &gradients));
        clip(&model, &mut gradients, norm, recipe.clip);
        model = optimizer.step(recipe.rate(step), model, gradients);
        history.seconds += start.elapsed().as_secs_f64();
        history.losses.push(loss);
        let of_all = (step + 1 - done) as f64 / (recipe.iters - done) as f64;
        let of_part = (step + 1) as f64 / recipe.iters as f64;
        let part = format!("step {}/{}", step + 1, recipe.iters);
        let stopped = replicas.any(stop.load(Ordering::Relaxed));
        let evaluated = (step + 1) % recipe.eval_every == 0 || step + 1 == recipe.iters;
        if replicas.count() > 1 && (evaluated || stopped) {
            let trained = model.adapters().fingerprint();
            replicas.agree(&trained).context("the replicas are no copies any more")?;
        }
        if let Some(live) = &mut live {
            live.update(&Position { part, of_part, of_all }, loss);
            if evaluated {
                watch(live, &model, &mut history);
            }
            if let (Some(keeping), true) = (keeping, evaluated || stopped) {
                keeping.save(&model)?;
                let checkpoints = keeping.out.join(CHECKPOINTS);
                checkpoint::save(&checkpoints, &model, &optimizer, &history)?;
            }
            if stopped {
                live.line(format_args!("stopped after step {}/{}", step + 1, recipe.iters));
            }
        }
        if stopped {
            break;
        }
    }
    Ok((model, history))
}

/// The norm of all gradients together.
pub fn norm(model: &Model, gradients: &GradientsParams) -> f64 {
    let mut squares = Squares { gradients, sum: 0.0 };
    model.visit(&mut squares);
    squares.sum.sqrt()
}

/// Scales the gradients down if the norm of all of them together is above `most`.
pub fn clip(model: &Model, gradients: &mut GradientsParams, norm: f64, most: f64) {
    if norm > most {
        scale(model, gradients, most / norm);
    }
}

fn scale(model: &Model, gradients: &mut GradientsParams, factor: f64) {
    model.visit(&mut Scaler { gradients, factor });
}

/// Sums the squares of all gradients.
struct Squares<'a> {
    gradients: &'a GradientsParams,
    sum: f64,
}

impl ModuleVisitor<Train> for Squares<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Train, D>>) {
        if let Some(gradient) = self.gradients.get::<Plain, D>(param.id) {
            self.sum += gradient.square().sum().into_data().iter::<f64>().sum::<f64>();
        }
    }
}

struct Scaler<'a> {
    gradients: &'a mut GradientsParams,
    factor: f64,
}

impl ModuleVisitor<Train> for Scaler<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Train, D>>) {
        if let Some(gradient) = self.gradients.remove::<Plain, D>(param.id) {
            self.gradients.register(param.id, gradient * self.factor);
        }
    }
}

/// Of how many batches the memory is estimated before the first step.
const FORESEEN: usize = 32;

/// Goes through the texts again and again, each time in another order.
struct Order {
    left: Vec<usize>,
    texts: usize,
    rng: StdRng,
}

impl Order {
    fn new(texts: usize, seed: u64) -> Self {
        Self { left: Vec::new(), texts, rng: StdRng::seed_from_u64(seed) }
    }

    fn skip(&mut self, count: usize) {
        for _ in 0..count {
            self.next();
        }
    }

    fn next(&mut self) -> usize {
        if self.left.is_empty() {
            self.left = (0..self.texts).collect();
            self.left.shuffle(&mut self.rng);
        }
        self.left.pop().expect("there are texts")
    }
}
