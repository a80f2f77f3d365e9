//! What the initial values of A and B do to the first steps.

use std::path::Path;

use burn::module::AutodiffModule;
use burn_lora::{Init, Lora, LoraAdapter, LoraAdapters, LoraConfig, LoraModule, report::table};
use common::{
    Context, Result,
    backend::Train,
    classifier::{Classifier, Learns, SampleOf, accuracy, logits},
    cli::{
        live::{Live, Position, during},
        plot::SeriesLabelPosition,
    },
};

use crate::{
    lab::Lab,
    report::{Curve, Diagram, Report, draw},
    spread::Spread,
    weights::{number, relative_difference},
};
use serde::Serialize;
use serde_json::json;

/// Whether A and B start at random values.
const KINDS: [(&str, [bool; 2]); 4] = [
    ("A random, B zero", [true, false]),
    ("A zero, B random", [false, true]),
    ("both random", [true, true]),
    ("both zero", [false, false]),
];

/// The scales at which fresh adapters with two random factors are put on the base, as powers of 2 times the
/// scale of the other sweeps.
const POWERS: [i32; 8] = [-3, -2, -1, 0, 1, 2, 3, 4];

/// The loss is measured before the first step, and after each of so many.
const INTERVAL: usize = 4;
/// On so many samples of those that are trained on.
const PROBED: usize = 512;

/// What fresh adapters with two random factors do to the base at one scale.
#[derive(Serialize)]
struct Disturbance {
    scale: f64,
    logit_change: Spread,
    /// The accuracy on the base's own task.
    old_accuracy: Option<Spread>,
}

/// How one initialization fared.
#[derive(Serialize)]
struct Start {
    name: &'static str,
    /// The numbers of steps after which the loss was measured.
    steps: Vec<usize>,
    losses: Vec<Spread>,
    /// What the adapters do before the first step.
    at_start: Disturbance,
    accuracy: Spread,
    /// The distance of the weights from the base at the end.
    distance: Spread,
}

/// The same for one seed.
struct Run {
    losses: Vec<f64>,
    accuracy: f64,
    distance: f64,
}

/// One epoch with each kind of initial values.
pub fn run<M: Learns>(lab: &Lab<M>, figure: &Path) -> Result<Report> {
    let mut starts = Vec::new();
    for (name, random) in KINDS {
        let mut live = Live::new("initialization", name);
        let mut runs = Vec::new();
        for (index, &seed) in lab.seeds.iter().enumerate() {
            let count = lab.seeds.len() as f64;
            runs.push(first_epoch(lab, random, seed, |part, loss| {
                let of_part = (index as f64 + part) / count;
                let of_all = (starts.len() as f64 + of_part) / KINDS.len() as f64;
                live.update(&Position { part: name.to_owned(), of_part, of_all }, loss);
            })?);
        }
        let at_start = disturbance(lab, &lab.config(lab.rank), random)?;
        let start = summed_up(name, at_start, &runs);
        let (first, last) = (start.losses[0].mean, start.losses[start.losses.len() - 1].mean);
        live.line(format_args!("{name:<22} loss {first:.4}, then {last:.4}"));
        starts.push(start);
    }
    let own = lab.config(lab.rank);
    let disturbances: Result<Vec<_>> = during("putting random adapters on the base", || {
        let alphas = POWERS.iter().map(|&power| own.alpha * 2f64.powi(power));
        let configs = alphas.map(|alpha| LoraConfig { alpha, ..own.clone() });
        configs.map(|config| disturbance(lab, &config, [true, true])).collect()
    });
    let disturbances = disturbances?;
    draw(figure, diagrams(&starts, &disturbances))?;
    let table = format!("{}\n\n{}", table_of(&starts), table_of_scales(&disturbances));
    let title = format!("Initial values, at rank {}", lab.rank);
    Report::new(title, table, json!({ "starts": starts, "both_random": disturbances }))
}

fn diagrams<'a>(starts: &[Start], disturbances: &[Disturbance]) -> Vec<Diagram<'a>> {
    let losses = starts.iter().map(|start| {
        let points = start.steps.iter().map(|&step| step as f64);
        (start.name, points.zip(start.losses.iter().copied()).collect::<Curve>())
    });
    let losses = Diagram {
        title: "The first epoch",
        x: "step",
        y: "loss on the new task",
        curves: losses.collect(),
        levels: vec![],
        doublings: false,
        multiples: true,
        marks: false,
        legend: SeriesLabelPosition::UpperRight,
    };
    let accuracies = disturbances.iter().map(|it| Some((it.scale, it.old_accuracy?)));
    let accuracies: Option<Curve> = accuracies.collect();
    let accuracies = accuracies.map(|curve| Diagram {
        title: "The base's own task before the first step",
        x: "scale",
        y: "%",
        curves: vec![("both random", curve)],
        levels: vec![],
        doublings: true,
        multiples: false,
        marks: true,
        legend: SeriesLabelPosition::LowerLeft,
    });
    [losses].into_iter().chain(accuracies).collect()
}

fn summed_up(name: &'static str, at_start: Disturbance, runs: &[Run]) -> Start {
    let spread = |figure: fn(&Run) -> f64| Spread::of(runs.iter().map(figure));
    let losses =
        (0..runs[0].losses.len()).map(|at| Spread::of(runs.iter().map(|it| it.losses[at])));
    Start {
        name,
        steps: (0..runs[0].losses.len()).map(|at| at * INTERVAL).collect(),
        losses: losses.collect(),
        at_start,
        accuracy: spread(|it| it.accuracy),
        distance: spread(|it| it.distance),
    }
}

fn first_epoch<M: Learns>(
    lab: &Lab<M>,
    random: [bool; 2],
    seed: u64,
    mut progress: impl FnMut(f64, f64),
) -> Result<Run> {
    let task = &lab.task;
    let model = begin(lab, &lab.config(lab.rank), random, seed)?;
    let probed = &task.train[..task.train.len().min(PROBED)];
    let training = lab.training(task.lora_learning_rate, 1, seed);
    let steps = training.steps(&task.train);
    let mut losses = vec![loss::<M>(&model.valid(), probed)];
    let mut step = 0;
    let model = training.run(model, &task.train, |model, of_batch| {
        step += 1;
        if step % INTERVAL == 0 {
            losses.push(loss::<M>(&model.valid(), probed));
        }
        progress(step as f64 / steps as f64, of_batch);
    });
    let accuracy = accuracy(logits(&*model, &task.test), &task.test);
    let distance = lab.distance(&model);
    Ok(Run { losses, accuracy, distance })
}

/// What fresh adapters do to the base.
fn disturbance<M: Learns>(
    lab: &Lab<M>,
    config: &LoraConfig,
    random: [bool; 2],
) -> Result<Disturbance> {
    let (mut changes, mut accuracies) = (Vec::new(), Vec::new());
    let old = &lab.task.old_test;
    // The base's own task tells most. Where it is of another kind, the new task has to do.
    let samples = if old.is_empty() { &lab.task.test } else { old };
    let before = logits(&lab.base, samples);
    for &seed in &lab.seeds {
        let fresh = begin(lab, config, random, seed)?.valid();
        let after = logits(&*fresh, samples);
        changes.push(relative_difference(&after, &before));
        accuracies.push(accuracy(after, samples));
    }
    Ok(Disturbance {
        scale: config.scaling.scale(config.alpha, config.rank),
        logit_change: Spread::of(changes),
        old_accuracy: (!old.is_empty()).then(|| Spread::of(accuracies)),
    })
}

/// The base with adapters that start at random values or at zero. The library draws both factors only for
/// tests, and never sets both to zero, so that the factors are put together here.
fn begin<M: Learns>(
    lab: &Lab<M>,
    config: &LoraConfig,
    random: [bool; 2],
    seed: u64,
) -> Result<Lora<Train, M>> {
    let config = config.clone().with_init(Init::RandomBoth).with_seed(seed);
    let drawn = lab.attach(&config)?.adapters();
    let adapters = drawn.iter().map(|(path, drawn)| {
        let [a, b] = [(&drawn.a, random[0]), (&drawn.b, random[1])]
            .map(|(factor, random)| if random { factor.val() } else { factor.val().zeros_like() });
        (path, LoraAdapter::new(a, b, drawn.alpha, drawn.scaling))
    });
    let adapters = LoraAdapters::new(adapters);
    let model = lab.task.base.clone().switch(&adapters).context("putting adapters on the base")?;
    model.train_only(lab.task.modules_to_save).context("training next to the adapters")
}

/// The mean loss over the samples.
fn loss<M: Learns>(model: &M::InnerModule, samples: &[SampleOf<M>]) -> f64 {
    number(model.classify(samples).loss)
}

fn table_of(starts: &[Start]) -> String {
    let rows = starts.iter().map(|it| {
        let last = it.losses[it.losses.len() - 1];
        [
            it.name.to_owned(),
            format!("{:.2}", it.at_start.logit_change),
            percent(it.at_start.old_accuracy),
            format!("{:.3}", it.losses[0]),
            format!("{last:.3}"),
            format!("{:.3}", it.distance),
            format!("{:.2}", it.accuracy),
        ]
    });
    let headers = [
        "factors",
        "change of the logits",
        "old task in %",
        "first loss",
        "last loss",
        "distance",
        "new task in %",
    ];
    let rows: Vec<_> = rows.collect();
    format!(
        "{}\nThe change of the logits and the old task are from before the first step, the last loss, the \
         distance\nand the new task from after one epoch.",
        table(&headers, &rows)
    )
}

fn table_of_scales(disturbances: &[Disturbance]) -> String {
    let rows = disturbances.iter().map(|it| {
        [it.scale.to_string(), format!("{:.2}", it.logit_change), percent(it.old_accuracy)]
    });
    let rows: Vec<_> = rows.collect();
    format!(
        "Both random, before the first step, at other scales:\n\n{}",
        table(&["scale", "change of the logits", "old task in %"], &rows)
    )
}

fn percent(accuracy: Option<Spread>) -> String {
    accuracy.map_or("-".to_owned(), |it| format!("{it:.2}"))
}
