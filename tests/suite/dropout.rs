//! Dropout acts only on the adapter's input, and only in training.

use burn::{
    module::{AutodiffModule, Param},
    nn::{Linear, LinearConfig},
    tensor::{Tensor, backend::Backend},
};
use burn_lora::{Init, LoraAdapter, LoraConfig, LoraLinear, Scaling};

use crate::{
    model::{Train, device},
    oracle::{Matrix, assert_close, assert_identical},
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

/// The mask is not visible. It is found in the gradient of the input, and all else must agree with it.
#[test]
fn the_output_and_all_gradients_have_the_same_mask() {
    let (rows, dropout) = (50, 0.4);
    let values = |seed, rows, cols| Matrix::random(rows, cols, seed);
    let (w, bias, a, b) = (values(1, 6, 4), values(2, 1, 4), values(3, 6, 3), values(4, 3, 4));
    let (adapter_bias, x, dy) = (values(5, 1, 4), values(6, rows, 6), values(7, rows, 4));
    let device = device::<Train>();
    let parameter = |it: &Matrix| Param::from_tensor(it.tensor([it.cols], &device));
    let weight = Param::from_tensor(w.tensor([6, 4], &device));
    let mut layer = LoraLinear::from(Linear { weight, bias: Some(parameter(&bias)) });
    let factors = (a.tensor([6, 3], &device), b.tensor([3, 4], &device));
    let mut adapter = LoraAdapter::<Train>::new(factors.0, factors.1, 1.5, Scaling::Alpha);
    adapter.bias = Some(parameter(&adapter_bias));
    adapter.dropout.prob = dropout;
    layer.set_adapter(Some(adapter));

    let input = x.tensor::<Train, 2>([rows, 6], &device).require_grad();
    let y = layer.forward(input.clone());
    let grads = (y.clone() * dy.tensor([rows, 4], &device)).sum().backward();
    let dx = input.grad(&grads).unwrap().into_data().convert::<f64>().to_vec::<f64>().unwrap();

    let by_base = dy.times(&w.transpose());
    let d_hidden = dy.times(&b.transpose()).scaled(1.5);
    let by_adapter = d_hidden.times(&a.transpose());
    let mask = Matrix::from_fn(rows, 6, |row, col| {
        let kept = (dx[row * 6 + col] - by_base.at(row, col)) / by_adapter.at(row, col);
        let expected = if kept > 0.5 { 1.0 / (1.0 - dropout) } else { 0.0 };
        let error = (kept - expected) * by_adapter.at(row, col);
        assert!(error.abs() < 1e-4, "dropped or kept expected, got {kept}");
        expected
    });
    let dropped = mask.data.iter().filter(|&&kept| kept == 0.0).count();
    assert!((60..180).contains(&dropped), "about 120 of 300 expected, got {dropped}");

    let read = Matrix::from_fn(rows, 6, |row, col| x.at(row, col) * mask.at(row, col));
    let hidden = read.times(&a).scaled(1.5);
    let expected = x.times(&w).plus_row(&bias).plus(&hidden.times(&b));
    assert_close(y, &expected.plus_row(&adapter_bias.scaled(1.5)), 1e-5);
    let adapter = layer.adapter().unwrap();
    assert_close(adapter.a.grad(&grads).unwrap(), &read.transpose().times(&d_hidden), 1e-5);
    assert_close(adapter.b.grad(&grads).unwrap(), &hidden.transpose().times(&dy), 1e-5);
    let d_bias = adapter.bias.as_ref().unwrap().grad(&grads).unwrap();
    assert_close(d_bias, &dy.sum_rows().scaled(1.5), 1e-5);
}
