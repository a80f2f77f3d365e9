//! How many directions full fine-tuning changes a weight in.

use std::path::Path;

use burn::tensor::Tensor;
use nalgebra::DMatrix;
use serde::Serialize;

use burn_lora::report::table;
use common::{
    Result,
    backend::Plain,
    classifier::Learns,
    cli::{live::during, plot::SeriesLabelPosition},
};

use crate::{
    lab::Lab,
    report::{Curve, Diagram, Report, draw},
};

/// The ranks whose share of the energy is in the table.
const SHOWN: [usize; 5] = [1, 4, 8, 16, 64];

/// The number of weights in the figure: those that change most.
const DRAWN: usize = 5;

/// The change of one weight.
#[derive(Serialize)]
struct Change {
    layer: String,
    shape: [usize; 2],
    /// The largest first.
    singular_values: Vec<f64>,
    /// The share of the energy that the best approximation of each rank from 1 on keeps.
    energy: Vec<f64>,
}

/// Of one tuned model, the first.
pub fn run<M: Learns>(lab: &Lab<M>, tuned: &M::InnerModule, figure: &Path) -> Result<Report> {
    let changes: Vec<_> = during("decomposing the changes of the weights", || {
        let changes = lab.changes(tuned).into_iter();
        changes.map(|(layer, change)| Change::of(layer, change)).collect()
    });
    let mut drawn: Vec<_> = changes.iter().collect();
    drawn.sort_by(|a, b| b.singular_values[0].total_cmp(&a.singular_values[0]));
    drawn.truncate(DRAWN);
    let curves = |y: fn(&Change) -> Vec<f64>| {
        let curve = |values: Vec<f64>| {
            let points = values.into_iter().enumerate();
            Curve { points: points.map(|(at, it)| (at as f64 + 1.0, it)).collect(), ends: vec![] }
        };
        drawn.iter().map(|it| (it.layer.as_str(), curve(y(it)))).collect::<Vec<_>>()
    };
    let values = Diagram {
        title: "Singular values of the change",
        x: "index",
        y: "value / largest value",
        curves: curves(|it| it.singular_values.iter().map(|s| s / it.singular_values[0]).collect()),
        levels: vec![],
        doublings: true,
        multiples: false,
        marks: false,
        legend: SeriesLabelPosition::UpperRight,
    };
    let energy = Diagram {
        title: "Share of the energy",
        x: "rank",
        y: "share",
        curves: curves(|it| it.energy.clone()),
        levels: vec![],
        doublings: true,
        multiples: false,
        marks: false,
        legend: SeriesLabelPosition::LowerRight,
    };
    draw(figure, vec![values, energy])?;
    let rows = changes.iter().map(|it| {
        let [rows, columns] = it.shape;
        let mut row = vec![it.layer.clone(), format!("{rows}x{columns}")];
        row.extend(SHOWN.map(|rank| {
            it.energy
                .get(rank - 1)
                .map_or("-".to_owned(), |share| format!("{:.1} %", 100.0 * share))
        }));
        row
    });
    let ranks = SHOWN.map(|rank| format!("rank {rank}"));
    let headers: Vec<_> =
        ["layer", "weight"].into_iter().chain(ranks.iter().map(String::as_str)).collect();
    let table = table(&headers, &rows.collect::<Vec<_>>());
    let title = "Share of the energy of full fine-tuning's change that each rank can hold";
    Report::new(title.to_owned(), table, changes)
}

impl Change {
    fn of(layer: String, change: Tensor<Plain, 2>) -> Self {
        let [rows, columns] = change.dims();
        let values: Vec<f64> = change.into_data().iter::<f64>().collect();
        let singular_values = DMatrix::from_row_slice(rows, columns, &values).singular_values();
        let mut singular_values: Vec<f64> = singular_values.iter().copied().collect();
        singular_values.sort_by(|a, b| b.total_cmp(a));
        let energy = energy(&singular_values);
        Self { layer, shape: [rows, columns], singular_values, energy }
    }
}

/// The share of the sum of squares that the first values have, for one value, two, and so on.
fn energy(values: &[f64]) -> Vec<f64> {
    let total: f64 = values.iter().map(|it| it * it).sum();
    let mut sum = 0.0;
    let shares = values.iter().map(|it| {
        sum += it * it;
        sum / total
    });
    shares.collect()
}

#[cfg(test)]
mod tests {
    use burn::tensor::Tensor;

    use super::{Change, energy};

    #[test]
    fn energy_is_the_share_of_squares() {
        assert_eq!(energy(&[4.0, 3.0, 0.0]), [16.0 / 25.0, 1.0, 1.0]);
    }

    #[test]
    fn a_change_of_rank_1_has_its_energy_in_one_value() {
        let device = Default::default();
        let column = Tensor::<_, 2>::from_floats([[1.0], [2.0], [2.0]], &device);
        let row = Tensor::from_floats([[3.0, 4.0]], &device);
        let change = Change::of("fc".to_owned(), column.matmul(row));
        assert!((change.singular_values[0] - 15.0).abs() < 1e-4);
        assert!((change.energy[0] - 1.0).abs() < 1e-9);
        assert_eq!(change.shape, [3, 2]);
    }
}
