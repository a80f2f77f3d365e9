//! The results: a table, a figure, and `summary.json`.

use std::{collections::BTreeMap, path::Path};

use burn_lora::report::{ParameterReport, grouped, table};
use common::{
    Result,
    cli::plot::{Panel, SeriesLabelPosition, draw},
};

use crate::reinforce::{BATCH, TARGET, Trained};
use serde::Serialize;

#[derive(Serialize)]
pub struct Summary {
    pub backend: &'static str,
    pub rank: usize,
    pub alpha: f64,
    pub targets: Vec<String>,
    pub learning_rate: f64,
    pub lora_learning_rate: f64,
    pub max_episodes: usize,
    pub seeds: Vec<u64>,
    pub target: f64,
    pub standard: Method,
    pub variants: Vec<Variant>,
    /// The first seed's returns, for each set of adapters and physics.
    pub switched: BTreeMap<String, BTreeMap<&'static str, f64>>,
    /// Whether the adapters gave, from their files and on the base, what they gave in training.
    pub switched_returns_equal: bool,
    pub base_restored_exactly: bool,
    pub seconds: f64,
}

/// A cart that the base was not trained on.
#[derive(Serialize)]
pub struct Variant {
    pub name: &'static str,
    pub half_length: f64,
    pub pole_mass: f64,
    pub force: f64,
    /// The return of the base there, for each seed.
    pub base: Vec<f64>,
    pub methods: Vec<Method>,
}

/// A way to train, and what it gave with each seed.
#[derive(Serialize)]
pub struct Method {
    pub name: &'static str,
    pub trainable: usize,
    pub total: usize,
    /// The episodes until the target was reached, if it was.
    pub episodes: Vec<Option<usize>>,
    pub median_episodes: Option<usize>,
    /// The return of the trained policy, from starts that were not used to end the training.
    pub returns: Vec<f64>,
    pub median_return: f64,
    /// The return before the training, and after each batch of episodes.
    pub curves: Vec<Vec<f64>>,
}

impl Method {
    pub fn new(
        name: &'static str,
        parameters: &ParameterReport,
        trained: &[Trained],
        returns: Vec<f64>,
    ) -> Self {
        let episodes: Vec<_> = trained.iter().map(Trained::episodes).collect();
        Self {
            name,
            trainable: parameters.trainable,
            total: parameters.total,
            median_episodes: median(episodes.iter().copied()),
            episodes,
            median_return: median(returns.iter().copied().map(Some)).unwrap_or(f64::NAN),
            returns,
            curves: trained.iter().map(|it| it.returns.clone()).collect(),
        }
    }
}

/// The value in the middle, or the lower of the two there. What is missing counts as the highest.
pub fn median<T: PartialOrd + Copy>(values: impl IntoIterator<Item = Option<T>>) -> Option<T> {
    let mut values: Vec<_> = values.into_iter().collect();
    values.sort_by(|a, b| match (a, b) {
        (Some(a), Some(b)) => a.partial_cmp(b).unwrap_or(std::cmp::Ordering::Equal),
        _ => a.is_none().cmp(&b.is_none()),
    });
    values[(values.len() - 1) / 2]
}

/// The number of episodes, or that there were not enough.
pub fn episodes(count: Option<usize>, max: usize) -> String {
    count.map_or(format!("> {}", grouped(max)), grouped)
}

/// The median of the returns, and their spread.
fn with_spread(returns: &[f64]) -> String {
    let middle = median(returns.iter().copied().map(Some)).unwrap_or(f64::NAN);
    let low = returns.iter().copied().fold(f64::INFINITY, f64::min);
    let high = returns.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    format!("{middle:.0} ({low:.0} to {high:.0})")
}

/// The table of the results.
pub fn results(variants: &[Variant], max_episodes: usize) -> String {
    let mut rows = Vec::new();
    for variant in variants {
        let base = with_spread(&variant.base);
        let none = || "-".to_owned();
        rows.push([format!("{}: the base", variant.name), none(), none(), none(), base]);
        for method in &variant.methods {
            let share = 100.0 * method.trainable as f64 / method.total as f64;
            let sorted = |last: bool| {
                let counts = method.episodes.iter().map(|it| it.unwrap_or(usize::MAX));
                let count = if last { counts.max() } else { counts.min() };
                episodes(count.filter(|&it| it != usize::MAX), max_episodes)
            };
            let middle = episodes(method.median_episodes, max_episodes);
            rows.push([
                format!("{}: {}", variant.name, method.name),
                grouped(method.trainable),
                format!("{share:.2} %"),
                format!("{middle} ({} to {})", sorted(false), sorted(true)),
                with_spread(&method.returns),
            ]);
        }
    }
    table(&["", "trainable", "share", "episodes", "return"], &rows)
}

/// The table of what each set of adapters earns on each cart.
pub fn matrix(carts: &[&'static str], rows: &[(String, Vec<f64>)]) -> String {
    let rows: Vec<Vec<_>> = rows
        .iter()
        .map(|(name, returns)| {
            let cells = returns.iter().map(|it| format!("{it:.0}"));
            std::iter::once(name.clone()).chain(cells).collect()
        })
        .collect();
    table(&[&["adapters"], carts].concat(), &rows)
}

/// Draws return against episodes, for each cart that the base was not trained on.
pub fn draw_returns(path: &Path, variants: &[Variant]) -> Result<()> {
    let panel = |variant: &'_ Variant| {
        let curves: Vec<_> =
            variant.methods.iter().map(|it| (it.name, middle(&it.curves))).collect();
        // What follows when all have arrived is a line.
        let arrived = |points: &[(f64, f64)]| points.iter().position(|point| point.1 >= TARGET);
        let batches = curves.iter().map(|(_, it)| arrived(it).unwrap_or(it.len()));
        let length = batches.max().unwrap_or(0) + 2;
        let last = (length * BATCH) as f64;
        let curves = curves.into_iter().map(|(name, mut points)| {
            let end = points.last().map_or(0.0, |point| point.1);
            points.truncate(length);
            points.push((last, end));
            (name, points)
        });
        (variant.name, curves.collect::<Vec<_>>())
    };
    let panels: Vec<_> = variants.iter().map(panel).collect();
    let panels = panels.into_iter().map(|(title, curves)| Panel {
        title,
        x: "episodes",
        y: "return, median over the seeds",
        curves,
        marks: true,
        from_zero: true,
        legend: SeriesLabelPosition::LowerRight,
    });
    draw(path, &panels.collect::<Vec<_>>())
}

/// The median curve. A training ends when the target is reached: its return then stays as it is.
fn middle(curves: &[Vec<f64>]) -> Vec<(f64, f64)> {
    let longest = curves.iter().map(Vec::len).max().unwrap_or(0);
    let at = |batch: usize| {
        let returns = curves.iter().map(|curve| curve.get(batch).or(curve.last()).copied());
        ((batch * BATCH) as f64, median(returns).unwrap_or(f64::NAN))
    };
    (0..longest).map(at).collect()
}
