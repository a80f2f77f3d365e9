//! Gradients of linear layers.

use burn::{
    backend::{Autodiff, autodiff::checkpoint::strategy::BalancedCheckpointing},
    module::Param,
    tensor::{
        Tensor,
        backend::{AutodiffBackend, Backend},
    },
};
use burn_lora::{Init, LoraAdapter, LoraConfig, LoraLinear, LoraModule, Scaling, nn::Precision};

use super::{Formula, Near, SIZES, THERE, assert_near, backward, problem, rounds};
use crate::{
    model::{Plain, Train, device, filled, layer},
    oracle::{Matrix, Problem, assert_identical, bits},
};

fn adapted(problem: &Problem) -> LoraLinear<Train> {
    layer::<Train>(problem, problem.scale, Scaling::Alpha).with_precision(Precision::Bf16)
}

fn tensor<B: Backend>(matrix: &Matrix) -> Tensor<B, 2> {
    matrix.tensor([matrix.rows, matrix.cols], &device::<B>())
}

fn factors(adapter: &LoraAdapter<Train>, grads: &super::Gradients) -> [Tensor<Plain, 2>; 2] {
    [&adapter.a, &adapter.b].map(|it| it.val().grad(grads).expect("it trains"))
}

#[test]
fn products_with_the_weight_are_rounded_and_those_of_factors_are_not() {
    for (seed, (rows, size, rank)) in (1..).zip(SIZES) {
        let mut problem = problem(rows, size, rank, seed);
        problem.adapter_bias = Some(Matrix::random(1, size[1], 99));
        let dy = Matrix::random(rows, size[1], 98);
        let (layer, formula) = (adapted(&problem), Formula::of(&problem));
        let (y, dx, grads) = backward(tensor(&problem.x), tensor(&dy), |x| layer.forward(x));
        assert_near("y", y, &formula.output());
        assert_near("dx", dx, &formula.dx_of_base(&dy).plus(&formula.dx_of_update(&dy)));
        let adapter = layer.adapter().unwrap();
        let [da, db] = factors(adapter, &grads);
        assert_near("da", da, &formula.da(&problem.x, &dy));
        assert_near("db", db, &formula.db(&problem.x, &dy));
        let d_bias = adapter.bias.as_ref().unwrap().val().grad(&grads).unwrap();
        assert_near("the gradient of the bias", d_bias, &sum_of_rows(&dy).scaled(problem.scale));
        assert!(layer.base.weight.val().grad(&grads).is_none());
    }
}

/// The sum, which is in `f32`.
fn sum_of_rows(dy: &Matrix) -> Near {
    let ones = Matrix::from_fn(1, dy.rows, |_, _| 1.0);
    Near::exact(&ones).times(&Near::exact(dy))
}

#[test]
fn a_weight_that_trains_has_gradients_of_rounded_factors() {
    for (seed, (rows, size, rank)) in (1..).zip(SIZES) {
        for bias in [true, false] {
            let mut problem = problem(rows, size, rank, seed);
            problem.bias = problem.bias.filter(|_| bias);
            let dy = Matrix::random(rows, size[1], 98);
            let formula = Formula::of(&problem);
            let mut layer = LoraLinear::from(adapted(&problem).base.clone());
            // The adapter froze it.
            let weight = layer.base.weight.val().detach().set_require_grad(true);
            layer.base.weight = Param::from_tensor(weight);
            layer.base.bias = layer.base.bias.map(|it| it.set_require_grad(true));
            let layer = layer.with_precision(Precision::Bf16);
            let (y, dx, grads) = backward(tensor(&problem.x), tensor(&dy), |x| layer.forward(x));
            assert_near("y", y, &formula.with_bias(formula.base()));
            assert_near("dx", dx, &formula.dx_of_base(&dy));
            let x = formula.factor(&problem.x).transpose();
            let dw = layer.base.weight.val().grad(&grads).expect("it trains");
            assert_near("dw", dw, &x.times(&formula.factor(&dy)));
            if let Some(bias) = &layer.base.bias {
                let found = bias.val().grad(&grads).expect("it trains");
                assert_near("the gradient of the bias", found, &sum_of_rows(&dy));
            }
        }
    }
}

#[test]
fn a_frozen_factor_has_no_gradient_and_the_rest_stays() {
    let problem = problem(20, [33, 14], 4, 2);
    let dy = Matrix::random(20, 14, 98);
    let formula = Formula::of(&problem);
    for (trains_a, trains_b) in [(false, true), (true, false), (false, false)] {
        let mut layer = adapted(&problem);
        let mut adapter = layer.adapter().unwrap().clone();
        adapter.a = adapter.a.set_require_grad(trains_a);
        adapter.b = adapter.b.set_require_grad(trains_b);
        layer.set_adapter(Some(adapter));
        let (_, dx, grads) = backward(tensor(&problem.x), tensor(&dy), |x| layer.forward(x));
        assert_near("dx", dx, &formula.dx_of_base(&dy).plus(&formula.dx_of_update(&dy)));
        let adapter = layer.adapter().unwrap();
        let of = |it: &Param<Tensor<Train, 2>>| it.val().grad(&grads);
        match of(&adapter.a) {
            Some(da) if trains_a => assert_near("da", da, &formula.da(&problem.x, &dy)),
            found => assert!(found.is_none() && !trains_a),
        }
        match of(&adapter.b) {
            Some(db) if trains_b => assert_near("db", db, &formula.db(&problem.x, &dy)),
            found => assert!(found.is_none() && !trains_b),
        }
    }
}

#[test]
fn parameters_have_gradients_if_x_has_none() {
    let problem = problem(20, [33, 14], 4, 2);
    let (layer, dy) = (adapted(&problem), Matrix::random(20, 14, 98));
    let y = layer.forward(tensor(&problem.x));
    let grads = (y * tensor(&dy)).sum().backward();
    let [da, db] = factors(layer.adapter().unwrap(), &grads);
    let formula = Formula::of(&problem);
    assert_near("da", da, &formula.da(&problem.x, &dy));
    assert_near("db", db, &formula.db(&problem.x, &dy));
}

#[test]
fn checkpoints_give_the_same_bits() {
    type Checked = Autodiff<Plain, BalancedCheckpointing>;

    fn run<B: AutodiffBackend>(problem: &Problem, adapted: bool) -> Vec<Vec<u32>> {
        let mut layer = layer::<B>(problem, problem.scale, Scaling::Alpha);
        if !adapted {
            layer = LoraLinear::from(layer.base.clone());
            layer.base.weight = layer.base.weight.map(|it| it.detach().set_require_grad(true));
        }
        let layer = layer.with_precision(Precision::Bf16);
        let x = tensor::<B>(&problem.x).require_grad();
        // What is there to be computed again.
        let grads = layer.forward(x.clone().sin()).sin().sum().backward();
        let of = |it: &Param<Tensor<B, 2>>| bits(it.val().grad(&grads).expect("it trains"));
        let factors = layer.adapter().into_iter().flat_map(|it| [of(&it.a), of(&it.b)]);
        let weight = (!adapted).then(|| of(&layer.base.weight));
        let dx = bits(x.grad(&grads).expect("x has a gradient"));
        [dx].into_iter().chain(factors).chain(weight).collect()
    }

    let problem = problem(20, [33, 14], 4, 2);
    for adapted in [true, false] {
        let expected = run::<Train>(&problem, adapted);
        assert_eq!(expected.len(), if adapted { 3 } else { 2 });
        assert_eq!(run::<Checked>(&problem, adapted), expected);
    }
}

#[test]
fn what_is_not_finite_stays_in_its_row() {
    if !THERE {
        // A GPU may take all numbers for finite ones.
        return;
    }
    let problem = problem(12, [34, 15], 3, 8);
    let layer = adapted(&problem);
    let mut dy = Matrix::random(12, 15, 98);
    let run = |dy: &Matrix| backward(tensor(&problem.x), tensor(dy), |x| layer.forward(x)).1;
    let expected = run(&dy);
    dy.data[5 * 15 + 7] = f64::NAN;
    let dx = run(&dy);
    let row: Vec<_> = dx.clone().narrow(0, 5, 1).into_data().iter::<f32>().collect();
    assert!(row.iter().all(|it| it.is_nan()), "{row:?}");
    for (start, count) in [(0, 5), (6, 6)] {
        let [dx, expected] = [&dx, &expected].map(|it| it.clone().narrow(0, start, count));
        assert_identical(dx, expected);
    }
}

#[test]
fn what_dropout_leaves_is_what_the_adapter_reads() {
    let (rows, d_input, more, scale) = (24, 12, 9, 1.0);
    let mut problem = problem(rows, [d_input, d_input + more], d_input, 4);
    problem.bias = None;
    problem.scale = scale;
    // The first columns of the output are what the adapter reads, in bf16.
    let one = |row, col| if row == col { 1.0 } else { 0.0 };
    problem.a = Matrix::from_fn(d_input, d_input, one);
    let (b, w) = (problem.b.clone(), problem.w.clone());
    problem.b = Matrix::from_fn(d_input, d_input + more, |row, col| {
        if col < d_input { one(row, col) } else { b.at(row, col) }
    });
    problem.w =
        Matrix::from_fn(
            d_input,
            d_input + more,
            |row, col| {
                if col < d_input { 0.0 } else { w.at(row, col) }
            },
        );
    let mut layer = adapted(&problem);
    let mut adapter = layer.adapter().unwrap().clone();
    adapter.dropout.prob = 0.5;
    layer.set_adapter(Some(adapter));

    let dy = Matrix::random(rows, d_input + more, 98);
    let (y, dx, grads) = backward(tensor(&problem.x), tensor(&dy), |x| layer.forward(x));
    let shown: Vec<_> = y.clone().into_data().iter::<f64>().collect();
    let kept = Matrix::from_fn(rows, d_input, |row, col| {
        if shown[row * (d_input + more) + col] == 0.0 { 0.0 } else { 2.0 }
    });
    let count = kept.data.iter().filter(|it| **it > 0.0).count();
    assert!((60..230).contains(&count), "{count} of 288 are left");
    let read =
        Matrix::from_fn(rows, d_input, |row, col| problem.x.at(row, col) * kept.at(row, col));
    let formula = Formula::of(&problem);
    assert_near("y", y, &formula.base().plus(&formula.update(&read)));
    let d_read = formula.dx_of_update(&dy);
    let kept_of = |it: &Matrix| Matrix::from_fn(rows, d_input, |r, c| it.at(r, c) * kept.at(r, c));
    let d_read = Near { values: kept_of(&d_read.values), errors: kept_of(&d_read.errors) };
    assert_near("dx", dx, &formula.dx_of_base(&dy).plus(&d_read));
    let [da, db] = factors(layer.adapter().unwrap(), &grads);
    assert_near("da", da, &formula.da(&read, &dy));
    assert_near("db", db, &formula.db(&read, &dy));
}

#[test]
fn magnitudes_multiply_what_is_rounded() {
    // In short columns the update soon cancels the weight.
    for (rows, size, rank) in SIZES.into_iter().filter(|(_, [d_input, _], _)| *d_input > 3) {
        let mut problem = problem(rows, size, rank, 6);
        problem.scale = 0.3;
        let dy = Matrix::random(rows, size[1], 98);
        // Not those that the weight has.
        let magnitude = Matrix::random(1, size[1], 97).map(|it| it + 1.5);
        let mut layer = adapted(&problem);
        let mut adapter = layer.adapter().unwrap().clone();
        adapter.magnitude =
            Some(Param::from_tensor(magnitude.tensor([size[1]], &device::<Train>())));
        layer.set_adapter(Some(adapter));
        let (y, dx, grads) = backward(tensor(&problem.x), tensor(&dy), |x| layer.forward(x));

        let formula = Formula::of(&problem);
        let sum = problem.w.plus(&problem.delta());
        let norm = |col| (0..sum.rows).map(|row| sum.at(row, col).powi(2)).sum::<f64>().sqrt();
        // Where the update cancels a column, its product is another one.
        assert!((0..size[1]).all(|col| {
            let own = |it: &Matrix| (0..it.rows).map(|row| it.at(row, col).powi(2)).sum::<f64>();
            norm(col).powi(2) > 0.1 * (own(&problem.w) + own(&problem.delta()))
        }));
        let gain = Matrix::from_fn(1, size[1], |_, col| magnitude.data[col] / norm(col));
        let summed = formula.base().plus(&formula.update(&problem.x));
        // The norms are sums in `f32`.
        let loose = |it: Near| {
            let errors = it.errors.plus(&it.values.map(|it| 1e-6 * it.abs()));
            Near { errors, ..it }
        };
        assert_near("y", y, &formula.with_bias(loose(summed.times_row(&gain))));
        let scaled = loose(Near::exact(&dy).times_row(&gain));
        let rounded = scaled.factor(formula.rounds);
        let [w, a, b] = [&problem.w, &problem.a, &problem.b].map(|it| formula.factor(it));
        let dh = rounded.times(&b.transpose()).scaled(problem.scale);
        let dx_of_update = dh.factor(formula.rounds).times(&a.transpose());
        assert_near("dx", dx, &rounded.times(&w.transpose()).plus(&dx_of_update));
        let [da, db] = factors(layer.adapter().unwrap(), &grads);
        assert_near("da", da, &Near::exact(&problem.x.transpose()).times(&dh));
        let hidden = formula.hidden(&problem.x);
        assert_near("db", db, &hidden.transpose().times(&scaled));
    }
}

#[test]
fn gradients_point_where_those_of_f32_do() {
    for (seed, bias, dora) in [(1, true, false), (2, false, false), (3, true, true)] {
        let base = burn::nn::LinearConfig::new(60, 45).with_bias(bias).init(&device::<Train>());
        let config = LoraConfig::new(6, 9.0)
            .with_scaling(Scaling::AlphaOverSqrtRank)
            .with_init(Init::RandomBoth)
            .with_bias(!dora)
            .with_dora(dora)
            .with_seed(seed);
        let layer: LoraLinear<Train> = config.init(filled(base));
        let of = |precision| {
            let layer = layer.with_precision(precision);
            let x = super::random::<Train, 2>([80, 60], seed + 50).require_grad();
            let grads = layer.forward(x.clone()).sin().sum().backward();
            let adapter = layer.adapter().unwrap();
            let mut all: Vec<_> = x.grad(&grads).unwrap().into_data().iter::<f64>().collect();
            for factor in factors(adapter, &grads) {
                all.extend(factor.into_data().iter::<f64>());
            }
            for vector in adapter.bias.iter().chain(&adapter.magnitude) {
                all.extend(vector.val().grad(&grads).unwrap().into_data().iter::<f64>());
            }
            all
        };
        let (ours, full) = (of(Precision::Bf16), of(Precision::F32));
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let cosine = dot(&ours, &full) / (dot(&ours, &ours) * dot(&full, &full)).sqrt();
        assert!(cosine >= 0.999, "{cosine}");
        assert_eq!(ours != full, THERE && rounds(80));
    }
}
