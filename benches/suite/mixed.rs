//! Batches whose samples use different sets of adapters, beside batches with one set.

use burn::{
    module::Module,
    nn::LinearConfig,
    tensor::{Distribution, Int, Tensor},
};
use burn_lora::{
    Init, LoraConfig, LoraLinear, LoraModule,
    serve::{MixedBatch, MultiLora},
};
use burn_lora_llm::sizes::smollm2;
use common::{
    backend::Plain,
    benches::measure::{Work, medians, print_header, print_row},
};

const DEPTH: usize = 4;

/// The length of the texts to which SmolLM2 adds a token.
const READ: usize = 64;

type Layers = Vec<LoraLinear<Plain>>;

pub fn run() {
    print_header(
        "4 linear layers with adapters, and SmolLM2-135M, a set for each sample",
        &["samples, tokens, width", "rank", "base, ms", "one set / base", "sets / one set"],
    );
    let device = Default::default();
    for ([samples, tokens, width], rank) in
        [([32, 1, 2048], 16), ([32, 1, 576], 8), ([32, 64, 576], 8), ([16, 128, 2048], 16)]
    {
        let linear = || LinearConfig::new(width, width).init::<Plain>(&device).into();
        let base: Layers = (0..DEPTH).map(|_| linear()).collect();
        let x =
            Tensor::<Plain, 3>::random([samples, tokens, width], Distribution::Default, &device);
        let size = format!("{samples}, {tokens}, {width}");
        measure(&size, base, &[], [samples, rank], |batch| {
            let x = x.clone();
            Box::new(move || {
                drop(batch.run(x.clone(), |layers: &Layers, x: Tensor<Plain, 3>| {
                    layers.iter().fold(x, |x, layer| layer.forward(x))
                }));
            })
        });
    }
    let samples = 32;
    let llama = smollm2::base::<Plain>(&device);
    let tokens = |length| {
        let ids: Vec<_> = (0..(samples * length) as i32).collect();
        Tensor::<Plain, 1, Int>::from_ints(&*ids, &device).reshape([samples, length])
    };
    measure("SmolLM2: 32, 1, 576", llama, &smollm2::LAYERS, [samples, 8], |batch| {
        let mut cache = batch.model().cache();
        batch.model().read(tokens(READ), &mut cache);
        let next = tokens(1);
        Box::new(move || drop(batch.model().read(next.clone(), &mut cache.clone())))
    });
    println!();
}

/// Prints how long a pass takes with the base, with one set, and with a set for each sample.
fn measure<M: Module<Plain>>(
    size: &str,
    base: M,
    targets: &[&str],
    [samples, rank]: [usize; 2],
    pass: impl Fn(MixedBatch<M>) -> Work<'static>,
) {
    let config = LoraConfig::new(rank, 16.0).with_init(Init::RandomBoth);
    let config = config.with_targets(targets.iter().copied());
    let mut models = MultiLora::new(base).expect("it has no adapters");
    for sample in 0..samples {
        let config = config.clone().with_seed(sample as u64);
        let set = models.base().attach(&config).expect("it can be attached").adapters();
        models.insert(sample.to_string(), &set).expect("it fits");
    }
    let names: Vec<_> = (0..samples).map(|it| Some(it.to_string())).collect();
    let works = [vec![None; samples], vec![Some("0".to_owned()); samples], names];
    let works = works.map(|names| pass(models.batch(&names).expect("all are there")));
    let times = medians(works.into());
    print_row(&[
        size.to_owned(),
        rank.to_string(),
        format!("{:.2}", times[0]),
        format!("{:.2}", times[1] / times[0]),
        format!("{:.2}", times[2] / times[1]),
    ]);
}
