//! Embeddings with adapters: rows of A, multiplied with B, without a dense table.

use burn::{
    nn::{Embedding, EmbeddingConfig},
    tensor::{Int, Tensor, TensorData, backend::Backend},
};
use burn_lora::{Init, Lora, LoraAdapter, LoraConfig, Scaling, nn::LoraEmbedding};
use proptest::{collection::vec, prelude::*};

use crate::{
    model::{Plain, Train, device, random_cases},
    oracle::{Matrix, assert_close},
};

const ALPHA: f64 = 1.7;

/// A table with an adapter, and the rows that are looked up in it.
#[derive(Clone, Debug)]
struct Parts {
    w: Matrix,
    a: Matrix,
    b: Matrix,
    rows: Vec<i64>,
}

/// A table of `count` embeddings of size `width`.
fn parts([count, width, rank]: [usize; 3], rows: Vec<i64>) -> Parts {
    Parts {
        w: Matrix::random(count, width, 1),
        a: Matrix::random(count, rank, 2),
        b: Matrix::random(rank, width, 3),
        rows,
    }
}

fn example() -> Parts {
    parts([9, 5, 3], vec![3, 1, 4, 1, 5, 0, 3, 6])
}

/// Tables of all sizes. Rows are looked up several times, or not at all.
fn any_parts() -> impl Strategy<Value = Parts> {
    let sizes = [1..=12usize, 1..=9, 1..=4];
    sizes.prop_flat_map(|sizes| {
        let rows = vec(0..sizes[0] as i64, 2..=10);
        rows.prop_map(move |rows| parts(sizes, rows))
    })
}

impl Parts {
    fn scale(&self) -> f64 {
        ALPHA / self.a.cols as f64
    }

    /// The rows, in two texts if their number is even.
    fn indices<B: Backend>(&self) -> Tensor<B, 2, Int> {
        let count = self.rows.len();
        let texts = if count.is_multiple_of(2) { 2 } else { 1 };
        let rows = TensorData::new(self.rows.clone(), [texts, count / texts]);
        Tensor::from_data(rows, &device::<B>())
    }

    fn layer<B: Backend>(&self) -> LoraEmbedding<B> {
        let device = device::<B>();
        let [w, a, b] =
            [&self.w, &self.a, &self.b].map(|it| it.tensor([it.rows, it.cols], &device));
        let weight = burn::module::Param::from_tensor(w);
        let mut layer = LoraEmbedding::from(Embedding { weight });
        layer.set_adapter(Some(LoraAdapter::new(a, b, ALPHA, Scaling::AlphaOverRank)));
        layer
    }

    fn table(&self) -> Matrix {
        self.w.plus(&self.a.times(&self.b).scaled(self.scale()))
    }

    fn looked_up(&self) -> Matrix {
        let table = self.table();
        let at = |place: usize, col| table.at(self.rows[place] as usize, col);
        Matrix::from_fn(self.rows.len(), table.cols, at)
    }

    /// What is projected onto the table: six vectors.
    fn hidden(&self) -> Matrix {
        Matrix::random(6, self.w.cols, 7)
    }
}

fn check_outputs(parts: &Parts) {
    let layer = parts.layer::<Plain>();
    assert_close(layer.forward(parts.indices()), &parts.looked_up(), 1e-5);
    let hidden = parts.hidden();
    let input = || hidden.tensor::<Plain, 3>([2, 3, hidden.cols], &device::<Plain>());
    let logits = hidden.times(&parts.table().transpose());
    assert_close(layer.project(input()), &logits, 1e-5);

    let merged = Lora::new(layer).merge().unwrap();
    assert_close(merged.base.weight.val(), &parts.table(), 1e-6);
    assert_close(merged.project(input()), &logits, 1e-5);
    assert_close(merged.forward(parts.indices()), &parts.looked_up(), 1e-5);
}

fn check_gradients(parts: &Parts) {
    let layer = parts.layer::<Train>();
    let hidden = parts.hidden();
    let width = hidden.cols;
    let x = hidden.tensor::<Train, 3>([2, 3, width], &device::<Train>()).require_grad();
    // Tied weights: the same table is used for the lookup and for the projection.
    let loss = layer.forward(parts.indices()).sin().sum() + layer.project(x.clone()).sin().sum();
    let grads = loss.backward();

    let dy = parts.looked_up().map(f64::cos);
    let d_logits = hidden.times(&parts.table().transpose()).map(f64::cos);
    let mut d_table = d_logits.transpose().times(&hidden);
    for (place, &row) in parts.rows.iter().enumerate() {
        (0..width).for_each(|col| d_table.data[row as usize * width + col] += dy.at(place, col));
    }
    let adapter = layer.adapter().unwrap();
    let d_a = d_table.times(&parts.b.transpose()).scaled(parts.scale());
    let d_b = parts.a.transpose().times(&d_table).scaled(parts.scale());
    assert_close(adapter.a.grad(&grads).unwrap(), &d_a, 1e-5);
    assert_close(adapter.b.grad(&grads).unwrap(), &d_b, 1e-5);
    assert_close(x.grad(&grads).unwrap(), &d_logits.times(&parts.table()), 1e-5);
    assert!(layer.base.weight.grad(&grads).is_none());
}

#[test]
fn looks_up_projects_and_merges() {
    check_outputs(&example());
}

#[test]
fn gradients_of_both_uses() {
    check_gradients(&example());
}

proptest! {
    #![proptest_config(random_cases(24))]

    #[test]
    fn tables_of_any_size(parts in any_parts()) {
        check_outputs(&parts);
        check_gradients(&parts);
    }
}

#[test]
fn rows_that_were_not_looked_up_get_no_gradient() {
    let parts = example();
    let layer = parts.layer::<Train>();
    let grads = layer.forward(parts.indices()).sin().sum().backward();
    let d_a = layer.adapter().unwrap().a.grad(&grads).unwrap();
    let rows = d_a.into_data().convert::<f64>().to_vec::<f64>().unwrap();
    for (row, gradient) in rows.chunks(3).enumerate() {
        let used = parts.rows.contains(&(row as i64));
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
    example().layer::<Plain>().project(Tensor::zeros([1, 2, 4], &device::<Plain>()));
}
