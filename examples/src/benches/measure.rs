//! Timing in turn, so that a change of the machine's speed meets all that are compared.

use std::time::{Duration, Instant};

use burn::tensor::backend::Backend;

use crate::backend::{self, Plain};

/// The fewest repetitions that a median is taken of.
const ROUNDS: usize = 15;

/// Short work is repeated for at least this long, and at most [`MOST_ROUNDS`] times.
const AT_LEAST: Duration = Duration::from_millis(1500);
const MOST_ROUNDS: usize = 200;

/// Something to be timed; one call is one repetition.
pub type Work<'a> = Box<dyn FnMut() + 'a>;

/// Runs all in turn, over and over, and gives the median time of each, in milliseconds. What the
/// device still has to do is waited for, and counts.
pub fn medians(mut works: Vec<Work>) -> Vec<f64> {
    let device = Default::default();
    let mut times = vec![Vec::new(); works.len()];
    let start = Instant::now();
    let mut round = 0;
    while round <= ROUNDS || (start.elapsed() < AT_LEAST && round < MOST_ROUNDS) {
        for (work, times) in works.iter_mut().zip(&mut times) {
            let start = Instant::now();
            work();
            Plain::sync(&device).expect("the device works");
            // The first round warms up.
            if round > 0 {
                times.push(1e3 * start.elapsed().as_secs_f64());
            }
        }
        round += 1;
    }
    times.into_iter().map(median).collect()
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Prints the first two lines of a table in Markdown.
pub fn print_header(title: &str, columns: &[&str]) {
    println!("### {title}\n");
    println!("| {} |", columns.join(" | "));
    println!("|---{}|", "|---:".repeat(columns.len() - 1));
}

/// Prints a line of a table in Markdown.
pub fn print_row(cells: &[String]) {
    println!("| {} |", cells.join(" | "));
}

/// What runs this: the processor, its cores, and the backend.
pub fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = info.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let model = field("model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let flags = field("flags").unwrap_or_default();
    let vectors = ["avx512f", "avx2"].into_iter().find(|name| flags.contains(name));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    format!(
        "{model} ({}), {cores} cores, {}; backend `{}`; medians of {ROUNDS} repetitions or more, in turn",
        vectors.unwrap_or("no AVX"),
        std::env::consts::OS,
        backend::NAME,
    )
}
