//! Which layers to adapt, if the number of trainable parameters is given.
//!
//! A small layer then gets a high rank. Above the smaller side of its weight, more of it adds nothing.

use std::path::Path;

use burn_lora::{
    LoraConfig,
    report::{grouped, table},
};
use common::{Context, Result, classifier::Learns, cli::plot::SeriesLabelPosition};

use crate::{
    lab::{Lab, Measured, Point},
    report::{Curve, Diagram, Report, draw},
};
use serde_json::json;

/// The first set of layers has adapters of these ranks. The others have as many parameters.
const RANKS: [usize; 3] = [1, 3, 8];

pub fn run<M: Learns>(lab: &mut Lab<M>, full: &Measured, figure: &Path) -> Result<Report> {
    let sets = lab.task.sets;
    let mut budget = 0;
    let mut swept = Vec::new();
    for &(name, targets) in sets {
        let of_rank_1 = lab.config(1).with_targets(targets.iter().copied());
        let per_rank = adapter_parameters(lab, &of_rank_1)?;
        if swept.is_empty() {
            budget = per_rank;
        }
        let settings = RANKS.map(|first| {
            let rank = rank_for(first * budget, per_rank);
            let config = lab.config(rank).with_targets(targets.iter().copied());
            lab.setting(format!("{name}, rank {rank}"), config)
        });
        swept.push((name, lab.sweep("layers", &settings)?));
    }
    let curves = swept.iter().map(|(name, points)| {
        let x = |it: &Point| it.measured.trainable as f64;
        (*name, Curve::of(points, x, |it| it.measured.accuracy))
    });
    let accuracy = Diagram {
        title: "Accuracy with adapters on some layers",
        x: "trainable parameters",
        y: "%",
        curves: curves.collect(),
        levels: vec![("full fine-tuning", full.accuracy.mean), ("base", lab.base_accuracy())],
        doublings: true,
        multiples: false,
        marks: true,
        legend: SeriesLabelPosition::LowerRight,
    };
    draw(figure, vec![accuracy])?;
    let rows = swept.iter().flat_map(|(name, points)| {
        points.iter().map(move |it| {
            [
                (*name).to_owned(),
                it.rank.to_string(),
                grouped(it.measured.trainable),
                format!("{:.3}", it.measured.distance.mean),
                format!("{:.2}", it.measured.accuracy),
            ]
        })
    });
    let headers = ["layers", "rank", "trainable", "distance", "accuracy in %"];
    let table = table(&headers, &rows.collect::<Vec<_>>());
    let values: Vec<_> =
        swept.iter().map(|(name, points)| json!({ "layers": name, "points": points })).collect();
    Report::new("Layers, with about as many parameters".to_owned(), table, values)
}

fn adapter_parameters<M: Learns>(lab: &Lab<M>, config: &LoraConfig) -> Result<usize> {
    let model = lab.attach(config).context("counting parameters")?;
    Ok(model.adapters().iter().map(|(_, it)| it.num_trainable()).sum())
}

/// The rank at which adapters have about `parameters`, if they have `per_rank` at rank 1.
fn rank_for(parameters: usize, per_rank: usize) -> usize {
    (parameters as f64 / per_rank as f64).round().max(1.0) as usize
}

#[cfg(test)]
mod tests {
    use super::rank_for;

    #[test]
    fn ranks_give_about_equal_numbers_of_parameters() {
        assert_eq!(rank_for(2330, 2330), 1);
        // 1296, 768 and 266 parameters in the layers of the perceptron at rank 1.
        let ranks = [1296, 768, 266].map(|per_rank| rank_for(8 * 2330, per_rank));
        assert_eq!(ranks, [14, 24, 70]);
        assert_eq!(rank_for(10, 2330), 1);
    }
}
