//! With `BURN_LORA_PORTABLE=1` the crate uses Burn's operations everywhere, and gives the same numbers.

use std::{collections::BTreeMap, env, fs, path::Path, process::Command};

use burn::{
    nn::{
        GroupNormConfig, LayerNormConfig, LinearConfig, PaddingConfig2d, RmsNormConfig,
        conv::Conv2dConfig,
    },
    tensor::{Tensor, TensorData},
};
use burn_lora::{
    Init, LoraConfig, LoraLinear,
    nn::{
        AttentionMask, LoraConv2d, attention, gelu, group_norm, layer_norm, rms_norm, rotate,
        swiglu,
    },
};

use crate::{
    backend,
    model::{Train, device},
    oracle::Matrix,
};

const VARIABLE: &str = "BURN_LORA_PORTABLE";

/// The file for the results of the other process.
const RESULTS: &str = "BURN_LORA_TEST_RESULTS";

/// Whether the crate has operations of its own for the backend of the tests.
const HAS_OWN: bool = !cfg!(feature = "wgpu");

/// What is recorded.
const OPERATIONS: [&str; 9] =
    ["attention", "conv", "gelu", "group", "layer", "linear", "rms", "rotate", "swiglu"];

/// Outputs and gradients, by name.
type Results = BTreeMap<String, Vec<f32>>;

fn random<const D: usize>(shape: [usize; D], seed: u64) -> Tensor<Train, D> {
    let count = shape.iter().product();
    Matrix::random(1, count, seed).tensor(shape, &device::<Train>())
}

/// The output of `layer` and the gradients of `Σ sin(y)`.
fn record<const D: usize, const E: usize>(
    results: &mut Results,
    name: &str,
    x: Tensor<Train, D>,
    layer: impl Fn(Tensor<Train, D>) -> Tensor<Train, E>,
    factors: [&Tensor<Train, 2>; 2],
) {
    let x = x.require_grad();
    let y = layer(x.clone());
    let grads = y.clone().sin().sum().backward();
    let mut add = |of: &str, data: TensorData| {
        results.insert(format!("{name} {of}"), data.into_vec().expect("it is in f32"));
    };
    add("y", y.into_data());
    add("dx", x.grad(&grads).expect("x has a gradient").into_data());
    for (of, factor) in ["da", "db"].into_iter().zip(factors) {
        if let Some(gradient) = factor.grad(&grads) {
            add(of, gradient.into_data());
        }
    }
}

fn results() -> Results {
    let (device, mut results) = (device::<Train>(), Results::new());
    let config = LoraConfig::new(4, 0.5).with_init(Init::RandomBoth);

    let mut base = LinearConfig::new(48, 40).init::<Train>(&device);
    base.weight = base.weight.map(|_| random([48, 40], 1));
    base.bias = base.bias.map(|it| it.map(|_| random([40], 2)));
    let layer: LoraLinear<Train> = config.init(base);
    let adapter = layer.adapter().expect("it was just put on");
    let factors = [&adapter.a.val(), &adapter.b.val()];
    record(&mut results, "linear", random([32, 48], 3), |x| layer.forward(x), factors);
    record(&mut results, "gelu", random([32, 48], 4).mul_scalar(3.0), gelu, factors);

    let base = Conv2dConfig::new([3, 8], [3, 3]).with_padding(PaddingConfig2d::Same);
    let mut base = base.init::<Train>(&device);
    base.weight = base.weight.map(|_| random([8, 3, 3, 3], 5));
    base.bias = base.bias.map(|it| it.map(|_| random([8], 6)));
    let layer: LoraConv2d<Train> = config.init(base);
    let adapter = layer.adapter().expect("it was just put on");
    let factors = [&adapter.a.val(), &adapter.b.val()];
    record(&mut results, "conv", random([2, 3, 9, 7], 7), |x| layer.forward(x), factors);

    let x = || random([2, 40, 24], 8);
    let heads = |x: Tensor<Train, 3>| x.reshape([2, 40, 4, 6]);
    let mask = AttentionMask::causal(40).window(9);
    let attend = |x| {
        attention(
            heads(x),
            heads(random([2, 40, 24], 9)),
            heads(x_of(10)),
            &mask,
            &Default::default(),
        )
    };
    record(&mut results, "attention", x(), attend, factors);
    let angles = [random([1, 40, 3], 11).cos(), random([1, 40, 3], 11).sin()];
    let turn = |x| rotate(heads(x), angles[0].clone(), angles[1].clone());
    record(&mut results, "rotate", x(), turn, factors);
    record(&mut results, "swiglu", x(), |x| swiglu(x, x_of(12)), factors);
    let norm = RmsNormConfig::new(24).init(&device);
    record(&mut results, "rms", x(), |x| rms_norm(&norm, x), factors);
    let norm = LayerNormConfig::new(24).init(&device);
    record(&mut results, "layer", x(), |x| layer_norm(&norm, x), factors);
    let norm = GroupNormConfig::new(4, 40).init(&device);
    record(&mut results, "group", x(), |x| group_norm(&norm, x), factors);
    results
}

fn x_of(seed: u64) -> Tensor<Train, 3> {
    random([2, 40, 24], seed)
}

/// The results of this very program in a process of its own, with this value of the variable.
fn results_with(value: &str, directory: &Path) -> Results {
    let file = directory.join(value);
    let output = Command::new(env::current_exe().expect("the tests are a program"))
        .args(["--exact", "portable::writes_results", "--ignored"])
        .env(VARIABLE, value)
        .env(RESULTS, &file)
        .output()
        .expect("it can be started again");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    serde_json::from_slice(&fs::read(file).expect("it was written")).expect("they are numbers")
}

#[test]
#[ignore = "the other process of `burns_operations_give_the_same`"]
fn writes_results() {
    let Some(file) = env::var_os(RESULTS) else { return };
    fs::write(file, serde_json::to_vec(&results()).expect("they are numbers")).unwrap();
}

#[test]
fn burns_operations_give_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let [fast, portable] = ["0", "1"].map(|value| results_with(value, directory.path()));
    let of = |name: &str| fast.keys().filter(|it| it.starts_with(name)).count();
    for name in OPERATIONS {
        let factors = if ["conv", "linear"].contains(&name) { 2 } else { 0 };
        assert_eq!(of(&format!("{name} ")), 2 + factors, "{name}");
    }

    for (name, fast) in &fast {
        let portable = &portable[name];
        assert_eq!(fast.len(), portable.len(), "{name}");
        // Burn's gradient is that of an approximation on some backends.
        let of_gelu = name == "gelu dx" && backend::NAME != "flex";
        // Attention and norms go through several sums, each with its rounding.
        let is = |of: &&str| name.starts_with(of);
        let several = ["attention", "group", "layer", "rms"].iter().any(is);
        let usual = if several { 5e-5 } else { 1e-5 };
        let tolerance = if of_gelu { 2e-3 } else { usual };
        let largest = fast.iter().fold(1.0f32, |largest, it| largest.max(it.abs()));
        for (fast, portable) in fast.iter().zip(portable) {
            let error = (fast - portable).abs() / largest;
            assert!(error <= tolerance, "{name}: {fast} and {portable}");
        }
    }
    if !HAS_OWN {
        return;
    }
    // The order of sums shows that other operations computed them. A rotation has sums of two numbers only.
    for name in OPERATIONS.into_iter().filter(|it| *it != "rotate") {
        let differs = |(it, fast): (&String, &Vec<f32>)| {
            let bits = |it: &[f32]| it.iter().map(|it| it.to_bits()).collect::<Vec<_>>();
            it.starts_with(name) && bits(fast) != bits(&portable[it])
        };
        assert!(fast.iter().any(differs), "{name}");
    }
    // So the difference is not one from run to run.
    assert_eq!(fast, results_with("0", directory.path()));
}
