//! What a training came to.

use burn_lora::nn::Precision;
use plotters::chart::SeriesLabelPosition;
use serde_json::json;

use burn_lora_llm::{
    Context, Result,
    cli::{
        self,
        plot::{Panel, draw},
    },
    files::write_atomically,
};

use crate::{
    args::TrainArgs,
    backend,
    results::{CURVES, SUMMARY},
    train::{ADAPTER, History},
};

/// Draws the curves, prints the results and writes them to files.
pub fn report(
    args: &TrainArgs,
    precision: Precision,
    history: &History,
    accuracies: &[f64],
    replicas: usize,
) -> Result<()> {
    let adapter = args.out.join(ADAPTER);
    let steps = |losses: &[f64]| {
        losses.iter().enumerate().map(|(step, &loss)| ((step + 1) as f64, loss)).collect()
    };
    let valid = history.valid.iter().map(|&(step, loss)| (step as f64, loss)).collect();
    let panel = Panel {
        title: "loss per token",
        x: "step",
        y: "loss",
        curves: vec![("training", steps(&history.losses)), ("validation", valid)],
        marks: false,
        from_zero: false,
        legend: SeriesLabelPosition::UpperRight,
    };
    let curves = args.out.join(CURVES);
    draw(&curves, &[panel])?;

    let (first, last) = (history.valid[0].1, history.valid[history.valid.len() - 1].1);
    let speed = history.tokens as f64 / history.seconds;
    let size = if args.full { None } else { Some(cli::size_of_files(&adapter)?) };
    println!();
    println!("perplexity before  {:10.2}", first.exp());
    println!("perplexity after   {:10.2}", last.exp());
    if let [before, after] = accuracies {
        println!("accuracy before    {before:10.2} %");
        println!("accuracy after     {after:10.2} %");
    }
    println!("tokens per second  {speed:10.0}");
    if replicas > 1 {
        let steps = history.losses.len() as f64;
        println!("replicas           {replicas:10}");
        println!("sent per step      {:10.0} bytes", history.sent as f64 / steps);
        println!(
            "sending, waiting   {:10.1} % of the time",
            100.0 * history.sending / history.seconds
        );
    }
    if let Some(size) = size {
        println!("adapter            {size:10} bytes");
    }
    if let Some(bytes) = peak_memory() {
        println!("peak memory        {:10.0} MiB", bytes as f64 / f64::from(1 << 20));
    }
    if history.losses.len() < args.iters {
        let instead = if args.force { " in the place of --force" } else { "" };
        println!("Stopped early. The same command with --resume{instead} goes on.");
    }
    match size {
        Some(_) => println!("Adapters: {}. Curves: {}.", adapter.display(), curves.display()),
        None => println!("Curves: {}.", curves.display()),
    }
    let mut summary = json!({
        "backend": backend::NAME,
        "replicas": replicas,
        "adapter": args.adapter,
        "dtype": precision.to_string(),
        "perplexity_before": first.exp(),
        "perplexity_after": last.exp(),
        "accuracies": accuracies,
        "tokens_per_second": speed,
        "peak_memory": peak_memory(),
        "history": history,
    });
    if let Some(fields) = summary.as_object_mut() {
        fields.extend(args.shape());
    }
    let path = args.out.join(SUMMARY);
    let summary = serde_json::to_vec_pretty(&summary).context(path.display())?;
    write_atomically(&path, &summary).context(path.display())
}

/// The most memory that the program had at once, in bytes, where the system tells it.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(1024 * kibibytes)
}
