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
    for (init, dora) in
        [(Init::KaimingUniform, false), (Init::Gaussian, false), (Init::Gaussian, true)]
    {
        let base = LinearConfig::new(33, 17).init::<Plain>(&device);
        let x = Matrix::random(9, 33, 1).tensor::<Plain, 2>([9, 33], &device);
        let expected = base.forward(x.clone());
        let config = LoraConfig::new(5, 3.0).with_init(init).with_bias(!dora).with_dora(dora);
        assert_identical(config.init(base).forward(x), expected);
    }
}

const FROM_THE_WEIGHT: [Init; 3] =
    [Init::Pissa, Init::PissaRandomized { iterations: 8 }, Init::Olora];

#[test]
fn an_adapter_that_starts_with_values_changes_nothing_yet() {
    let device = device::<Plain>();
    for init in FROM_THE_WEIGHT.into_iter().chain([Init::Orthogonal]) {
        for dora in [false, true] {
            let base = LinearConfig::new(33, 17).init::<Plain>(&device);
            let x = Matrix::random(9, 33, 1).tensor::<Plain, 2>([9, 33], &device);
            let expected = base.forward(x.clone()).into_data();
            let config = LoraConfig::peft(6, 3.0).with_init(init).with_dora(dora);
            let layer = config.init(base);
            let adapter = layer.adapter().unwrap();
            for factor in [&adapter.a, &adapter.b] {
                let smallest = values(factor.val()).iter().map(|it| it.abs()).fold(0.0, f64::max);
                assert!(smallest > 0.01, "{init:?} has a factor of zeros");
            }
            let tolerance = burn::tensor::Tolerance::<f32>::rel_abs(1e-5, 3e-6);
            layer.forward(x).into_data().assert_approx_eq::<f32>(&expected, tolerance);
        }
    }
}

/// The largest part of the weight is what PiSSA trains, by singular values that an oracle does not need to
/// know: what is left of the weight is orthogonal to both factors.
#[test]
fn pissa_takes_the_principal_part() {
    let w = Matrix::random(14, 9, 3);
    let weight = w.tensor::<Plain, 2>([14, 9], &device::<Plain>());
    for (init, bound) in [(Init::Pissa, 1e-5), (Init::PissaRandomized { iterations: 60 }, 1e-3)] {
        let base = burn::nn::Linear {
            weight: burn::module::Param::from_tensor(weight.clone()),
            bias: None,
        };
        let layer = LoraConfig::peft(3, 2.0).with_init(init).init(base);
        let adapter = layer.adapter().unwrap();
        let matrix = |tensor: Tensor<Plain, 2>| {
            let [rows, cols] = tensor.dims();
            Matrix { rows, cols, data: values(tensor) }
        };
        let (a, b) = (matrix(adapter.a.val()), matrix(adapter.b.val()));
        let rest = w.plus(&a.times(&b).scaled(-adapter.scale()));
        let largest = |it: &Matrix| it.data.iter().map(|it| it.abs()).fold(0.0, f64::max);
        assert!(largest(&a.transpose().times(&rest)) < bound, "{init:?}");
        assert!(largest(&rest.times(&b.transpose())) < bound, "{init:?}");
        // Each factor has the square roots of the values, so that both have the same norms.
        let (of_a, of_b) = (a.transpose().times(&a), b.times(&b.transpose()));
        assert!(largest(&of_a.plus(&of_b.scaled(-1.0))) < bound, "{init:?}");
        let squares = |it: &Matrix| it.data.iter().map(|it| it * it).sum::<f64>();
        assert!(squares(&rest) < squares(&w) - squares(&w) * 3.0 / 9.0, "{init:?}");
    }
}

#[test]
fn olora_starts_with_orthonormal_rows() {
    let base = LinearConfig::new(14, 9).init::<Plain>(&device::<Plain>());
    let w = base.weight.val();
    let layer = LoraConfig::peft(3, 2.0).with_init(Init::Olora).init(base);
    let adapter = layer.adapter().unwrap();
    let b = adapter.b.val();
    let gram = values(b.clone().matmul(b.clone().transpose()));
    for (place, value) in gram.iter().enumerate() {
        assert!((value - f64::from(place % 4 == 0)).abs() < 1e-5, "{gram:?}");
    }
    // A is what the rows make of the weight.
    let a = w.matmul(b.transpose()).into_data();
    let tolerance = burn::tensor::Tolerance::<f32>::rel_abs(1e-4, 1e-6);
    adapter.a.val().into_data().assert_approx_eq::<f32>(&a, tolerance);
}

#[test]
fn a_layer_smaller_than_the_rank_is_taken_whole() {
    for init in FROM_THE_WEIGHT {
        let base = LinearConfig::new(5, 3).init::<Plain>(&device::<Plain>());
        let w = base.weight.val().into_data();
        let layer = LoraConfig::new(8, 2.0).with_init(init).init(base);
        let adapter = layer.adapter().unwrap();
        assert_eq!(adapter.rank(), 3);
        let start = adapter.a.val().matmul(adapter.b.val()).mul_scalar(adapter.scale()).into_data();
        if init != Init::Olora {
            start.assert_approx_eq::<f32>(&w, burn::tensor::Tolerance::rel_abs(1e-4, 1e-5));
        }
    }
}

#[test]
fn what_has_no_initial_values_is_refused() {
    let model = || Mlp::<Plain>::new(&device::<Plain>());
    let refused = |model: Mlp<Plain>, config: LoraConfig, message: &str| {
        let error = model.attach(&config).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    };
    let config = LoraConfig::new(3, 2.0);
    let odd = "`init` is orthogonal, which needs an even rank, and 3 is odd";
    refused(model(), config.clone().with_init(Init::Orthogonal), odd);
    let nothing = LoraConfig::new(4, 0.0).with_init(Init::Pissa);
    refused(model(), nothing, "divides by alpha, and that is 0");
    let mut broken = model();
    broken.head.base.weight = broken.head.base.weight.map(|it| it.mul_scalar(f32::NAN));
    for init in FROM_THE_WEIGHT {
        refused(broken.clone(), config.clone().with_init(init), "`head` cannot carry an adapter");
    }
    refused(broken.clone(), config.clone().with_dora(true), "`head` cannot carry an adapter");
    broken.attach(&config).unwrap();
}

#[test]
#[should_panic = "the initial values depend on the weight"]
fn values_from_the_weight_need_one() {
    adapter(&LoraConfig::new(2, 1.0).with_init(Init::Pissa), [4, 3]);
}

#[test]
fn a_frozen_a_is_not_counted_and_gets_no_gradient() {
    let model = Mlp::<Train>::new(&device::<Train>());
    let lora = model.attach(&LoraConfig::new(2, 3.0).with_freeze_a(true)).unwrap();
    let adapters = lora.adapters();
    let all: usize = adapters.iter().map(|(_, it)| it.b.shape().num_elements()).sum();
    assert_eq!(adapters.num_params(), all);
    assert_eq!(lora.parameters().trainable, all);
    let x = Matrix::random(10, 6, 5).tensor::<Train, 2>([10, 6], &device::<Train>());
    let grads = lora.forward(x).sin().sum().backward();
    for (path, _) in adapters.iter() {
        let adapter = lora.adapters().get(path).unwrap().clone();
        assert!(adapter.a.grad(&grads).is_none(), "{path}");
        assert!(adapter.b.grad(&grads).is_some(), "{path}");
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
