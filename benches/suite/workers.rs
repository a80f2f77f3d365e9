//! Training steps of whole models, shared among workers.

use std::path::Path;

use burn::{
    module::AutodiffModule,
    optim::{AdamConfig, Optimizer},
    tensor::{Int, Tensor},
};
use burn_lora::{
    Lora, LoraConfig, LoraModule,
    train::{Backward, Workers},
};
use burn_lora_llm::{
    bert::{
        Tokens,
        classifier::{ALL_LINEAR, HEAD},
    },
    data::Text,
    loss::gradients,
    sizes::{minilm, smollm2},
};
use common::{
    backend::Train,
    benches::measure::{Work, medians, print_header, print_row},
    cli::plot::{Panel, SeriesLabelPosition, draw},
};

/// The numbers of workers.
const COUNTS: [usize; 3] = [1, 2, 4];

type Ids = Tensor<Train, 2, Int>;

/// Measures, and draws the figure if it has a place to go.
pub fn run(plot: Option<&Path>) {
    print_header(
        "Tokens per second by the number of workers, LoRA of rank 8 on all linear layers",
        &["model", "workers", "tokens per second", "of one worker"],
    );
    let minilm = "MiniLM, 32 x 32 tokens";
    let minilm = (minilm, series(minilm, 32 * 32, COUNTS.map(step_of_minilm)));
    let smollm2 = "SmolLM2-135M, 4 x 128 tokens";
    let smollm2 = (smollm2, series(smollm2, 4 * 128, COUNTS.map(step_of_smollm2)));
    println!();
    let Some(path) = plot else { return };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let title = format!("LoRA of rank 8, {cores} cores");
    let panels = [minilm, smollm2].map(|curve| Panel {
        title: &title,
        x: "workers",
        y: "tokens per second",
        curves: vec![curve],
        marks: true,
        from_zero: true,
        legend: SeriesLabelPosition::LowerRight,
    });
    draw(path, &panels).unwrap_or_else(|error| panic!("{error}"));
    println!("Drawn to {}\n", path.display());
}

/// The tokens per second by workers.
fn series(name: &str, tokens: usize, works: [Work; COUNTS.len()]) -> Vec<(f64, f64)> {
    let speeds: Vec<_> = medians(works.into()).iter().map(|ms| 1e3 * tokens as f64 / ms).collect();
    for (count, speed) in COUNTS.iter().zip(&speeds) {
        let ratio = speed / speeds[0];
        print_row(&[
            name.to_owned(),
            count.to_string(),
            format!("{speed:.0}"),
            format!("{ratio:.2}"),
        ]);
    }
    COUNTS.iter().map(|&count| count as f64).zip(speeds).collect()
}

/// A training step, in which `pass` computes the gradients of a part of the batch.
fn step<M>(
    model: M,
    workers: usize,
    batch: Ids,
    pass: impl Fn(&M, Ids) -> Backward + Sync + 'static,
) -> Work<'static>
where
    M: AutodiffModule<Train> + 'static,
{
    let workers = Workers::new(workers);
    let mut optimizer = AdamConfig::new().init();
    let mut model = Some(model);
    Box::new(move || {
        let before = model.take().expect("each step leaves a model");
        let parts = batch.clone().chunk(workers.count(), 0);
        let Backward { gradients, .. } = workers.backward(&before, parts, &pass);
        model = Some(optimizer.step(1e-4, before, gradients));
    })
}

fn step_of_minilm(workers: usize) -> Work<'static> {
    let base = minilm::base::<Train>(&Default::default());
    let config = LoraConfig::peft(8, 16.0).with_targets(ALL_LINEAR).with_modules_to_save([HEAD]);
    let ids = (0..32 * 32).map(|i| i * 7919 % minilm::VOCAB_SIZE as i32).collect::<Vec<_>>();
    let ids = Tensor::<Train, 1, Int>::from_ints(&*ids, &Default::default()).reshape([32, 32]);
    let model = base.attach(&config).expect("it can be attached");
    step(model, workers, ids, |model: &Lora<Train, _>, ids| {
        let padding = ids.zeros_like().bool();
        Backward::new(model, model.forward(&Tokens { ids, padding }).square().sum() / 32.0)
    })
}

fn step_of_smollm2(workers: usize) -> Work<'static> {
    let base = smollm2::base::<Train>(&Default::default());
    let config = LoraConfig::peft(8, 16.0).with_targets(smollm2::LAYERS);
    let ids: Vec<_> = smollm2::texts(4).iter().flat_map(|text| text.ids.clone()).collect();
    let ids = Tensor::<Train, 1, Int>::from_ints(&*ids, &Default::default());
    let model = base.attach(&config).expect("it can be attached");
    step(model, workers, ids.reshape([4, smollm2::LENGTH]), |model, ids| {
        let ids: Vec<_> = ids.into_data().iter::<u32>().collect();
        let texts = ids.chunks(smollm2::LENGTH).map(|ids| Text { ids: ids.to_vec(), given: 0 });
        let texts: Vec<_> = texts.collect();
        let rows: Vec<_> = texts.iter().map(|text| vec![text]).collect();
        gradients(model, &rows, false)
    })
}
