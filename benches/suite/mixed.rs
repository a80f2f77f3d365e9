//! Batches whose samples use different sets of adapters, beside batches with one set.

use burn::{
    nn::LinearConfig,
    tensor::{Distribution, Tensor},
};
use burn_lora::{Init, LoraConfig, LoraLinear, LoraModule, MultiLora};

use crate::{
    backend::Plain,
    measure::{Work, medians, print_header, print_row},
};

const DEPTH: usize = 4;

pub fn run() {
    let device = Default::default();
    print_header(
        "4 linear layers with adapters, a set for each sample",
        &["samples, tokens, width", "rank", "base, ms", "one set / base", "sets / one set"],
    );
    for ([samples, tokens, width], rank) in
        [([32, 1, 2048], 16), ([32, 1, 576], 8), ([32, 64, 576], 8), ([16, 128, 2048], 16)]
    {
        let linear = || LinearConfig::new(width, width).init::<Plain>(&device).into();
        let base: Vec<LoraLinear<Plain>> = (0..DEPTH).map(|_| linear()).collect();
        let mut models = MultiLora::new(base.clone()).expect("it has no adapters");
        for sample in 0..samples {
            let config = LoraConfig::new(rank, 16.0).with_init(Init::RandomBoth);
            let adapted = base.attach(&config.with_seed(sample as u64));
            let set = adapted.expect("it can be attached").adapters();
            models.insert(sample.to_string(), &set).expect("it fits");
        }
        let x =
            Tensor::<Plain, 3>::random([samples, tokens, width], Distribution::Default, &device);
        let names: Vec<_> = (0..samples).map(|it| Some(it.to_string())).collect();
        let works = [vec![None; samples], vec![Some("0".to_owned()); samples], names];
        let works = works.map(|names| {
            let (batch, x) = (models.batch(&names).expect("all are there"), x.clone());
            Box::new(move || {
                drop(batch.run(
                    x.clone(),
                    |layers: &Vec<LoraLinear<Plain>>, x: Tensor<Plain, 3>| {
                        layers.iter().fold(x, |x, layer| layer.forward(x))
                    },
                ));
            }) as Work
        });
        let times = medians(works.into());
        print_row(&[
            format!("{samples}, {tokens}, {width}"),
            rank.to_string(),
            format!("{:.2}", times[0]),
            format!("{:.2}", times[1] / times[0]),
            format!("{:.2}", times[2] / times[1]),
        ]);
    }
    println!();
}
