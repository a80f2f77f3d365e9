//! Adapts a policy that balances a pole on a cart to other carts: with the motor reversed, with a longer
//! pole, and with both. It learns from reward alone, and compares LoRA, full fine-tuning and training from
//! scratch by the episodes that they need. The task is noisy: everything is repeated with several seeds.
//!
//! ```text
//! cargo run --release --example cartpole
//! cargo run --release --example cartpole -- --seeds 3 --rank 4 --targets fc1,fc2,head
//! cargo run --release --example cartpole --no-default-features --features wgpu
//! ```

mod physics;
mod policy;
mod reinforce;
mod report;
mod stage;

use std::{fs, path::PathBuf, process::ExitCode, time::Instant};

use burn::{module::Module, tensor::backend::Backend};
use burn_lora::{Lora, LoraAdapters, LoraConfig, LoraError, LoraModule, report::grouped};
use clap::Parser;
use common::{
    Context, Result,
    backend::{self, Plain, Train},
    cli::{self, file_name, live::during, write_summary},
    tensors::bits,
};
use mimalloc::MiMalloc;
use rand::{SeedableRng, rngs::StdRng};

use physics::{Physics, State};
use policy::Policy;
use reinforce::{TARGET, mean_return};
use report::{Method, Summary, Variant};
use stage::Stage;

/// Reuses the memory of large tensors: every training step allocates them again.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Adapt a policy that balances a pole on a cart to a reversed motor and a longer pole, and compare LoRA
/// with full fine-tuning and training from scratch.
#[derive(Parser, Debug)]
struct Args {
    /// Rank of the adapters
    #[arg(long, default_value = "1", value_parser = cli::positive)]
    rank: usize,
    /// Scale of the adapters: their update is multiplied by alpha/rank
    #[arg(long, default_value = "4", value_parser = cli::nonzero)]
    alpha: f64,
    /// Layers that get adapters, with commas between them: fc1, fc2 or head
    #[arg(long, value_name = "LAYERS", default_value = "head", value_delimiter = ',')]
    targets: Vec<String>,
    /// Learning rate of the base, of full fine-tuning and of training from scratch
    #[arg(long, value_name = "RATE", default_value = "0.005", value_parser = cli::rate)]
    learning_rate: f64,
    /// Learning rate of LoRA
    #[arg(long, value_name = "RATE", default_value = "0.03", value_parser = cli::rate)]
    lora_learning_rate: f64,
    /// Episodes after which a training ends that has not reached 95 % of the highest return
    #[arg(long, value_name = "N", default_value = "240", value_parser = cli::positive)]
    max_episodes: usize,
    /// How often everything is repeated, each time with another seed
    #[arg(long, value_name = "N", default_value = "5", value_parser = cli::positive)]
    seeds: usize,
    /// First seed of weights, adapters and luck
    #[arg(long, default_value = "42")]
    seed: u64,
    /// Directory for returns.svg, summary.json and the adapters
    #[arg(long, value_name = "DIR", default_value = "out/cartpole")]
    out: PathBuf,
}

/// The carts that the base never sees.
const VARIANTS: [(&str, Physics); 3] = [
    ("reversed motor", Physics::STANDARD.reversed()),
    ("longer pole", Physics::STANDARD.longer(4.0)),
    ("both", Physics::STANDARD.longer(4.0).reversed()),
];

/// The name of the method with adapters, which has its own learning rate.
const LORA: &str = "LoRA";

/// A model for each seed.
type Models = Vec<Lora<Train, Policy<Train>>>;

fn main() -> ExitCode {
    common::main(run)
}

fn run(args: Args) -> Result<()> {
    let start = Instant::now();
    fs::create_dir_all(&args.out).context(args.out.display())?;
    let seeds: Vec<_> = (0..args.seeds as u64).map(|index| args.seed.wrapping_add(index)).collect();
    println!(
        "Balancing a pole for up to {} steps, with {} seeds and the {} backend. A training ends at a \
         return of {TARGET:.0}, or after {} episodes\n",
        grouped(physics::MAX_STEPS),
        seeds.len(),
        backend::NAME,
        grouped(args.max_episodes),
    );
    let adapters_of = |seed: u64| {
        LoraConfig::peft(args.rank, args.alpha).with_targets(&args.targets).with_seed(seed)
    };

    // 1. Train a base for each seed, on the standard cart.
    let fresh = seeds.iter().map(|&seed| {
        Plain::seed(&Default::default(), seed);
        let fresh = Policy::<Train>::new(&Default::default());
        // Reports wrong targets before the training.
        fresh.attach(&adapters_of(seed)).context("attaching adapters")?;
        fresh.train_only(&[".*"]).context("training the base")
    });
    let fresh = fresh.collect::<Result<Models>>()?;
    let learn = |what: &'static str, on: &str, physics: &Physics, models: Models| {
        let parameters = Lora::parameters(&models[0]);
        let learning_rate = if what == LORA { args.lora_learning_rate } else { args.learning_rate };
        let (name, max_episodes) = (format!("{on}: {what}"), args.max_episodes);
        let name = &format!("{name:<32}");
        let stage = Stage { name, physics, learning_rate, max_episodes, seeds: &seeds };
        let trained = stage.train(models);
        let tested = trained.iter().zip(&seeds);
        let returns = tested.map(|(it, &seed)| mean_return(&it.model, physics, seed)).collect();
        (Method::new(what, &parameters, &trained, returns), trained)
    };
    let (standard, bases) = learn("the base", "standard cart", &Physics::STANDARD, fresh.clone());
    let bases: Vec<_> = bases.into_iter().map(|base| base.model.into_inner()).collect();

    // 2. Adapt the bases to each other cart, and train from scratch there.
    let mut variants = Vec::new();
    let mut adapted = Vec::new();
    for (name, cart) in VARIANTS {
        let base = bases.iter().zip(&seeds);
        let base = base.map(|(base, &seed)| mean_return(base, &cart, seed)).collect();
        let adapters = each(&bases, &seeds, |base, seed| base.attach(&adapters_of(seed)))?;
        let full = each(&bases, &seeds, |base, _| base.train_only(&[".*"]))?;
        let (lora, trained) = learn(LORA, name, &cart, adapters);
        let (full, _) = learn("full fine-tuning", name, &cart, full);
        let (scratch, _) = learn("from scratch", name, &cart, fresh.clone());
        let Physics { half_length, pole_mass, force } = cart;
        let methods = vec![lora, full, scratch];
        variants.push(Variant { name, half_length, pole_mass, force, base, methods });
        adapted.push(trained);
    }
    println!("\n{}\n", report::results(&variants, args.max_episodes));

    // 3. Save the first seed's adapters, load them, and switch between them on one base.
    let (base, seed) = (&bases[0], seeds[0]);
    let carts = [("standard", Physics::STANDARD)].into_iter().chain(VARIANTS);
    let carts: Vec<_> = carts.collect();
    let on_all = |policy: &Policy<Plain>| -> Vec<_> {
        carts.iter().map(|(_, cart)| mean_return(policy, cart, seed)).collect()
    };
    let mut rows = vec![("none".to_owned(), on_all(base))];
    let mut switched_returns_equal = true;
    for (index, variant) in variants.iter().enumerate() {
        let dir = args.out.join("adapters").join(file_name(variant.name));
        adapted[index][0].model.adapters().save(&dir).context("saving the adapters")?;
        let adapters = LoraAdapters::load(&dir, &Default::default()).context("loading")?;
        let policy = base.switch(&adapters).context("switching")?;
        let returns = during(&format!("testing {}", variant.name), || on_all(&policy));
        switched_returns_equal &= returns[index + 1] == variant.methods[0].returns[0];
        rows.push((variant.name.to_owned(), returns));
    }
    let names: Vec<_> = carts.iter().map(|(name, _)| *name).collect();
    println!("One base (seed {seed}), adapters (rows) and their returns on each cart (columns):\n");
    println!("{}\n", report::matrix(&names, &rows));
    let again = if switched_returns_equal { "exactly" } else { "NOT exactly" };
    println!("From their files, the adapters earn {again} what they did after the training.");

    // 4. Switch all adapters off: the old policies come back, bit for bit.
    let mut rng = StdRng::seed_from_u64(args.seed);
    let states: Vec<_> = (0..1000).map(|_| State::start(&mut rng)).collect();
    let mut pairs = adapted.iter().flat_map(|trained| trained.iter().zip(&bases));
    let base_restored_exactly = pairs.all(|(trained, base)| {
        bits(trained.model.detach().logits(&states)) == bits(base.logits(&states))
    });
    let exactly = if base_restored_exactly { "exactly" } else { "NOT exactly" };
    println!("Without adapters, the policies compute {exactly} what the bases do.\n");

    let figure = args.out.join("returns.svg");
    report::draw_returns(&figure, &variants)?;
    let by_cart = |returns: Vec<f64>| names.iter().copied().zip(returns).collect();
    let summary = Summary {
        backend: backend::NAME,
        rank: args.rank,
        alpha: args.alpha,
        targets: args.targets,
        learning_rate: args.learning_rate,
        lora_learning_rate: args.lora_learning_rate,
        max_episodes: args.max_episodes,
        seeds,
        target: TARGET,
        standard,
        variants,
        switched: rows.into_iter().map(|(name, returns)| (name, by_cart(returns))).collect(),
        switched_returns_equal,
        base_restored_exactly,
        seconds: start.elapsed().as_secs_f64(),
    };
    let path = write_summary(&args.out, &summary)?;
    let adapters = args.out.join("adapters");
    println!("Wrote {}, {} and {}", figure.display(), path.display(), adapters.display());
    Ok(())
}

/// The bases, each made ready to be trained further.
fn each(
    bases: &[Policy<Plain>],
    seeds: &[u64],
    ready: impl Fn(Policy<Train>, u64) -> std::result::Result<Lora<Train, Policy<Train>>, LoraError>,
) -> Result<Models> {
    let pairs = bases.iter().zip(seeds);
    let ready = pairs.map(|(base, &seed)| ready(base.clone().train::<Train>(), seed));
    ready.collect::<std::result::Result<_, _>>().context("adapting the bases")
}
