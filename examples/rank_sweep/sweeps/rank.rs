//! How much an adapter of each rank learns, and what it costs.

use std::path::Path;

use serde_json::json;

use burn_lora::report::{grouped, table};
use common::{Result, classifier::Learns, cli::plot::SeriesLabelPosition};

use crate::{
    lab::{Lab, Measured, Point},
    report::{Curve, Diagram, Report, draw},
};

const RANKS: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];

pub fn run<M: Learns>(lab: &mut Lab<M>, full: &Measured, figure: &Path) -> Result<Report> {
    let alpha = lab.config(1).alpha;
    let settings = RANKS.map(|rank| lab.setting(format!("rank {rank}"), lab.config(rank)));
    let points = lab.sweep("rank", &settings)?;
    let base = lab.base_accuracy();
    draw(figure, diagrams(&points, full, base))?;
    let row = |name: String, it: &Measured| {
        [
            name,
            grouped(it.trainable),
            format!("{:.2} %", 100.0 * it.trainable as f64 / full.trainable as f64),
            grouped(it.bytes),
            format!("{:.2}", it.seconds.mean / full.seconds.mean),
            format!("{:.4}", it.loss.mean),
            format!("{:.2}", it.accuracy),
        ]
    };
    let mut rows: Vec<_> =
        points.iter().map(|point| row(point.rank.to_string(), &point.measured)).collect();
    rows.push(row("full fine-tuning".to_owned(), full));
    let headers = ["rank", "trainable", "share", "bytes", "time", "loss", "accuracy in %"];
    let table = format!(
        "{}\nThe base reaches {base:.2} %. Time is relative to full fine-tuning.",
        table(&headers, &rows)
    );
    Report::new(format!("Rank, with the scale {alpha:.2}/sqrt(rank)"), table, json!(points))
}

fn diagrams<'a>(points: &[Point], full: &Measured, base: f64) -> Vec<Diagram<'a>> {
    let accuracy = Curve::of(points, |it| it.rank as f64, |it| it.measured.accuracy);
    let loss = Curve::of(points, |it| it.measured.trainable as f64, |it| it.measured.loss);
    vec![
        Diagram {
            title: "Accuracy after adapting",
            x: "rank",
            y: "%",
            curves: vec![("LoRA", accuracy)],
            levels: vec![("full fine-tuning", full.accuracy.mean), ("base", base)],
            doublings: true,
            multiples: false,
            marks: true,
            legend: SeriesLabelPosition::MiddleRight,
        },
        Diagram {
            title: "Loss in the last epoch",
            x: "trainable parameters",
            y: "loss",
            curves: vec![("LoRA", loss)],
            levels: vec![("full fine-tuning", full.loss.mean)],
            doublings: true,
            multiples: true,
            marks: true,
            legend: SeriesLabelPosition::UpperRight,
        },
    ]
}
