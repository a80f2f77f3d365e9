//! Tables of embeddings, and heads that score classes.

use burn::{
    module::Param,
    nn::{Embedding, Linear},
    tensor::{Int, Tensor, TensorData, backend::Backend},
};
use burn_lora::{
    LoraAdapter, LoraLinear, LoraModule, Scaling,
    nn::{LoraEmbedding, Precision},
    quantize::Quantization,
};

use super::{Near, STEP, assert_near, backward, rounds};
use crate::{
    model::{Plain, Train, device},
    oracle::{Matrix, assert_identical, bits},
};

const CLASSES: usize = 45;
const WIDTH: usize = 19;
const RANK: usize = 4;
const SCALE: f64 = 0.6;

/// What a table can be held in; `None` is in full.
const HELD: [Option<Quantization>; 4] =
    [None, Some(Quantization::Int8), Some(Quantization::Nf4), Some(Quantization::Bf16)];

fn table<B: Backend>(held: Option<Quantization>, adapted: bool) -> LoraEmbedding<B> {
    let device = device::<B>();
    let weight = Matrix::random(CLASSES, WIDTH, 1).tensor([CLASSES, WIDTH], &device);
    let weight = Param::from_tensor(weight).set_require_grad(false);
    let mut layer = LoraEmbedding::from(Embedding { weight });
    if let Some(to) = held {
        (layer, _) = layer.quantize(to).unwrap();
    }
    if adapted {
        let [a, b] = factors();
        let (a, b) = (a.tensor([CLASSES, RANK], &device), b.tensor([RANK, WIDTH], &device));
        layer.set_adapter(Some(LoraAdapter::new(a, b, SCALE, Scaling::Alpha)));
    }
    layer.with_precision(Precision::Bf16)
}

fn factors() -> [Matrix; 2] {
    [Matrix::random(CLASSES, RANK, 2), Matrix::random(RANK, WIDTH, 3)]
}

/// The numbers that the table holds: `[CLASSES, WIDTH]`.
fn held_by<B: Backend>(layer: &LoraEmbedding<B>) -> Matrix {
    let dense = layer.quantized().map_or_else(|| layer.base.weight.val(), |it| it.dense());
    Matrix { rows: CLASSES, cols: WIDTH, data: dense.into_data().iter::<f64>().collect() }
}

fn input<B: Backend>(x: &Matrix) -> Tensor<B, 3> {
    x.tensor([1, x.rows, x.cols], &device::<B>())
}

/// `x·Wᵀ + s·(x·Bᵀ)·Aᵀ`, of which the update is in `f32`.
fn scores(x: &Matrix, weight: &Matrix, adapted: bool) -> Near {
    let factor = |it: &Matrix| Near::exact(it).factor(rounds(x.rows));
    let base = factor(x).times(&factor(weight).transpose());
    if !adapted {
        return base;
    }
    let [a, b] = factors().map(|it| Near::exact(&it.transpose()));
    base.plus(&Near::exact(x).times(&b).scaled(SCALE).times(&a))
}

/// The gradient of x from that of the scores.
fn dx(dy: &Near, weight: &Matrix, adapted: bool) -> Near {
    let rounds = rounds(dy.values.rows);
    let base = dy.factor(rounds).times(&Near::exact(weight).factor(rounds));
    if !adapted {
        return base;
    }
    let [a, b] = factors().map(|it| Near::exact(&it));
    base.plus(&dy.times(&a).scaled(SCALE).times(&b))
}

#[test]
fn a_projection_is_of_rounded_factors_and_its_update_is_in_f32() {
    for held in HELD {
        for adapted in [false, true] {
            for rows in [1, 4, 5, 40] {
                let x = Matrix::random(rows, WIDTH, 4);
                let dy = Matrix::random(rows, CLASSES, 5);
                let layer = table::<Train>(held, adapted);
                let weight = held_by(&layer);
                let of = format!("{rows} rows, {held:?}");
                let dy_tensor = dy.tensor([1, rows, CLASSES], &device::<Train>());
                let (y, found, _) = backward(input(&x), dy_tensor, |x| layer.project(x));
                let expected = scores(&x, &weight, adapted);
                assert_near(&of, y, &expected);
                assert_near(&of, found, &dx(&Near::exact(&dy), &weight, adapted));
                assert_near(&of, table::<Plain>(held, adapted).project(input(&x)), &expected);
            }
        }
    }
}

#[test]
fn lookups_are_the_same_to_the_bit() {
    let ids = [[3, 44, 0, 7], [1, 3, 7, 9], [2, 2, 40, 5]];
    for held in HELD {
        for adapted in [false, true] {
            let layer = table::<Train>(held, adapted);
            let look_up = |layer: &LoraEmbedding<Train>| {
                let ids = Tensor::<Train, 2, Int>::from_ints(ids, &device::<Train>());
                let y = layer.forward(ids);
                if !adapted {
                    return vec![bits(y)];
                }
                let grads = y.clone().sin().sum().backward();
                let adapter = layer.adapter().unwrap();
                let of = |it: &Param<Tensor<Train, 2>>| bits(it.val().grad(&grads).unwrap());
                vec![bits(y), of(&adapter.a), of(&adapter.b)]
            };
            assert_eq!(look_up(&layer), look_up(&layer.with_precision(Precision::F32)));
        }
    }
}

/// The right class of a row.
fn target(row: usize) -> usize {
    row * 37 % CLASSES
}

fn targets<B: Backend>(rows: usize) -> Tensor<B, 1, Int> {
    let targets: Vec<_> = (0..rows).map(|row| target(row) as i32).collect();
    Tensor::from_data(TensorData::new(targets, [rows]), &device::<B>())
}

/// The loss, and its gradient with respect to the scores.
fn cross_entropy(scores: &Near) -> (Near, Near) {
    let (rows, classes) = (scores.values.rows, scores.values.cols);
    // What exponentials and sums of them may be off by.
    const RELATIVE: f64 = 30.0 * STEP;
    let score = |row, class| scores.values.at(row, class);
    let off = |row| (0..classes).map(|it| scores.errors.at(row, it)).fold(0.0, f64::max);
    let sum = |row| (0..classes).map(|it| score(row, it).exp()).sum::<f64>();
    let (mut loss, mut error) = (0.0, 0.0);
    for row in 0..rows {
        let one = sum(row).ln() - score(row, target(row));
        loss += one;
        error += 2.0 * off(row) + RELATIVE * (1.0 + one.abs() + score(row, target(row)).abs());
    }
    let chance = |row, class| score(row, class).exp() / sum(row);
    let one = |row, class| if class == target(row) { 1.0 } else { 0.0 };
    let values = Matrix::from_fn(rows, classes, |row, it| chance(row, it) - one(row, it));
    let errors = Matrix::from_fn(rows, classes, |row, it| {
        chance(row, it) * (2.0 * off(row) + RELATIVE) + 2.0 * STEP * one(row, it)
    });
    let row = |value| Matrix { rows: 1, cols: 1, data: vec![value] };
    (Near { values: row(loss), errors: row(error + STEP * loss) }, Near { values, errors })
}

#[test]
fn the_cross_entropy_is_that_of_such_scores() {
    for held in HELD {
        for adapted in [false, true] {
            for rows in [3, 30] {
                let x = Matrix::random(rows, WIDTH, 6).scaled(1.5);
                let layer = table::<Train>(held, adapted);
                let weight = held_by(&layer);
                let (loss, d_scores) = cross_entropy(&scores(&x, &weight, adapted));
                let x_tensor = x.tensor::<Train, 2>([rows, WIDTH], &device::<Train>());
                // The loss is multiplied by what its gradient is.
                let three = Tensor::<Train, 1>::from_floats([3.0], &device::<Train>());
                let run = |x| layer.cross_entropy(x, targets(rows));
                let (found, d_x, _) = backward(x_tensor, three, run);
                let of = format!("{rows} rows, {held:?}, with an adapter: {adapted}");
                assert_near(&of, found, &loss);
                // Where it is one operation, it is multiplied afterwards.
                let fused = !adapted && super::THERE;
                let expected = if fused {
                    dx(&d_scores, &weight, adapted).scaled(3.0)
                } else {
                    dx(&d_scores.scaled(3.0), &weight, adapted)
                };
                assert_near(&of, d_x, &expected);

                let plain = table::<Plain>(held, adapted);
                let x = x.tensor([rows, WIDTH], &device::<Plain>());
                assert_near(&of, plain.cross_entropy(x, targets(rows)), &loss);
            }
        }
    }
}

#[test]
fn a_tied_head_is_a_linear_layer_with_a_transposed_view() {
    let x = Matrix::random(20, WIDTH, 6);
    let table = table::<Train>(None, false);
    let weight = table.base.weight.val().transpose();
    let head = LoraLinear::from(Linear {
        weight: Param::from_tensor(weight).set_require_grad(false),
        bias: None,
    });
    let head = head.with_precision(Precision::Bf16);
    let x = x.tensor::<Train, 2>([20, WIDTH], &device::<Train>());
    let dy = super::random::<Train, 2>([20, CLASSES], 7);
    let (y, dx, _) = backward(x.clone(), dy.clone(), |x| head.forward(x));
    let project = |x: Tensor<Train, 2>| table.project(x.unsqueeze()).squeeze_dim::<2>(0);
    let (tied, d_tied, _) = backward(x.clone(), dy, project);
    assert_identical(y, tied);
    assert_identical(dx, d_tied);
    let one = Tensor::<Train, 1>::ones([1], &device::<Train>());
    let (loss, dx, _) = backward(x.clone(), one.clone(), |x| head.cross_entropy(x, targets(20)));
    let (tied, d_tied, _) = backward(x, one, |x| table.cross_entropy(x, targets(20)));
    assert_identical(loss, tied);
    assert_identical(dx, d_tied);
}

#[test]
fn a_table_that_trains_has_gradients_of_rounded_factors() {
    let (x, dy) = (Matrix::random(20, WIDTH, 6), Matrix::random(20, CLASSES, 7));
    let mut layer = table::<Train>(None, false);
    layer.base.weight = layer.base.weight.map(|it| it.detach().require_grad());
    let dy_tensor = dy.tensor([1, 20, CLASSES], &device::<Train>());
    let (_, _, grads) = backward(input(&x), dy_tensor, |x| layer.project(x));
    let factor = |it: &Matrix| Near::exact(it).factor(rounds(20));
    let found = layer.base.weight.val().grad(&grads).expect("it trains");
    assert_near("the table", found, &factor(&dy).transpose().times(&factor(&x)));
}

#[test]
fn no_rows_have_no_scores() {
    for held in HELD {
        let layer = table::<Plain>(held, true);
        let x = Tensor::<Plain, 3>::zeros([0, 5, WIDTH], &device::<Plain>());
        assert_eq!(layer.project(x).dims(), [0, 5, CLASSES]);
    }
}
