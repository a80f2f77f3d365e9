//! Draws figures of curves.

use std::path::Path;

pub use plotters::chart::SeriesLabelPosition;
use plotters::prelude::*;

use super::{Context, Result};

/// One diagram of a figure.
pub struct Panel<'a> {
    pub title: &'a str,
    pub x: &'a str,
    pub y: &'a str,
    /// The curves' names and points.
    pub curves: Vec<(&'a str, Vec<(f64, f64)>)>,
    /// Whether each point is marked.
    pub marks: bool,
    /// Whether the vertical axis begins at 0.
    pub from_zero: bool,
    /// Where the legend covers no curve.
    pub legend: SeriesLabelPosition,
}

/// Colours that people with colour-vision deficiencies can tell apart (Okabe and Ito).
const COLORS: [RGBColor; 5] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 86, 86),
];

/// Draws the panels side by side, as SVG.
pub fn draw(path: &Path, panels: &[Panel]) -> Result<()> {
    let root = SVGBackend::new(path, (520 * panels.len() as u32, 360)).into_drawing_area();
    let drawn = (|| {
        root.fill(&WHITE)?;
        for (panel, area) in panels.iter().zip(root.split_evenly((1, panels.len()))) {
            draw_panel(panel, &area)?;
        }
        root.present()?;
        Ok::<_, Box<dyn std::error::Error>>(())
    })();
    drawn.context(path.display())
}

fn draw_panel(
    panel: &Panel,
    area: &DrawingArea<SVGBackend, plotters::coord::Shift>,
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let points = || panel.curves.iter().flat_map(|(_, points)| points);
    let x = range(points().map(|point| point.0), 0.0);
    let mut y = range(points().map(|point| point.1), 0.05);
    if panel.from_zero {
        y.start = 0.0;
    }
    let mut chart = ChartBuilder::on(area)
        .caption(panel.title, ("sans-serif", 17))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(48)
        .build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.12))
        .x_desc(panel.x)
        .y_desc(panel.y)
        .label_style(("sans-serif", 13))
        .draw()?;
    for (index, (name, points)) in panel.curves.iter().enumerate() {
        let color = COLORS[index % COLORS.len()];
        chart
            .draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(2)))?
            .label(*name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
        if panel.marks {
            let marks = points.iter().map(|&point| Circle::new(point, 3, color.filled()));
            chart.draw_series(marks)?;
        }
    }
    chart
        .configure_series_labels()
        .position(panel.legend.clone())
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.2))
        .label_font(("sans-serif", 13))
        .draw()?;
    Ok(())
}

/// The range of the finite values, extended on both sides by a share of its length.
fn range(values: impl Iterator<Item = f64>, margin: f64) -> std::ops::Range<f64> {
    let finite = values.filter(|value| value.is_finite());
    let (low, high) =
        finite.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    if low > high {
        return 0.0..1.0;
    }
    let margin = (high - low).max(1e-6) * margin;
    low - margin..(high + margin).max(low + 1e-6)
}
