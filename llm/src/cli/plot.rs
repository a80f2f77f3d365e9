//! Draws figures of curves.

use std::path::Path;

pub use plotters::chart::SeriesLabelPosition;
use plotters::{
    coord::{
        ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter},
        types::RangedCoordf64,
    },
    prelude::*,
};

use super::{Context, Result};

/// One diagram of a figure.
pub struct Panel<'a> {
    /// What the panel shows.
    pub title: &'a str,
    /// What the horizontal axis shows.
    pub x: &'a str,
    /// What the vertical axis shows.
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

/// What a panel can have besides its curves.
#[derive(Default)]
pub struct Extras<'a> {
    /// Whether each step to the right on the horizontal axis is a doubling. Its values are positive.
    pub doublings: bool,
    /// Whether each step up on the vertical axis is a multiplication. Values that are not positive are left
    /// out.
    pub multiples: bool,
    /// Names and heights of dashed lines, to compare the curves with.
    pub levels: Vec<(&'a str, f64)>,
    /// The lowest and the highest value at each point of each curve, as far as they are known.
    pub spreads: Vec<Vec<(f64, f64)>>,
}

/// Colors that people with color-vision deficiencies can tell apart (Okabe and Ito).
const COLORS: [RGBColor; 5] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 86, 86),
];

/// Draws the panels side by side, as SVG.
pub fn draw(path: &Path, panels: &[Panel]) -> Result<()> {
    let plain = Extras::default();
    let panels: Vec<_> = panels.iter().map(|panel| (panel, &plain)).collect();
    draw_with(path, &panels)
}

/// The same, with extras for each panel.
pub fn draw_with(path: &Path, panels: &[(&Panel, &Extras)]) -> Result<()> {
    let root = SVGBackend::new(path, (520 * panels.len() as u32, 360)).into_drawing_area();
    let drawn = (|| {
        root.fill(&WHITE)?;
        for ((panel, extras), area) in panels.iter().zip(root.split_evenly((1, panels.len()))) {
            draw_panel(panel, extras, &area)?;
        }
        root.present()?;
        Ok::<_, Box<dyn std::error::Error>>(())
    })();
    drawn.context(path.display())
}

fn draw_panel(
    panel: &Panel,
    extras: &Extras,
    area: &DrawingArea<SVGBackend, plotters::coord::Shift>,
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    // The axes are linear in these.
    let across = |x: f64| if extras.doublings { x.log2() } else { x };
    let up = |y: f64| if extras.multiples { y.log10() } else { y };
    let place = |&(x, y): &(f64, f64)| (across(x), up(y));
    let points = || panel.curves.iter().flat_map(|(_, points)| points).map(place);
    let levels = || extras.levels.iter().map(|&(_, y)| up(y));
    let ends = extras.spreads.iter().flatten().flat_map(|&(low, high)| [up(low), up(high)]);
    let x = range(points().map(|point| point.0), if extras.doublings { 0.02 } else { 0.0 });
    let mut y = range(points().map(|point| point.1).chain(levels()).chain(ends), 0.05);
    if panel.from_zero {
        y.start = 0.0;
    }
    let sides = [x.start, x.end];
    let x = Axis { range: x.into(), ticks: extras.doublings.then_some(Ticks::PowersOf2) };
    let y = Axis { range: y.into(), ticks: extras.multiples.then_some(Ticks::MultiplesOf10) };
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
        let spreads = extras.spreads.get(index).into_iter().flatten();
        for (&(x, _), &(low, high)) in points.iter().zip(spreads) {
            let whisker = [low, high].map(|y| (across(x), up(y)));
            if whisker.iter().all(|(_, y)| y.is_finite()) {
                chart.draw_series([PathElement::new(whisker, color.stroke_width(1))])?;
            }
        }
        let points = points.iter().map(place).filter(|(_, y)| y.is_finite());
        chart
            .draw_series(LineSeries::new(points.clone(), color.stroke_width(2)))?
            .label(*name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
        if panel.marks {
            let marks = points.map(|point| Circle::new(point, 3, color.filled()));
            chart.draw_series(marks)?;
        }
    }
    for (index, ((name, _), y)) in extras.levels.iter().zip(levels()).enumerate() {
        // From the other end of the colors, and with gaps as long as in the legend.
        let style = COLORS[COLORS.len() - 1 - index % COLORS.len()].stroke_width(1);
        let line = sides.map(|x| (x, y));
        chart.draw_series(DashedLineSeries::new(line, 5, 4, style))?.label(*name).legend(
            move |(x, y)| {
                let dash = |from: i32| PathElement::new([(x + from, y), (x + from + 5, y)], style);
                EmptyElement::at((0, 0)) + dash(0) + dash(9)
            },
        );
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

/// An axis that is linear, or linear in the logarithms of its values.
struct Axis {
    range: RangedCoordf64,
    /// Where it has ticks if it is logarithmic.
    ticks: Option<Ticks>,
}

enum Ticks {
    PowersOf2,
    /// Also at twice and five times powers of 10 if there are few of these.
    MultiplesOf10,
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        self.range.map(value, limit)
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.range.range()
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        let range = self.range();
        let every = if range.end - range.start < 10.0 { 1 } else { 2 };
        let whole = range.start.floor() as i32..=range.end.ceil() as i32;
        let whole = whole.filter(|it| it % every == 0);
        let between: &[f64] = match self.ticks {
            None => return self.range.key_points(hint),
            Some(Ticks::MultiplesOf10) if range.end - range.start < 3.0 => &[1.0, 2.0, 5.0],
            Some(_) => &[1.0],
        };
        let ticks = whole.flat_map(|it| between.iter().map(move |by| f64::from(it) + by.log10()));
        ticks.filter(|tick| range.contains(tick)).collect()
    }
}

impl ValueFormatter<f64> for Axis {
    fn format_ext(&self, value: &f64) -> String {
        match self.ticks {
            None => RangedCoordf64::format(value),
            Some(Ticks::PowersOf2) => short(value.exp2()),
            Some(Ticks::MultiplesOf10) => short(10f64.powf(*value)),
        }
    }
}

/// The number with about three digits.
fn short(number: f64) -> String {
    let digits = (2.0 - number.abs().log10().floor()).clamp(0.0, 6.0) as usize;
    let text = format!("{number:.digits$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
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
