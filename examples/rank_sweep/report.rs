//! What a sweep gives, and how it is drawn.

use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use common::{
    Context, Result,
    cli::plot::{Extras, Panel, SeriesLabelPosition, draw_with},
};

use crate::{lab::Point, spread::Spread};

/// The results of one sweep.
pub struct Report {
    /// What was compared with what.
    pub title: String,
    pub table: String,
    pub values: Value,
}

impl Report {
    pub fn new(title: String, table: String, values: impl Serialize) -> Result<Self> {
        let values = serde_json::to_value(values).context(&title)?;
        Ok(Self { title, table, values })
    }
}

/// The points of a curve, and the lowest and highest values at each.
#[derive(Default)]
pub struct Curve {
    pub points: Vec<(f64, f64)>,
    pub ends: Vec<(f64, f64)>,
}

impl Curve {
    /// A curve through a figure of each point.
    pub fn of(points: &[Point], x: impl Fn(&Point) -> f64, y: impl Fn(&Point) -> Spread) -> Self {
        points.iter().map(|point| (x(point), y(point))).collect()
    }
}

impl FromIterator<(f64, Spread)> for Curve {
    fn from_iter<I: IntoIterator<Item = (f64, Spread)>>(points: I) -> Self {
        let mut curve = Self::default();
        for (x, y) in points {
            curve.points.push((x, y.mean));
            curve.ends.push(y.ends());
        }
        curve
    }
}

/// A diagram of a sweep.
pub struct Diagram<'a> {
    pub title: &'a str,
    pub x: &'a str,
    pub y: &'a str,
    pub curves: Vec<(&'a str, Curve)>,
    pub levels: Vec<(&'a str, f64)>,
    /// Whether each step to the right is a doubling.
    pub doublings: bool,
    /// Whether each step up is a multiplication.
    pub multiples: bool,
    pub marks: bool,
    pub legend: SeriesLabelPosition,
}

/// Draws the diagrams side by side.
pub fn draw(path: &Path, diagrams: Vec<Diagram>) -> Result<()> {
    let parts = diagrams.into_iter().map(|diagram| {
        let Diagram { title, x, y, curves, levels, doublings, multiples, marks, legend } = diagram;
        let names = curves.iter().map(|(name, _)| *name);
        let (points, spreads): (Vec<_>, Vec<_>) =
            curves.iter().map(|(_, curve)| (curve.points.clone(), curve.ends.clone())).unzip();
        let curves = names.zip(points).collect();
        let panel = Panel { title, x, y, curves, marks, from_zero: false, legend };
        (panel, Extras { doublings, multiples, levels, spreads })
    });
    let parts: Vec<_> = parts.collect();
    draw_with(path, &parts.iter().map(|(panel, extras)| (panel, extras)).collect::<Vec<_>>())
}
