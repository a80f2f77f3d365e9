//! Outputs of linear layers.

use burn::{
    module::Param,
    nn::Linear,
    tensor::{Tensor, backend::Backend},
};
use burn_lora::{LoraLinear, LoraModule, Scaling, nn::Precision};

use super::{FEW, Formula, SIZES, THERE, assert_near, problem};
use crate::{
    model::{Plain, Train, device, layer},
    oracle::{Matrix, Problem, assert_identical, bits},
};

fn adapted<B: Backend>(problem: &Problem) -> LoraLinear<B> {
    layer::<B>(problem, problem.scale, Scaling::Alpha).with_precision(Precision::Bf16)
}

fn x<B: Backend>(problem: &Problem) -> Tensor<B, 2> {
    problem.x.tensor([problem.x.rows, problem.x.cols], &device::<B>())
}

#[test]
fn adapted_layers_give_the_formula_of_rounded_factors() {
    for (seed, (rows, size, rank)) in (1..).zip(SIZES) {
        for (bias, adapter_bias) in [(true, true), (true, false), (false, true), (false, false)] {
            let mut problem = problem(rows, size, rank, seed);
            problem.bias = problem.bias.filter(|_| bias);
            problem.adapter_bias = adapter_bias.then(|| Matrix::random(1, size[1], 99));
            let expected = Formula::of(&problem).output();
            let of = format!("{rows} rows of {size:?}");
            assert_near(&of, adapted::<Plain>(&problem).forward(x(&problem)), &expected);
            assert_near(&of, adapted::<Train>(&problem).forward(x(&problem)), &expected);
        }
    }
}

#[test]
fn the_scale_is_that_of_each_rule() {
    for (alpha, scaling) in
        [(7.0, Scaling::AlphaOverRank), (5.0, Scaling::AlphaOverSqrtRank), (-0.3, Scaling::Alpha)]
    {
        let mut problem = problem(20, [33, 14], 6, 3);
        problem.scale = scaling.scale(alpha, 6);
        let layer = layer::<Plain>(&problem, alpha, scaling).with_precision(Precision::Bf16);
        assert_near("y", layer.forward(x(&problem)), &Formula::of(&problem).output());
    }
}

#[test]
fn layers_without_an_adapter_give_the_formula_of_rounded_factors() {
    for (seed, (rows, size, rank)) in (1..).zip(SIZES) {
        for bias in [true, false] {
            let mut problem = problem(rows, size, rank, seed);
            problem.bias = problem.bias.filter(|_| bias);
            let formula = Formula::of(&problem);
            let mut layer = adapted::<Plain>(&problem);
            layer.set_adapter(None);
            assert_near("y", layer.forward(x(&problem)), &formula.with_bias(formula.base()));
        }
    }
}

#[test]
fn it_is_bf16_where_it_is_there() {
    for (rows, differs) in [(FEW, false), (FEW + 1, THERE), (64, THERE)] {
        let problem = problem(rows, [40, 24], 3, 1);
        let layer = adapted::<Plain>(&problem);
        let y = layer.forward(x(&problem));
        let full = layer.with_precision(Precision::F32).forward(x(&problem));
        assert_eq!(bits(y) != bits(full), differs, "{rows} rows");
    }
}

#[test]
fn rows_are_the_same_for_inputs_of_any_rank() {
    let problem = problem(24, [17, 10], 3, 5);
    for with_adapter in [true, false] {
        let mut layer = adapted::<Plain>(&problem);
        if !with_adapter {
            layer.set_adapter(None);
        }
        let y = layer.forward(x(&problem));
        let cube = layer.forward(x::<Plain>(&problem).reshape([2, 12, 17]));
        assert_identical(cube, y.clone().reshape([2, 12, 10]));
        let four = layer.forward(x::<Plain>(&problem).reshape([3, 2, 4, 17]));
        assert_identical(four, y.reshape([3, 2, 4, 10]));
        // A single row is in `f32`.
        let row = x::<Plain>(&problem).narrow(0, 3, 1);
        let one = layer.forward(row.clone().reshape([17]));
        let full = layer.with_precision(Precision::F32).forward(row);
        assert_identical(one, full.reshape([10]));
    }
}

#[test]
fn a_row_does_not_depend_on_the_other_rows() {
    let problem = problem(70, [50, 40], 3, 6);
    let layer = adapted::<Plain>(&problem);
    let all = layer.forward(x(&problem));
    for (start, count) in [(0, 5), (7, 33), (60, 10)] {
        let part = layer.forward(x::<Plain>(&problem).narrow(0, start, count));
        assert_identical(part, all.clone().narrow(0, start, count));
    }
}

#[test]
fn views_give_the_bits_of_their_copies() {
    let problem = problem(20, [34, 15], 3, 7);
    let device = device::<Plain>();
    let transposed =
        |it: &Matrix| it.transpose().tensor::<Plain, 2>([it.cols, it.rows], &device).transpose();
    for with_adapter in [true, false] {
        let mut copies = adapted::<Plain>(&problem);
        if !with_adapter {
            copies.set_adapter(None);
        }
        let y = copies.forward(x(&problem));
        assert_identical(copies.forward(transposed(&problem.x)), y.clone());
        let wide = Tensor::cat(vec![x::<Plain>(&problem), x(&problem)], 1);
        assert_identical(copies.forward(wide.narrow(1, 34, 34)), y.clone());

        let mut views = LoraLinear::from(Linear {
            weight: Param::from_tensor(transposed(&problem.w)),
            bias: copies.base.bias.clone(),
        });
        if let Some(adapter) = copies.adapter() {
            let mut adapter = adapter.clone();
            adapter.a = Param::from_tensor(transposed(&problem.a));
            adapter.b = Param::from_tensor(transposed(&problem.b));
            views.set_adapter(Some(adapter));
        }
        assert_identical(views.with_precision(Precision::Bf16).forward(x(&problem)), y);
    }
}

#[test]
fn what_is_not_finite_stays_in_its_row() {
    if !THERE {
        // A GPU may take all numbers for finite ones.
        return;
    }
    let problem = problem(12, [34, 15], 3, 8);
    for with_adapter in [true, false] {
        let mut layer = adapted::<Plain>(&problem);
        if !with_adapter {
            layer.set_adapter(None);
        }
        let expected = layer.forward(x(&problem));
        for broken in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let mut other = problem.clone();
            other.x.data[5 * 34 + 9] = broken;
            let y = layer.forward(x(&other));
            let row: Vec<_> = y.clone().narrow(0, 5, 1).into_data().iter::<f32>().collect();
            assert!(row.iter().all(|it| !it.is_finite()), "{broken}: {row:?}");
            for (start, count) in [(0, 5), (6, 6)] {
                let others = y.clone().narrow(0, start, count);
                assert_identical(others, expected.clone().narrow(0, start, count));
            }
        }
    }
}

#[test]
fn nothing_gives_nothing() {
    let layer = adapted::<Train>(&problem(6, [9, 4], 2, 9));
    for layer in [layer.clone(), layer.with_precision(Precision::F32)] {
        let zeros = |shape: [usize; 3]| Tensor::<Train, 3>::zeros(shape, &device::<Train>());
        assert_eq!(layer.forward(zeros([0, 6, 9])).dims(), [0, 6, 4]);
        assert_eq!(layer.forward(zeros([7, 0, 9])).dims(), [7, 0, 4]);
    }
}

#[test]
#[should_panic(expected = "LoraLinear expects an input of [..., 9], got [6, 8]")]
fn a_wrong_shape_is_refused() {
    adapted::<Plain>(&problem(6, [9, 4], 2, 9)).forward(super::random::<Plain, 2>([6, 8], 1));
}
