//! Outputs, updates and gradients against the formulas in `f64`, over shapes and settings in which
//! no two sizes or factors coincide.

use burn::tensor::Tensor;
use burn_lora::Scaling;
use proptest::prelude::*;

use crate::{
    model::{Plain, Train, device, layer, random_cases},
    oracle::{Matrix, Problem, assert_close},
};

const TOLERANCE: f64 = 1e-5;

/// A problem of the given sizes, with the alpha and the scaling rule that give its scale.
#[derive(Clone, Debug)]
struct Case {
    problem: Problem,
    alpha: f64,
    scaling: Scaling,
}

fn case(
    [rows, d_input, rank, d_output]: [usize; 4],
    bias: bool,
    adapter_bias: bool,
    scaling: Scaling,
    alpha: f64,
) -> Case {
    let problem = Problem {
        x: Matrix::random(rows, d_input, 1),
        w: Matrix::random(d_input, d_output, 2),
        bias: bias.then(|| Matrix::random(1, d_output, 3)),
        a: Matrix::random(d_input, rank, 4),
        b: Matrix::random(rank, d_output, 5),
        adapter_bias: adapter_bias.then(|| Matrix::random(1, d_output, 6)),
        scale: match scaling {
            Scaling::Alpha => alpha,
            Scaling::AlphaOverRank => alpha / rank as f64,
            Scaling::AlphaOverSqrtRank => alpha / (rank as f64).sqrt(),
        },
    };
    Case { problem, alpha, scaling }
}

const RULES: [Scaling; 3] = [Scaling::Alpha, Scaling::AlphaOverRank, Scaling::AlphaOverSqrtRank];

fn cases() -> impl Strategy<Value = Case> {
    let sizes = [1..=6usize, 1..=12, 1..=12, 1..=12];
    (sizes, any::<[bool; 2]>(), 0..3usize, -3.0..3.0f64).prop_map(
        |(sizes, [bias, adapter_bias], rule, alpha)| {
            case(sizes, bias, adapter_bias, RULES[rule], alpha)
        },
    )
}

#[test]
fn outputs_and_gradients_for_inputs_of_any_rank() {
    for scaling in RULES {
        for (bias, adapter_bias) in [(true, false), (false, false), (true, true), (false, true)] {
            // Rank 1, a rank between 1 and full rank, and full rank.
            for rank in [1, 3, 5] {
                let case = case([12, 7, rank, 5], bias, adapter_bias, scaling, 1.7);
                check::<2>(&case, [12, 7]);
                check::<3>(&case, [3, 4, 7]);
                check::<4>(&case, [3, 1, 4, 7]);
            }
            let case = case_of_one_row(bias, adapter_bias, scaling);
            check::<1>(&case, [7]);
        }
    }
}

fn case_of_one_row(bias: bool, adapter_bias: bool, scaling: Scaling) -> Case {
    case([1, 7, 3, 5], bias, adapter_bias, scaling, -0.6)
}

/// Compares the output and all gradients. `shape` is the shape in which the layer gets the rows of `x`.
fn check<const D: usize>(case: &Case, shape: [usize; D]) {
    let problem = &case.problem;
    let layer = layer::<Train>(problem, case.alpha, case.scaling);
    let x: Tensor<Train, D> = problem.x.tensor(shape, &device::<Train>()).require_grad();

    let y = layer.forward(x.clone());
    let mut expected_shape = shape;
    expected_shape[D - 1] = problem.w.cols;
    assert_eq!(y.dims(), expected_shape);
    assert_close(y.clone(), &problem.output(), TOLERANCE);

    let grads = y.sin().sum().backward();
    let expected = problem.gradients();
    let adapter = layer.adapter().unwrap();
    assert_close(x.grad(&grads).unwrap(), &expected.x, TOLERANCE);
    assert_close(adapter.a.grad(&grads).unwrap(), &expected.a, TOLERANCE);
    assert_close(adapter.b.grad(&grads).unwrap(), &expected.b, TOLERANCE);
    if let Some(bias) = &adapter.bias {
        assert_close(bias.grad(&grads).unwrap(), &expected.adapter_bias, TOLERANCE);
    }
    assert!(layer.base.weight.grad(&grads).is_none(), "the weight is frozen");
    assert!(layer.base.bias.is_none_or(|it| it.grad(&grads).is_none()), "the bias is frozen");
}

#[test]
fn gradients_agree_with_finite_differences() {
    let case = case([4, 5, 2, 3], true, true, Scaling::AlphaOverSqrtRank, 1.3);
    let problem = &case.problem;
    let layer = layer::<Train>(problem, case.alpha, case.scaling);
    let x: Tensor<Train, 2> = problem.x.tensor([4, 5], &device::<Train>()).require_grad();
    let grads = layer.forward(x.clone()).sin().sum().backward();

    let adapter = layer.adapter().unwrap();
    let bias = adapter.bias.as_ref().unwrap();
    let differences = |of: fn(&mut Problem) -> &mut Matrix| problem.differences(of);
    assert_close(x.grad(&grads).unwrap(), &differences(|it| &mut it.x), TOLERANCE);
    assert_close(adapter.a.grad(&grads).unwrap(), &differences(|it| &mut it.a), TOLERANCE);
    assert_close(adapter.b.grad(&grads).unwrap(), &differences(|it| &mut it.b), TOLERANCE);
    let expected = differences(|it| it.adapter_bias.as_mut().unwrap());
    assert_close(bias.grad(&grads).unwrap(), &expected, TOLERANCE);
}

#[test]
fn an_empty_batch_gives_an_empty_output() {
    let case = case([1, 7, 3, 5], true, false, Scaling::Alpha, 2.0);
    let layer = layer::<Plain>(&case.problem, case.alpha, case.scaling);
    let y = layer.forward(Tensor::<Plain, 3>::zeros([2, 0, 7], &device::<Plain>()));
    assert_eq!(y.dims(), [2, 0, 5]);
}

#[test]
#[should_panic = "LoraLinear expects an input of [..., 7], got [2, 6]"]
fn an_input_of_the_wrong_width_is_refused() {
    let case = case([1, 7, 3, 5], true, false, Scaling::Alpha, 2.0);
    let layer = layer::<Plain>(&case.problem, case.alpha, case.scaling);
    layer.forward(Tensor::<Plain, 2>::zeros([2, 6], &device::<Plain>()));
}

#[test]
#[should_panic = "the adapter must fit the weight: expected [7, 5] = [d_input, d_output], got [5, 7]"]
fn an_adapter_of_another_shape_is_refused() {
    let [a, b] = [[7, 3, 5], [5, 3, 7]].map(|[d_input, rank, d_output]| {
        let case = case([1, d_input, rank, d_output], true, false, Scaling::Alpha, 2.0);
        layer::<Plain>(&case.problem, case.alpha, case.scaling)
    });
    let mut layer = a;
    layer.set_adapter(b.adapter().cloned());
}

proptest! {
    #![proptest_config(random_cases(32))]

    #[test]
    fn outputs_and_gradients_of_layers_of_any_size(case in cases()) {
        check::<2>(&case, [case.problem.x.rows, case.problem.x.cols]);
    }

    #[test]
    fn delta_and_merged_agree_with_the_formula(case in cases()) {
        let problem = &case.problem;
        let layer = layer::<Plain>(problem, case.alpha, case.scaling);
        let shape = [problem.x.rows, problem.x.cols];
        let x = || problem.x.tensor::<Plain, 2>(shape, &device::<Plain>());
        assert_close(layer.adapter().unwrap().delta(), &problem.delta(), TOLERANCE);
        assert_close(layer.forward(x()), &problem.output(), TOLERANCE);

        let merged = burn_lora::Lora::new(layer).merge().unwrap();
        prop_assert!(merged.adapter().is_none());
        assert_close(merged.forward(x()), &problem.output(), TOLERANCE);
    }
}
