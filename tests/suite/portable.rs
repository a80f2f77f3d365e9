//! With `BURN_LORA_PORTABLE=1` the crate uses Burn's operations everywhere, and gives the same numbers.

use std::{collections::BTreeMap, env, fs, path::Path, process::Command};

use burn::{
    nn::{LinearConfig, PaddingConfig2d, conv::Conv2dConfig},
    tensor::{Tensor, TensorData},
};
use burn_lora::{
    Init, LoraConfig, LoraLinear,
    nn::{LoraConv2d, gelu},
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
    results
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
    let names: Vec<_> = fast.keys().collect();
    let expected = ["conv da", "conv db", "conv dx", "conv y", "gelu dx", "gelu y"];
    assert_eq!(names[..6], expected);
    assert_eq!(names[6..], ["linear da", "linear db", "linear dx", "linear y"]);

    for (name, fast) in &fast {
        let portable = &portable[name];
        assert_eq!(fast.len(), portable.len(), "{name}");
        // Burn's gradient is that of an approximation on some backends.
        let of_gelu = name == "gelu dx" && backend::NAME != "flex";
        let tolerance = if of_gelu { 2e-3 } else { 1e-5 };
        let largest = fast.iter().fold(1.0f32, |largest, it| largest.max(it.abs()));
        for (fast, portable) in fast.iter().zip(portable) {
            let error = (fast - portable).abs() / largest;
            assert!(error <= tolerance, "{name}: {fast} and {portable}");
        }
    }
    if !HAS_OWN {
        return;
    }
    // The order of sums shows that other operations computed them.
    for name in ["linear", "gelu", "conv"] {
        let differs = |(it, fast): (&String, &Vec<f32>)| {
            let bits = |it: &[f32]| it.iter().map(|it| it.to_bits()).collect::<Vec<_>>();
            it.starts_with(name) && bits(fast) != bits(&portable[it])
        };
        assert!(fast.iter().any(differs), "{name}");
    }
    // So the difference is not one from run to run.
    assert_eq!(fast, results_with("0", directory.path()));
}
