//! Embeddings with adapters: rows of A, multiplied with B, without a dense table.

use burn::{
    nn::{Embedding, EmbeddingConfig},
    tensor::{Int, Tensor, backend::Backend},
};
use burn_lora::{Init, Lora, LoraAdapter, LoraConfig, LoraEmbedding, Scaling};

use crate::{
    model::{Plain, Train, device},
    oracle::{Matrix, assert_close},
};

const ROWS: [[i64; 4]; 2] = [[3, 1, 4, 1], [5, 0, 3, 6]];
const SCALE: f64 = 1.7 / 3.0;

fn indices<B: Backend>() -> Tensor<B, 2, Int> {
    Tensor::from_data(ROWS, &device::<B>())
}

struct Parts {
    w: Matrix,
    a: Matrix,
    b: Matrix,
}

/// A table of 9 embeddings of size 5, with an adapter of rank 3.
fn parts() -> Parts {
    Parts { w: Matrix::random(9, 5, 1), a: Matrix::random(9, 3, 2), b: Matrix::random(3, 5, 3) }
}

fn layer<B: Backend>() -> LoraEmbedding<B> {
    let (device, Parts { w, a, b }) = (device::<B>(), parts());
    let weight = burn::module::Param::from_tensor(w.tensor([9, 5], &device));
    let (a, b) = (a.tensor([9, 3], &device), b.tensor([3, 5], &device));
    let mut layer = LoraEmbedding::from(Embedding { weight });
    layer.set_adapter(Some(LoraAdapter::new(a, b, 1.7, Scaling::AlphaOverRank)));
    layer
}

fn table() -> Matrix {
    let Parts { w, a, b } = parts();
    w.plus(&a.times(&b).scaled(SCALE))
}

fn looked_up(table: &Matrix) -> Matrix {
    let rows: Vec<_> = ROWS.concat();
    Matrix::from_fn(rows.len(), table.cols, |row, col| table.at(rows[row] as usize, col))
}

#[test]
fn looks_up_projects_and_merges() {
    let layer = layer::<Plain>();
    assert_close(layer.forward(indices()), &looked_up(&table()), 1e-5);
    let hidden = Matrix::random(6, 5, 7);
    let input = || hidden.tensor::<Plain, 3>([2, 3, 5], &device::<Plain>());
    let logits = hidden.times(&table().transpose());
    assert_close(layer.project(input()), &logits, 1e-5);

    let merged = Lora::new(layer).merge().unwrap();
    assert_close(merged.base.weight.val(), &table(), 1e-6);
    assert_close(merged.project(input()), &logits, 1e-5);
    assert_close(merged.forward(indices()), &looked_up(&table()), 1e-5);
}

#[test]
fn gradients_of_both_uses() {
    let layer = layer::<Train>();
    let hidden = Matrix::random(6, 5, 7);
    let x = hidden.tensor::<Train, 3>([2, 3, 5], &device::<Train>()).require_grad();
    // Tied weights: the same table is used for the lookup and for the projection.
    let loss = layer.forward(indices()).sin().sum() + layer.project(x.clone()).sin().sum();
    let grads = loss.backward();

    let Parts { a, b, .. } = parts();
    let dy = looked_up(&table()).map(f64::cos);
    let logits = hidden.times(&table().transpose());
    let d_logits = logits.map(f64::cos);
    let mut d_table = d_logits.transpose().times(&hidden);
    for (place, row) in ROWS.concat().into_iter().enumerate() {
        (0..5).for_each(|col| d_table.data[row as usize * 5 + col] += dy.at(place, col));
    }
    let adapter = layer.adapter().unwrap();
    let d_a = d_table.times(&b.transpose()).scaled(SCALE);
    let d_b = a.transpose().times(&d_table).scaled(SCALE);
    assert_close(adapter.a.grad(&grads).unwrap(), &d_a, 1e-5);
    assert_close(adapter.b.grad(&grads).unwrap(), &d_b, 1e-5);
    assert_close(x.grad(&grads).unwrap(), &d_logits.times(&table()), 1e-5);
    assert!(layer.base.weight.grad(&grads).is_none());
}

#[test]
fn rows_that_were_not_looked_up_get_no_gradient() {
    let layer = layer::<Train>();
    let grads = layer.forward(indices()).sin().sum().backward();
    let d_a = layer.adapter().unwrap().a.grad(&grads).unwrap();
    let rows = d_a.into_data().convert::<f64>().to_vec::<f64>().unwrap();
    for (row, gradient) in rows.chunks(3).enumerate() {
        let used = ROWS.concat().contains(&(row as i64));
        assert_eq!(gradient.iter().any(|it| *it != 0.0), used, "row {row}: {gradient:?}");
    }
}

#[test]
fn starts_the_other_way_round() {
    let base = EmbeddingConfig::new(500, 300).init::<Plain>(&device::<Plain>());
    for init in [Init::KaimingUniform, Init::Gaussian, Init::RandomBoth] {
        let layer = LoraConfig::new(8, 16.0).with_init(init).init(base.clone());
        let adapter = layer.adapter().unwrap();
        let moments = |tensor: Tensor<Plain, 2>| {
            let values = tensor.into_data().convert::<f64>().to_vec::<f64>().unwrap();
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            let square = values.iter().map(|it| it * it).sum::<f64>() / values.len() as f64;
            (mean, square)
        };
        let (mean, square) = moments(adapter.b.val());
        // The bounds are four standard deviations for 2,400 values.
        assert!(mean.abs() < 0.082 && (square - 1.0).abs() < 0.116, "{mean} {square}");
        let (_, square) = moments(adapter.a.val());
        assert_eq!(square == 0.0, init != Init::RandomBoth);
    }
}

#[test]
#[should_panic = "cannot take one"]
fn a_bias_is_refused() {
    let base = EmbeddingConfig::new(5, 3).init::<Plain>(&device::<Plain>());
    LoraConfig::new(2, 1.0).with_bias(true).init(base);
}

#[test]
#[should_panic = "LoraEmbedding projects [batch, length, 5], got [1, 2, 4]"]
fn projecting_another_width_is_refused() {
    layer::<Plain>().project(Tensor::zeros([1, 2, 4], &device::<Plain>()));
}
