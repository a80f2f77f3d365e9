//! Adapts a transformer to another task on sequences in two ways: Burn's own `TransformerEncoder` through
//! the overlay, and the same model with this crate's attention layers. Both learn the same, but at
//! different speeds.
//!
//! ```text
//! cargo run --release --example transformer
//! ```

mod model;

use std::{fs, path::PathBuf, process::ExitCode, time::Instant};

use burn::{
    module::{AutodiffModule, Module},
    nn::loss::CrossEntropyLossConfig,
    optim::{AdamConfig, GradientsParams, Optimizer},
    tensor::{Int, Tensor, TensorData, backend::Backend},
};
use burn_lora::{
    Lora, LoraConfig, LoraModule,
    overlay::Overlay,
    report::{grouped, table},
};
use clap::Parser;
use common::{
    Context, Result,
    backend::{self, Plain, Train},
    cli::{
        self,
        live::{Live, Position, during},
        write_summary,
    },
};
use mimalloc::MiMalloc;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde::Serialize;

use model::{LENGTH, Layered, Stock, VOCAB_SIZE};

/// Reuses the memory of large tensors: every training step allocates them again.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Adapt a transformer through the overlay and with this crate's attention layers, and compare them.
#[derive(Parser, Debug)]
struct Args {
    /// Rank of the adapters
    #[arg(long, default_value = "8", value_parser = cli::positive)]
    rank: usize,
    /// Scale of the adapters: their update is multiplied by alpha/rank
    #[arg(long, default_value = "16", value_parser = cli::nonzero)]
    alpha: f64,
    /// Layers that get adapters, with commas between them: query, key, value, output
    #[arg(long, value_name = "LAYERS", default_value = "query,value", value_delimiter = ',')]
    targets: Vec<String>,
    /// Learning rate of the base and of full fine-tuning, which falls to zero
    #[arg(long, value_name = "RATE", default_value = "0.001", value_parser = cli::rate)]
    learning_rate: f64,
    /// Learning rate of LoRA
    #[arg(long, value_name = "RATE", default_value = "0.005", value_parser = cli::rate)]
    lora_learning_rate: f64,
    /// Steps of each training
    #[arg(long, default_value = "300", value_parser = cli::positive)]
    steps: usize,
    /// Seed of weights, adapters and sequences
    #[arg(long, default_value = "42")]
    seed: u64,
    /// Directory for summary.json
    #[arg(long, value_name = "DIR", default_value = "out/transformer")]
    out: PathBuf,
}

const BATCH: usize = 32;

/// The rule for the token at each position of the output.
#[derive(Clone, Copy)]
enum Task {
    /// The sequence in reverse order.
    Reverse,
    /// The sequence, rotated by three positions.
    Rotate,
}

impl Task {
    /// Sequences and their targets: `[BATCH, LENGTH]` each.
    fn batch<B: Backend>(self, rng: &mut StdRng) -> [Tensor<B, 2, Int>; 2] {
        let source = |position: usize| match self {
            Self::Reverse => LENGTH - 1 - position,
            Self::Rotate => (position + 3) % LENGTH,
        };
        let tokens: Vec<i32> =
            (0..BATCH * LENGTH).map(|_| rng.random_range(0..VOCAB_SIZE as i32)).collect();
        let rows = tokens.chunks(LENGTH);
        let targets = rows.flat_map(|row| (0..LENGTH).map(move |position| row[source(position)]));
        let targets = targets.collect::<Vec<i32>>();
        let tensor = |values| {
            let data = TensorData::new(values, [BATCH, LENGTH]);
            Tensor::from_data(data, &Default::default())
        };
        [tokens, targets].map(tensor)
    }
}

/// A model and its forward pass. The overlay needs a closure for it.
struct Run<M, F> {
    name: &'static str,
    model: M,
    forward: F,
    learning_rate: f64,
}

#[derive(Serialize)]
struct Outcome {
    name: &'static str,
    trainable: usize,
    loss: f64,
    accuracy: f64,
    /// The median over all steps.
    step_milliseconds: f64,
}

#[derive(Serialize)]
struct Summary {
    backend: &'static str,
    rank: usize,
    alpha: f64,
    targets: Vec<String>,
    learning_rate: f64,
    lora_learning_rate: f64,
    seed: u64,
    steps: usize,
    base_accuracy_old: f64,
    base_accuracy_new: f64,
    methods: Vec<Outcome>,
    overlay_to_layers_step_ratio: f64,
    max_abs_logit_diff: f64,
    base_restored_exactly: bool,
}

fn main() -> ExitCode {
    common::main(run)
}

fn run(args: Args) -> Result<()> {
    fs::create_dir_all(&args.out).context(args.out.display())?;
    println!("Sequences of {LENGTH} tokens, with the {} backend\n", backend::NAME);
    Plain::seed(&Default::default(), args.seed);

    let config =
        LoraConfig::peft(args.rank, args.alpha).with_targets(&args.targets).with_seed(args.seed);

    // 1. Train a transformer to reverse sequences.
    let stock = Stock::<Train>::new(&Default::default());
    // Reports wrong targets before the training.
    Layered::from(stock.clone()).attach(&config).context("attaching adapters")?;
    let trainable = stock.num_params();
    let (name, forward) = ("base: reverse", Stock::forward);
    let base = Run { name, model: stock, forward, learning_rate: args.learning_rate };
    let (base, _) = train(base, Task::Reverse, &args, trainable);
    let plain = base.valid();
    let right = |model: &Stock<Plain>, task| accuracy(|x| model.forward(x), task);
    let (old, new) = (right(&plain, Task::Reverse), right(&plain, Task::Rotate));
    println!(
        "\nIt is right in {old:.1} % of the positions, and in {new:.1} % if it should rotate.\n"
    );

    // 2. Adapt the same weights to rotate sequences: through the overlay, and in layers that have
    // adapters. Both sets of adapters start with the same numbers.
    let overlay = Lora::overlay(base.clone()).attach(&config).context("attaching adapters")?;
    let layers = Layered::from(base.clone()).attach(&config).context("attaching adapters")?;
    println!("{}\n", layers.parameters());
    let trainable = layers.parameters().trainable;
    let learning_rate = args.lora_learning_rate;
    let forward = |model: &Lora<Train, Overlay<Train, Stock<Train>>>, x| {
        model.with_adapters(|stock| stock.forward(x))
    };
    let overlay = Run { name: "LoRA, overlay", model: overlay, forward, learning_rate };
    let (overlay, by_overlay) = train(overlay, Task::Rotate, &args, trainable);
    let forward = |model: &Lora<Train, Layered<Train>>, x| model.forward(x);
    let layers = Run { name: "LoRA, layers", model: layers, forward, learning_rate };
    let (layers, by_layers) = train(layers, Task::Rotate, &args, trainable);
    let (name, model) = ("full fine-tuning", base.clone());
    let full = Run { name, model, forward: Stock::forward, learning_rate: args.learning_rate };
    let (_, by_full) = train(full, Task::Rotate, &args, base.num_params());

    // 3. Put the adapters of the overlay on the layers: they compute the same.
    let set = overlay.valid().adapters();
    let exchanged = layers.valid().switch(&set).context("switching")?;
    let [x, _] = Task::Rotate.batch::<Plain>(&mut StdRng::seed_from_u64(args.seed));
    let expected = overlay.valid().with_adapters(|stock| stock.forward(x.clone()));
    let difference = (exchanged.forward(x.clone()) - expected).abs().max();
    let max_abs_logit_diff = difference.into_data().iter::<f64>().fold(0.0, f64::max);
    let restored: Stock<Train> = overlay.detach();
    let restored = restored.valid().forward(x.clone());
    let base_restored_exactly = restored.into_data() == plain.forward(x).into_data();

    let methods = vec![by_full, by_overlay, by_layers];
    let step = |index: usize| methods[index].step_milliseconds;
    let overlay_to_layers_step_ratio = step(1) / step(2);
    let rows: Vec<_> = methods
        .iter()
        .map(|it| {
            [
                it.name.to_owned(),
                grouped(it.trainable),
                format!("{:.2}", it.step_milliseconds / step(0)),
                format!("{:.4}", it.loss),
                format!("{:.1} %", it.accuracy),
            ]
        })
        .collect();
    println!("\n{}", table(&["method", "trainable", "time/step", "loss", "right"], &rows));
    println!("time/step is relative to {}.\n", methods[0].name);
    println!(
        "A step of the overlay takes {overlay_to_layers_step_ratio:.2} times as long as one of the \
         layers. Its adapters,\nput on the layers, give logits within {max_abs_logit_diff:.1e}."
    );
    let summary = Summary {
        backend: backend::NAME,
        rank: args.rank,
        alpha: args.alpha,
        targets: args.targets,
        learning_rate: args.learning_rate,
        lora_learning_rate: args.lora_learning_rate,
        seed: args.seed,
        steps: args.steps,
        base_accuracy_old: old,
        base_accuracy_new: new,
        methods,
        overlay_to_layers_step_ratio,
        max_abs_logit_diff,
        base_restored_exactly,
    };
    let path = write_summary(&args.out, &summary)?;
    println!("Wrote {}", path.display());
    Ok(())
}

/// Trains on new sequences in each step, the same for every model.
fn train<M, F>(run: Run<M, F>, task: Task, args: &Args, trainable: usize) -> (M, Outcome)
where
    M: AutodiffModule<Train>,
    F: Fn(&M, Tensor<Train, 2, Int>) -> Tensor<Train, 3>,
{
    let Run { name, mut model, forward, learning_rate } = run;
    let mut rng = StdRng::seed_from_u64(args.seed);
    let mut optimizer = AdamConfig::new().init::<Train, M>();
    let loss_of = CrossEntropyLossConfig::new().init(&Default::default());
    let (mut times, mut last) = (Vec::new(), 0.0);
    let part = |step: usize| format!("step {step}/{}", args.steps);
    let mut live = Live::new(name, part(0));
    for step in 1..=args.steps {
        let [x, targets] = task.batch(&mut rng);
        let start = Instant::now();
        let logits = forward(&model, x).flatten::<2>(0, 1);
        let loss = loss_of.forward(logits, targets.flatten::<1>(0, 1));
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        // The learning rate falls linearly, to reduce noise at the end.
        let rate = learning_rate * (args.steps + 1 - step) as f64 / args.steps as f64;
        model = optimizer.step(rate, model, grads);
        // Reading the loss waits for the device.
        last = loss.into_data().iter::<f64>().sum();
        times.push(start.elapsed().as_secs_f64());
        let done = step as f64 / args.steps as f64;
        live.update(&Position { part: part(step), of_part: done, of_all: done }, last);
        if step % args.steps.div_ceil(3) == 0 || step == args.steps {
            live.line(format_args!("{}  loss {last:.4}", part(step)));
        }
    }
    drop(live);
    times.sort_by(f64::total_cmp);
    let accuracy = during(&format!("testing {name}"), || {
        accuracy(|x| forward(&model, Tensor::from_inner(x)).inner(), task)
    });
    let step_milliseconds = 1e3 * times[times.len() / 2];
    (model, Outcome { name, trainable, loss: last, accuracy, step_milliseconds })
}

/// The percentage of positions with the right token.
fn accuracy(forward: impl Fn(Tensor<Plain, 2, Int>) -> Tensor<Plain, 3>, task: Task) -> f64 {
    const BATCHES: usize = 10;
    let mut rng = StdRng::seed_from_u64(7);
    let right = (0..BATCHES).map(|_| {
        let [x, targets] = task.batch::<Plain>(&mut rng);
        let found = forward(x).argmax(2).reshape([BATCH, LENGTH]);
        found.equal(targets).int().sum().into_data().iter::<f64>().sum::<f64>()
    });
    100.0 * right.sum::<f64>() / (BATCHES * BATCH * LENGTH) as f64
}
