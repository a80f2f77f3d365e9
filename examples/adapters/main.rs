//! One base, many adapters: learns several tasks on the same base, then switches, saves, combines and
//! truncates the adapters.
//!
//! ```text
//! cargo run --release --example adapters
//! ```

use std::{
    alloc::System,
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use burn::{module::Module, tensor::backend::Backend};
use burn_lora::{
    LoraAdapters, LoraConfig, LoraModule,
    adapters::{Approximation, Combination},
    report::{grouped, table},
};
use clap::Parser;
use common::{
    Context, Result,
    backend::{self, Plain, Train},
    classifier::{Trained, accuracy, fit, logits},
    cli::{
        self,
        live::during,
        plot::{Panel, SeriesLabelPosition, draw},
    },
    digits::{Digits, mirror, rotate},
    experiment::{Options, default, help},
    mlp::Mlp,
};
use serde::Serialize;
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

/// Counts every allocation, to show what adapters add to a base in memory.
#[global_allocator]
static MEMORY: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Learn several tasks as adapters on one base, and switch, save, combine and truncate them.
#[derive(Parser, Debug)]
#[command(
    mut_arg("epochs", default("3")),
    mut_arg(
        "out",
        help("Directory for adapters.svg, summary.json, the adapters and burn-train's logs")
    ),
    mut_arg("out", default("out/adapters"))
)]
struct Args {
    /// Directory with MNIST's four IDX files, raw or .gz; drawn digits by default
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Number of training images
    #[arg(long, value_name = "N", default_value = "12000", value_parser = cli::positive)]
    train_size: usize,
    /// Layers that get adapters, with commas between them: fc1, fc2 or head; all by default
    #[arg(long, value_name = "LAYERS", value_delimiter = ',')]
    targets: Vec<String>,
    #[command(flatten)]
    options: Options,
}

/// What `summary.json` has besides the options.
#[derive(Serialize)]
struct Summary {
    dataset: &'static str,
    targets: Vec<String>,
    base_bytes: usize,
    /// The size of one set of adapters in memory.
    adapter_bytes: usize,
    /// The size of one set on disk, in two files.
    file_bytes: u64,
    switch_micros: f64,
    /// The memory allocated for the base and one set of adapters, and for the base and 64 sets.
    resident_bytes_with_1: usize,
    resident_bytes_with_64: usize,
    /// In percent, for each set of adapters and task.
    accuracies: BTreeMap<String, BTreeMap<&'static str, f64>>,
}

/// A task and the adapters trained for it.
struct Task {
    name: &'static str,
    digits: Digits,
    adapters: LoraAdapters<Plain>,
}

fn main() -> ExitCode {
    common::main(run)
}

fn run(args: Args) -> Result<()> {
    let options = &args.options;
    options.create_out()?;
    let mut digits = Digits::load(args.data.as_deref(), args.data.is_none(), options.seed)?;
    digits.train.truncate(args.train_size);
    println!(
        "Training on {} images ({}), with the {} backend\n",
        grouped(digits.train.len()),
        digits.name,
        backend::NAME,
    );
    let config = options.config().with_targets(&args.targets);
    let train = |name, model, learning_rate, digits: &Digits| -> Result<Trained<Mlp<Train>>> {
        let recipe = options.recipe(name, learning_rate);
        Ok(fit(&recipe, model, &digits.train, &digits.test)?.0)
    };
    let mut results = Vec::new();

    // 1. Train one base, and a set of adapters for each task.
    Plain::seed(&Default::default(), options.seed);
    let base = Mlp::<Train>::new(&Default::default());
    // Reports wrong targets before the training.
    base.clone().attach(&config).context("attaching adapters")?;
    let base = base.train_only(&[".*"]).context("training the base")?;
    let base = train("base", base, options.learning_rate, &digits)?.into_inner();
    let base_bytes = 4 * base.num_params();
    let changes: [(&str, fn(&_) -> _); 4] = [
        ("left", |image| rotate(image, 60.0)),
        ("right", |image| rotate(image, -60.0)),
        ("upside-down", |image| rotate(image, 180.0)),
        ("mirrored", mirror),
    ];
    let mut tasks = Vec::new();
    for (name, change) in changes {
        let digits = digits.map(change);
        let model = base.clone().train::<Train>().attach(&config).context("attaching adapters")?;
        let model = train(name, model, options.lora_learning_rate, &digits)?;
        tasks.push(Task { name, digits, adapters: model.adapters() });
    }
    println!("\n{}\n", tasks[0].adapters);

    // 2. Save the adapters, load them, and check that nothing is lost.
    let mut file_bytes = 0;
    for task in &mut tasks {
        let dir = options.out.join(task.name);
        task.adapters.save(&dir).context("saving")?;
        file_bytes = cli::size_of_files(&dir)?;
        let before = accuracy_on(&base, &task.adapters, task)?;
        task.adapters = load(&dir)?;
        let after = accuracy_on(&base, &task.adapters, task)?;
        if before != after {
            return Err(format!("{}: {before} % became {after} % in a file", dir.display()));
        }
    }
    let judge_set = |name: String, adapters: &LoraAdapters<Plain>| {
        Ok::<_, String>(row(name, &*base.switch(adapters).context("switching")?, &tasks))
    };
    results.push(row("none".to_owned(), &base, &tasks));
    for task in &tasks {
        results.push(judge_set(task.name.to_owned(), &task.adapters)?);
    }

    // 3. Hold many sets in memory. They share one base, and each needs only its own size.
    let resident = |sets: usize| -> Result<usize> {
        let start = allocated();
        let dirs = tasks.iter().cycle().take(sets);
        let sets: Result<Vec<_>> = dirs.map(|task| load(&options.out.join(task.name))).collect();
        let sets = sets?;
        let bytes = base_bytes + allocated() - start;
        drop(sets);
        Ok(bytes)
    };
    let resident_bytes_with_1 = resident(1)?;
    let resident_bytes_with_64 = resident(64)?;
    let adapter_bytes = tasks[0].adapters.num_bytes();

    // 4. Switch between sets. The time does not depend on the size of the base.
    let mut micros = Vec::new();
    for round in 0..400 {
        let adapters = &tasks[round % tasks.len()].adapters;
        let start = Instant::now();
        let model = base.switch(adapters).context("switching")?;
        micros.push(start.elapsed().as_secs_f64() * 1e6);
        drop(model);
    }
    micros.sort_by(f64::total_cmp);
    let switch_micros = micros[micros.len() / 2];

    // 5. Combine the adapters of two tasks, with different weights.
    let [left, mirrored] = [&tasks[0], &tasks[3]];
    let mixtures = during("testing mixtures", || {
        let mut mixtures = [Vec::new(), Vec::new()];
        for step in 0..=8 {
            let share = f64::from(step) / 8.0;
            let parts = [(&left.adapters, share), (&mirrored.adapters, 1.0 - share)];
            let sum = LoraAdapters::combine(&parts, Combination::Concatenate).context("adding")?;
            for (task, points) in [left, mirrored].into_iter().zip(&mut mixtures) {
                points.push((share, accuracy_on(&base, &sum, task)?));
            }
        }
        Ok::<_, String>(mixtures)
    })?;
    let ways = [
        ("sum", Combination::Concatenate),
        ("linear", Combination::Linear),
        ("ties", Combination::Ties { density: 0.7 }),
        ("dare", Combination::Dare { density: 0.7, seed: options.seed }),
    ];
    for (way, how) in ways {
        let parts = [(&left.adapters, 0.6), (&mirrored.adapters, 0.6)];
        let both = LoraAdapters::combine(&parts, how).context("combining")?;
        results.push(judge_set(format!("left and mirrored, {way}"), &both)?);
    }

    // 6. Reduce the rank: truncate the adapters, or extract adapters from a fully fine-tuned model.
    let full = base.clone().train::<Train>().train_only(&[".*"]).context("full fine-tuning")?;
    let full =
        train("left, full fine-tuning", full, options.learning_rate, &left.digits)?.into_inner();
    results.push(row("full fine-tuning on left".to_owned(), &full, &tasks));
    let mut by_rank = [Vec::new(), Vec::new()];
    for rank in [1, 2, 4, 8].into_iter().filter(|rank| *rank <= options.rank) {
        let truncated = left.adapters.truncate(rank);
        let config = LoraConfig::new(rank, 1.0).with_targets(&args.targets);
        let extracted = base.extract(&full, &config).context("extracting")?;
        for ((what, approximation), points) in
            [("truncated", truncated), ("extracted", extracted)].into_iter().zip(&mut by_rank)
        {
            let Approximation { adapters, kept, .. } = approximation;
            let (layer, kept) = kept.first_key_value().expect("a layer has an adapter");
            println!("{what} to rank {rank}: keeps {:.1} % of {layer}'s update", 100.0 * kept);
            let (name, accuracies) = judge_set(format!("left, {what} to rank {rank}"), &adapters)?;
            points.push((rank as f64, accuracies[0]));
            results.push((name, accuracies));
        }
    }

    let cells = |(name, accuracies): &(String, Vec<f64>)| {
        let cells = accuracies.iter().map(|it| format!("{it:.2} %"));
        std::iter::once(name.clone()).chain(cells).collect::<Vec<_>>()
    };
    let names: Vec<_> = tasks.iter().map(|task| task.name).collect();
    let rows: Vec<_> = results.iter().map(cells).collect();
    println!("\nThe accuracy of each set of adapters (rows) on each task (columns):\n");
    println!("{}\n", table(&[&["adapters"], &names[..]].concat(), &rows));
    let more = resident_bytes_with_64 - resident_bytes_with_1;
    let rows = [
        ("base", grouped(base_bytes)),
        ("one set of adapters", grouped(adapter_bytes)),
        ("one set in its two files", grouped(file_bytes as usize)),
        ("base and 1 set in memory", grouped(resident_bytes_with_1)),
        ("base and 64 sets in memory", grouped(resident_bytes_with_64)),
        ("each further set, by its own size", {
            format!("{:.3}", more as f64 / (63 * adapter_bytes) as f64)
        }),
        ("switching, in microseconds", format!("{switch_micros:.0}")),
    ];
    let rows = rows.map(|(name, value)| [name.to_owned(), value]);
    println!("{}\n", table(&["", "bytes"], &rows));

    let figure = options.out.join("adapters.svg");
    let [on_left, on_mirrored] = mixtures;
    let [truncated, extracted] = by_rank;
    draw(
        &figure,
        &[
            Panel {
                title: "Two tasks in one set",
                x: "share of `left`; the rest is `mirrored`",
                y: "accuracy, %",
                curves: vec![("on left", on_left), ("on mirrored", on_mirrored)],
                marks: true,
                from_zero: false,
                legend: SeriesLabelPosition::MiddleLeft,
            },
            Panel {
                title: "Adapters cut to a lower rank",
                x: "rank",
                y: "accuracy, %",
                curves: vec![
                    ("trained at a higher rank, cut", truncated),
                    ("from full fine-tuning", extracted),
                ],
                marks: true,
                from_zero: false,
                legend: SeriesLabelPosition::LowerRight,
            },
        ],
    )?;
    let by_task = |accuracies: Vec<f64>| names.iter().copied().zip(accuracies).collect();
    let results = results.into_iter().map(|(name, accuracies)| (name, by_task(accuracies)));
    let summary = Summary {
        dataset: digits.name,
        targets: args.targets,
        base_bytes,
        adapter_bytes,
        file_bytes,
        switch_micros,
        resident_bytes_with_1,
        resident_bytes_with_64,
        accuracies: results.collect(),
    };
    let path = options.write_summary(&summary)?;
    println!("Wrote {} and {}", figure.display(), path.display());
    Ok(())
}

fn load(dir: &Path) -> Result<LoraAdapters<Plain>> {
    LoraAdapters::load(dir, &Default::default()).context("loading")
}

fn judge(model: &Mlp<Plain>, task: &Task) -> f64 {
    accuracy(logits(model, &task.digits.test), &task.digits.test)
}

/// A row of the results: a name, and the accuracy on each task in percent.
fn row(name: String, model: &Mlp<Plain>, tasks: &[Task]) -> (String, Vec<f64>) {
    let accuracies = during(&format!("testing {name}"), || {
        tasks.iter().map(|task| judge(model, task)).collect()
    });
    (name, accuracies)
}

fn accuracy_on(base: &Mlp<Plain>, adapters: &LoraAdapters<Plain>, task: &Task) -> Result<f64> {
    let model = base.switch(adapters).context("switching")?;
    Ok(judge(&model, task))
}

fn allocated() -> usize {
    let stats = MEMORY.stats();
    stats.bytes_allocated - stats.bytes_deallocated
}
