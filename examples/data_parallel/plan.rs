//! What many machines are worth, by the usual model of the cost of messages.
//!
//! To add up `bytes` over `n` replicas in a ring, each sends `2·(n − 1)` messages of `bytes / n`, and each
//! message takes `latency + size / bandwidth`. The replicas compute nothing meanwhile.

use std::{fs, path::PathBuf};

use clap::Args;

use burn_lora::report::table;
use common::{
    Context, Result,
    cli::plot::{Extras, Panel, SeriesLabelPosition, draw_with},
};

#[derive(Args, Debug)]
pub struct PlanArgs {
    /// Seconds of a step of LoRA on one replica, with the batch that each replica is to have
    #[arg(long, value_name = "SECONDS", value_parser = positive)]
    lora_step: f64,
    /// Bytes that it sends: 4 for each parameter that trains
    #[arg(long, value_name = "BYTES", value_parser = positive)]
    lora_bytes: f64,
    /// Seconds of a step of full fine-tuning
    #[arg(long, value_name = "SECONDS", value_parser = positive)]
    full_step: f64,
    /// Bytes that it sends
    #[arg(long, value_name = "BYTES", value_parser = positive)]
    full_bytes: f64,
    /// Seconds that the smallest message takes
    #[arg(long, value_name = "SECONDS", default_value = "0.00005", value_parser = positive)]
    latency: f64,
    /// File for the figure
    #[arg(long, value_name = "FILE", default_value = "out/data_parallel/plan.svg")]
    out: PathBuf,
}

fn positive(text: &str) -> Result<f64> {
    match text.parse() {
        Ok(value) if f64::is_finite(value) && value > 0.0 => Ok(value),
        _ => Err("a finite number above 0 is needed".to_owned()),
    }
}

/// Networks, in bits per second.
const NETWORKS: [(&str, f64); 3] = [("1 Gbit/s", 1e9), ("10 Gbit/s", 1e10), ("100 Gbit/s", 1e11)];

/// A way to train.
struct Method {
    name: &'static str,
    /// The seconds of a step, without sending.
    step: f64,
    bytes: f64,
}

impl Method {
    /// The part of the time that `replicas` compute.
    fn efficiency(&self, replicas: f64, latency: f64, bits: f64) -> f64 {
        let message = latency + 8.0 * self.bytes / replicas / bits;
        self.step / (self.step + 2.0 * (replicas - 1.0) * message)
    }
}

/// Prints the predicted efficiency, and draws it.
pub fn run(args: &PlanArgs) -> Result<()> {
    let methods = [
        Method { name: "LoRA", step: args.lora_step, bytes: args.lora_bytes },
        Method { name: "full fine-tuning", step: args.full_step, bytes: args.full_bytes },
    ];
    let counts: Vec<f64> = (1..=8).map(|power| f64::from(1 << power)).collect();
    let header: Vec<_> = counts.iter().map(|count| format!("{count}")).collect();
    let mut headers = vec!["efficiency with replicas"];
    headers.extend(header.iter().map(String::as_str));
    let (mut rows, mut panels) = (Vec::new(), Vec::new());
    for (network, bits) in NETWORKS {
        let mut curves = Vec::new();
        for method in &methods {
            let points = counts.iter().map(|&it| (it, method.efficiency(it, args.latency, bits)));
            let points: Vec<_> = points.collect();
            let mut row = vec![format!("{network}, {}", method.name)];
            row.extend(points.iter().map(|(_, efficiency)| format!("{efficiency:.2}")));
            rows.push(row);
            curves.push((method.name, points));
        }
        panels.push(Panel {
            title: network,
            x: "replicas",
            y: "efficiency",
            curves,
            marks: true,
            from_zero: true,
            legend: SeriesLabelPosition::LowerLeft,
        });
    }
    println!("{}", table(&headers, &rows));
    let extras = Extras { doublings: true, ..Extras::default() };
    let panels: Vec<_> = panels.iter().map(|panel| (panel, &extras)).collect();
    if let Some(dir) = args.out.parent() {
        fs::create_dir_all(dir).context(dir.display())?;
    }
    draw_with(&args.out, &panels)?;
    println!("Wrote {}", args.out.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cost_is_that_of_a_ring() {
        let method = Method { name: "LoRA", step: 2.0, bytes: 1e9 };
        // Each of four sends six quarters of a gigabyte at a gigabyte per second, and waits six times.
        let expected = 2.0 / (2.0 + 1.5 + 6.0 * 0.01);
        assert!((method.efficiency(4.0, 0.01, 8e9) - expected).abs() < 1e-12);
    }
}
