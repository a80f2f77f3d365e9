//! Dropout acts only on the adapter's input, and only in training.

use burn::{
    module::AutodiffModule,
    nn::LinearConfig,
    tensor::{Tensor, backend::Backend},
};
use burn_lora::{Init, LoraConfig, LoraLinear};

use crate::{
    model::{Train, device},
    oracle::{Matrix, assert_identical},
};

fn layer(dropout: f64) -> LoraLinear<Train> {
    let base = LinearConfig::new(6, 4).init(&device::<Train>());
    LoraConfig::new(3, 1.5).with_init(Init::RandomBoth).with_dropout(dropout).init(base)
}

fn input(rows: usize) -> Tensor<Train, 2> {
    let row = Matrix::random(1, 6, 9);
    Matrix::from_fn(rows, 6, |_, col| row.at(0, col)).tensor([rows, 6], &device::<Train>())
}

#[test]
fn evaluation_drops_nothing() {
    let layer = layer(0.5);
    let mut without = layer.clone();
    let mut adapter = layer.adapter().unwrap().clone();
    adapter.dropout.prob = 0.0;
    without.set_adapter(Some(adapter));
    let x = input(5).inner();
    assert_identical(layer.valid().forward(x.clone()), without.valid().forward(x));
}

#[test]
fn training_drops_the_adapters_input_and_keeps_the_mean() {
    Train::seed(&device::<Train>(), 11);
    let layer = layer(0.25);
    let rows = 20_000;
    let base = layer.base.forward(input(rows));
    let updates = layer.forward(input(rows)) - base;
    let expected = layer.valid().adapter().unwrap().forward(input(1).inner());

    // Each row has its own mask. The mean over the rows is the update without dropout.
    let spread = updates.clone().var(0).into_data().convert::<f64>().to_vec::<f64>().unwrap();
    assert!(spread.iter().all(|&variance| variance > 1e-4), "nothing was dropped: {spread:?}");
    let mean = updates.mean_dim(0).inner();
    let error = (mean - expected).into_data().convert::<f64>().to_vec::<f64>().unwrap();
    for (error, variance) in error.iter().zip(spread) {
        let deviation = (variance / rows as f64).sqrt();
        assert!(error.abs() < 5.0 * deviation, "mean is off by {error}, deviation {deviation}");
    }
}

#[test]
fn the_base_never_sees_dropout() {
    // With an update of zero, the output is that of the base.
    let base = LinearConfig::new(6, 4).init::<Train>(&device::<Train>());
    let expected = base.forward(input(50));
    let layer = LoraConfig::new(3, 1.5).with_dropout(0.9).init(base);
    assert_identical(layer.forward(input(50)), expected);
}
