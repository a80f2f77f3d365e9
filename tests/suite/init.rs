//! New adapters have the distributions that PEFT documents, are the same on every backend, and do not
//! change the outputs.

use burn::{
    module::Module,
    nn::LinearConfig,
    tensor::{Tensor, backend::Backend},
};
use burn_lora::{Init, Lora, LoraAdapter, LoraConfig, LoraLinear, LoraModule};

use crate::{
    model::{Mlp, Plain, Train, device},
    oracle::{Matrix, assert_identical, bits},
};

fn adapter(config: &LoraConfig, shape: [usize; 2]) -> LoraAdapter<Plain> {
    LoraAdapter::init(config, shape, &device::<Plain>())
}

fn values<const D: usize>(tensor: Tensor<Plain, D>) -> Vec<f64> {
    tensor.into_data().convert::<f64>().to_vec().unwrap()
}

/// The largest distance between the values' distribution and `cdf` (Kolmogorov and Smirnov).
fn distance(mut values: Vec<f64>, cdf: impl Fn(f64) -> f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let n = values.len() as f64;
    let gaps = values.iter().enumerate().map(|(index, &value)| {
        let expected = cdf(value);
        (expected - index as f64 / n).abs().max((expected - (index + 1) as f64 / n).abs())
    });
    gaps.fold(0.0, f64::max)
}

/// An upper bound for this distance. A sample of `n` from the right distribution is below it with a
/// probability of 99.9 %.
fn critical(n: usize) -> f64 {
    1.95 / (n as f64).sqrt()
}

fn uniform(bound: f64) -> impl Fn(f64) -> f64 {
    move |value| ((value + bound) / (2.0 * bound)).clamp(0.0, 1.0)
}

/// The normal distribution function, by integration with Simpson's rule.
fn normal(deviation: f64) -> impl Fn(f64) -> f64 {
    move |value| {
        let z = value / deviation;
        let density = |t: f64| (-t * t / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
        let (steps, width) = (200, z / 200.0);
        let sum: f64 = (0..steps)
            .map(|step| {
                let t = step as f64 * width;
                density(t) + 4.0 * density(t + width / 2.0) + density(t + width)
            })
            .sum();
        0.5 + sum * width / 6.0
    }
}

#[test]
fn kaiming_uniform_depends_on_the_input_width_alone() {
    for (shape, rank) in [([400, 30], 25), ([100, 900], 100)] {
        let adapter = adapter(&LoraConfig::new(rank, 3.0), shape);
        let a = values(adapter.a.val());
        let cdf = uniform(1.0 / (shape[0] as f64).sqrt());
        let n = a.len();
        assert!(distance(a, cdf) < critical(n));
        assert!(values(adapter.b.val()).iter().all(|&b| b == 0.0));
    }
}

#[test]
fn gaussian_depends_on_the_rank_alone() {
    for (shape, rank) in [([400, 30], 25), ([100, 900], 100)] {
        let adapter = adapter(&LoraConfig::new(rank, 3.0).with_init(Init::Gaussian), shape);
        let a = values(adapter.a.val());
        let n = a.len();
        assert!(distance(a, normal(1.0 / rank as f64)) < critical(n));
        assert!(values(adapter.b.val()).iter().all(|&b| b == 0.0));
    }
}

#[test]
fn random_both_draws_b_as_well() {
    let adapter = adapter(&LoraConfig::new(25, 3.0).with_init(Init::RandomBoth), [400, 300]);
    let (a, b) = (values(adapter.a.val()), values(adapter.b.val()));
    let (n_a, n_b) = (a.len(), b.len());
    assert!(distance(a, uniform(1.0 / 20.0)) < critical(n_a));
    assert!(distance(b, uniform(1.0 / 5.0)) < critical(n_b));
}

#[test]
fn a_fresh_adapter_changes_no_bit() {
    let device = device::<Plain>();
    for init in [Init::KaimingUniform, Init::Gaussian] {
        let base = LinearConfig::new(33, 17).init::<Plain>(&device);
        let x = Matrix::random(9, 33, 1).tensor::<Plain, 2>([9, 33], &device);
        let expected = base.forward(x.clone());
        let config = LoraConfig::new(5, 3.0).with_init(init).with_bias(true);
        assert_identical(config.init(base).forward(x), expected);
    }
}

#[test]
fn a_seed_means_the_same_values_on_every_backend() {
    // The values are drawn on the host, so they must be the same on every backend.
    let adapter = adapter(&LoraConfig::new(2, 3.0).with_seed(42), [3, 4]);
    let expected =
        [3_201_874_696, 1_023_096_544, 3_197_406_254, 1_028_264_800, 1_054_462_200, 1_042_373_556];
    assert_eq!(bits(adapter.a.val()), expected);
}

#[test]
fn layers_draw_from_their_own_streams_in_any_order() {
    let factors = |seed: u64, targets: &[&str]| {
        let model = Mlp::<Train>::new(&device::<Train>());
        let config = LoraConfig::new(3, 2.0).with_seed(seed).with_targets(targets.iter().copied());
        let model = model.attach(&config).unwrap();
        let a = |layer: &LoraLinear<Train>| layer.adapter().map(|it| bits(it.a.val()));
        [a(&model.blocks[0]), a(&model.blocks[1]), a(&model.head)]
    };
    let all = factors(7, &[]);
    assert_eq!(all, factors(7, &["head", "blocks.*"]), "a seed gives the same values again");
    assert_ne!(all, factors(8, &[]), "another seed gives others");
    assert_eq!(all[2], factors(7, &["head"])[2], "whatever else is adapted");
    assert_ne!(all[0].as_ref().unwrap()[..9], all[1].as_ref().unwrap()[..9], "layers differ");
}

#[test]
fn a_backend_seed_or_other_draws_do_not_interfere() {
    let device = device::<Plain>();
    Plain::seed(&device, 1);
    let config = LoraConfig::new(4, 8.0).with_seed(3);
    let first = bits(adapter(&config, [10, 6]).a.val());
    let _ =
        Tensor::<Plain, 1>::random([5], burn::tensor::Distribution::Default, &device).into_data();
    assert_eq!(first, bits(adapter(&config, [10, 6]).a.val()));
}

#[test]
#[should_panic = "invalid LoraConfig: `rank` is 0, and must be at least 1"]
fn rank_zero_is_refused() {
    let base = LinearConfig::new(3, 2).init::<Plain>(&device::<Plain>());
    LoraConfig::new(0, 1.0).init(base);
}

#[test]
fn the_display_shows_shapes_rank_scale_and_share() {
    let base = LinearConfig::new(784, 256).init::<Plain>(&device::<Plain>());
    let layer = LoraConfig::new(4, 8.0).init(base);
    assert_eq!(
        layer.to_string(),
        "LoraLinear {d_input: 784, d_output: 256, bias: true, rank: 4, scale: 8, \
         trainable: 4160 of 200960 (2.1 %), params: 205120}"
    );
    assert_eq!(Module::num_params(&layer), 205_120);
    let plain = Lora::new(layer).detach();
    assert_eq!(
        plain.to_string(),
        "LoraLinear {d_input: 784, d_output: 256, bias: true, params: 200960}"
    );
}
