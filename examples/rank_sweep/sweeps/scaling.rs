//! Under which rule for the scale one learning rate serves many ranks.

use std::path::Path;

use burn_lora::{LoraConfig, Scaling, report::table};
use common::{Result, classifier::Learns, cli::plot::SeriesLabelPosition};

use crate::{
    lab::{Lab, Measured, Point, Setting},
    report::{Curve, Diagram, Report, draw},
};

const RULES: [(&str, Scaling); 3] = [
    ("alpha", Scaling::Alpha),
    ("alpha/rank", Scaling::AlphaOverRank),
    ("alpha/sqrt(rank)", Scaling::AlphaOverSqrtRank),
];

const RANKS: [usize; 5] = [1, 4, 8, 16, 64];

/// The learning rates as multiples of that of the other sweeps.
const MULTIPLES: [f64; 2] = [0.5, 2.0];

/// The alpha with which the rule gives the scale that `alpha/rank` is at this rank.
pub fn alpha_for(rule: Scaling, rank: usize, alpha: f64) -> f64 {
    Scaling::AlphaOverRank.scale(alpha, rank) / rule.scale(1.0, rank)
}

/// The three rules agree at the rank of the other sweeps. A learning rate that is too low for some ranks and
/// one that is too high for others show what the rules do.
pub fn run<M: Learns>(lab: &mut Lab<M>, full: &Measured, figure: &Path) -> Result<Report> {
    let mut swept = Vec::new();
    for multiple in MULTIPLES {
        let learning_rate = multiple * lab.task.lora_learning_rate;
        let mut rules = Vec::new();
        for (name, rule) in RULES {
            let alpha = alpha_for(rule, lab.rank, lab.alpha);
            let settings = RANKS.map(|rank| Setting {
                label: format!("{name}, rank {rank}"),
                config: LoraConfig { alpha, ..lab.config(rank).with_scaling(rule) },
                learning_rate,
            });
            let sweep = format!("scaling, rate {learning_rate}");
            rules.push(lab.sweep(&sweep, &settings)?);
        }
        swept.push((learning_rate, rules));
    }
    let titles: Vec<_> =
        swept.iter().map(|(rate, _)| format!("Accuracy at learning rate {rate}")).collect();
    let diagrams = titles.iter().zip(&swept).map(|(title, (_, rules))| {
        let curves =
            rules.iter().map(|it| Curve::of(it, |it| it.rank as f64, |it| it.measured.accuracy));
        Diagram {
            title,
            x: "rank",
            y: "%",
            curves: RULES.iter().map(|(name, _)| *name).zip(curves).collect(),
            levels: vec![("full fine-tuning", full.accuracy.mean)],
            doublings: true,
            multiples: false,
            marks: true,
            legend: SeriesLabelPosition::LowerMiddle,
        }
    });
    draw(figure, diagrams.collect())?;
    let title = format!("Scaling, where the three rules have the same scale at rank {}", lab.rank);
    let points: Vec<_> = swept.iter().flat_map(|(_, rules)| rules.concat()).collect();
    Report::new(title, table_of(&swept), points)
}

fn table_of(swept: &[(f64, Vec<Vec<Point>>)]) -> String {
    let rows = swept.iter().flat_map(|(rate, rules)| {
        RANKS.iter().enumerate().map(move |(index, rank)| {
            let mut row = vec![rate.to_string(), rank.to_string()];
            row.extend(rules.iter().map(|it| format!("{:.2}", it[index].measured.accuracy)));
            row.extend(rules.iter().map(|it| format!("{:.3}", it[index].measured.distance.mean)));
            row
        })
    });
    let names = RULES.map(|(name, _)| name);
    let headers: Vec<_> = ["rate", "rank"].into_iter().chain(names).chain(names).collect();
    format!(
        "{}\nAccuracy in % under each rule, then the distance from the base under each.",
        table(&headers, &rows.collect::<Vec<_>>())
    )
}

#[cfg(test)]
mod tests {
    use burn_lora::Scaling;

    use super::{RULES, alpha_for};

    #[test]
    fn the_rules_agree_at_the_rank_of_the_other_sweeps() {
        for (_, rule) in RULES {
            let alpha = alpha_for(rule, 8, 16.0);
            assert!((rule.scale(alpha, 8) - 2.0).abs() < 1e-12);
        }
        assert_eq!(alpha_for(Scaling::Alpha, 8, 16.0), 2.0);
    }
}
