//! With `BURN_LORA_PORTABLE=1` nothing is in bf16.

use std::{env, process::Command};

use burn::{
    nn::{EmbeddingConfig, LinearConfig, conv::Conv2dConfig},
    tensor::{Int, Tensor, backend::Backend},
};
use burn_lora::{
    Init, LoraConfig, LoraLinear, LoraModule,
    nn::{LoraConv2d, LoraEmbedding, Precision},
    quantize::Quantization,
};

use super::random;
use crate::{
    model::{Train, device, filled},
    oracle::{Matrix, assert_close},
};

const VARIABLE: &str = "BURN_LORA_PORTABLE";

/// Outputs and gradients of layers in this precision.
fn results(precision: Precision) -> Vec<Vec<f64>> {
    fn add<B: Backend, const D: usize>(to: &mut Vec<Vec<f64>>, tensor: Tensor<B, D>) {
        to.push(tensor.into_data().iter::<f64>().collect());
    }
    let (device, mut all) = (device::<Train>(), Vec::new());
    let config = LoraConfig::new(3, 2.0).with_init(Init::RandomBoth).with_seed(4);
    let mut linear = vec![filled(LoraLinear::from(LinearConfig::new(40, 33).init(&device)))];
    for to in [Quantization::Int8, Quantization::Nf4, Quantization::Bf16] {
        linear.push(linear[0].quantize(to).unwrap().0);
    }
    for layer in linear {
        for layer in [layer.attach(&config).unwrap().into_inner(), layer] {
            let layer = layer.with_precision(precision);
            let x = random::<Train, 2>([20, 40], 1).require_grad();
            let y = layer.forward(x.clone());
            add(&mut all, x.grad(&y.clone().sin().sum().backward()).unwrap());
            add(&mut all, y);
        }
    }
    let table = LoraEmbedding::<Train>::from(EmbeddingConfig::new(30, 12).init(&device));
    let table = filled(table).with_precision(precision);
    add(&mut all, table.project(random([2, 9, 12], 1)));
    let targets: Vec<_> = (0..18).map(|it| it * 7 % 30).collect();
    let targets = Tensor::<Train, 1, Int>::from_ints(&*targets, &device);
    add(&mut all, table.cross_entropy(random([18, 12], 1), targets));
    let conv = LoraConv2d::<Train>::from(Conv2dConfig::new([3, 6], [3, 3]).init(&device));
    let conv = filled(conv).attach(&config).unwrap().with_precision(precision);
    add(&mut all, conv.forward(random([2, 3, 6, 7], 1)));
    all
}

#[test]
#[ignore = "the other process of `burns_operations_ignore_it`"]
fn gives_the_same() {
    let compare = |(ours, full): (Vec<f64>, Vec<f64>)| {
        let ours: Vec<_> = ours.into_iter().map(|it| it as f32).collect();
        let ours = Tensor::<Train, 1>::from_floats(&*ours, &device::<Train>());
        assert_close(ours, &Matrix { rows: 1, cols: full.len(), data: full }, 1e-6);
    };
    let [ours, full] = [Precision::Bf16, Precision::F32].map(results);
    ours.into_iter().zip(full).for_each(compare);
}

#[test]
fn burns_operations_ignore_it() {
    for (value, ignored) in [("1", true), ("0", !super::THERE)] {
        let output = Command::new(env::current_exe().expect("the tests are a program"))
            .args(["--exact", "precision::portable::gives_the_same", "--ignored"])
            .env(VARIABLE, value)
            .output()
            .expect("it can be started again");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains("running 1 test"), "{text}");
        assert_eq!(output.status.success(), ignored, "{VARIABLE}={value}: {text}");
    }
}
