//! How far each alpha takes the model from its base.

use std::path::Path;

use burn_lora::{LoraConfig, Scaling, report::table};
use common::{Result, classifier::Learns, cli::plot::SeriesLabelPosition};

use crate::{
    lab::{Lab, Measured},
    report::{Curve, Diagram, Report, draw},
};

/// The alphas as powers of 4, times that of the other sweeps.
const POWERS: [i32; 8] = [-5, -4, -3, -2, -1, 0, 1, 2];

/// All alphas take the same number of steps at the same learning rate.
pub fn run<M: Learns>(lab: &mut Lab<M>, full: &Measured, figure: &Path) -> Result<Report> {
    let rank = lab.rank;
    let settings = POWERS.map(|power| {
        let alpha = lab.alpha * 4f64.powi(power);
        let config = lab.config(rank).with_scaling(Scaling::AlphaOverRank);
        lab.setting(format!("alpha {alpha}"), LoraConfig { alpha, ..config })
    });
    let points = lab.sweep("alpha", &settings)?;
    let curve = |y: fn(&Measured) -> _| Curve::of(&points, |it| it.alpha, |it| y(&it.measured));
    let base = lab.base_accuracy();
    let accuracy = Diagram {
        title: "Accuracy after adapting",
        x: "alpha",
        y: "%",
        curves: vec![("LoRA", curve(|it| it.accuracy))],
        levels: vec![("full fine-tuning", full.accuracy.mean), ("base", base)],
        doublings: true,
        multiples: false,
        marks: true,
        legend: SeriesLabelPosition::LowerMiddle,
    };
    let distance = Diagram {
        title: "Distance from the base",
        x: "alpha",
        y: "relative change",
        curves: vec![("weights", curve(|it| it.distance)), ("logits", curve(|it| it.logit_change))],
        levels: vec![("weights, full fine-tuning", full.distance.mean)],
        doublings: true,
        multiples: true,
        marks: true,
        legend: SeriesLabelPosition::LowerRight,
    };
    draw(figure, vec![distance, accuracy])?;
    let rows = points.iter().map(|it| {
        let Measured { distance, logit_change, accuracy, .. } = &it.measured;
        [
            it.alpha.to_string(),
            format!("{:.4}", it.scale),
            format!("{distance:.3}"),
            format!("{logit_change:.2}"),
            format!("{accuracy:.2}"),
        ]
    });
    let headers =
        ["alpha", "scale", "change of the weights", "change of the logits", "accuracy in %"];
    let table = table(&headers, &rows.collect::<Vec<_>>());
    Report::new(format!("Alpha, at rank {rank} with the scale alpha/rank"), table, points)
}
