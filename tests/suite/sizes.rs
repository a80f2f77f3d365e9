//! Linear layers of sizes and layouts for which a backend uses other code: threads, blocks of rows,
//! transposed products, tensors that are views of others.

use burn::{
    backend::{Autodiff, autodiff::checkpoint::strategy::BalancedCheckpointing},
    module::{Module, Param},
    nn::Linear,
    tensor::{Tensor, backend::AutodiffBackend},
};
use burn_lora::{LoraAdapter, LoraLinear, Scaling};

use crate::{
    model::{Plain, Train, device, layer},
    oracle::{Gradients, Matrix, Problem, assert_close},
};

const TOLERANCE: f64 = 2e-5;
const ALPHA: f64 = 0.7;

/// Rows, inputs, rank and outputs. First no size is a multiple of a block, and then every size is.
const SIZES: [[usize; 4]; 5] = [
    [130, 517, 17, 410],
    [310, 130, 33, 70],
    [64, 512, 8, 256],
    [512, 640, 16, 96],
    [2, 300, 9, 301],
];

fn problem([rows, d_input, rank, d_output]: [usize; 4], bias: bool) -> Problem {
    Problem {
        x: Matrix::random(rows, d_input, 1),
        w: Matrix::random(d_input, d_output, 2),
        bias: bias.then(|| Matrix::random(1, d_output, 3)),
        a: Matrix::random(d_input, rank, 4),
        b: Matrix::random(rank, d_output, 5),
        adapter_bias: None,
        scale: ALPHA,
    }
}

fn input<B: AutodiffBackend>(problem: &Problem) -> Tensor<B, 2> {
    problem.x.tensor([problem.x.rows, problem.x.cols], &device::<B>()).require_grad()
}

/// Compares the layer's output and gradients with the formula. `dy` is the gradient of the output.
fn check<B: AutodiffBackend>(
    problem: &Problem,
    layer: &LoraLinear<B>,
    x: &Tensor<B, 2>,
    loss: impl Fn(Tensor<B, 2>) -> Tensor<B, 1>,
    expected: &Gradients,
) {
    let y = layer.forward(x.clone());
    assert_close(y.clone(), &problem.output(), TOLERANCE);
    let grads = loss(y).backward();
    let adapter = layer.adapter().unwrap();
    assert_close(x.grad(&grads).unwrap(), &expected.x, TOLERANCE);
    assert_close(adapter.a.grad(&grads).unwrap(), &expected.a, TOLERANCE);
    assert_close(adapter.b.grad(&grads).unwrap(), &expected.b, TOLERANCE);
    assert!(layer.base.weight.grad(&grads).is_none(), "the weight is frozen");
}

#[test]
fn outputs_and_gradients_at_sizes_of_every_kind() {
    for (index, sizes) in SIZES.into_iter().enumerate() {
        let problem = problem(sizes, index % 2 == 0);
        let expected = problem.gradients();
        let plain = layer::<Plain>(&problem, ALPHA, Scaling::Alpha);
        let x = input::<Train>(&problem);
        assert_close(plain.forward(x.clone().inner()), &problem.output(), TOLERANCE);
        let layer = layer::<Train>(&problem, ALPHA, Scaling::Alpha);
        check(&problem, &layer, &x, |y| y.sin().sum(), &expected);
    }
}

#[test]
fn recomputing_for_memory_changes_nothing() {
    type Balanced = Autodiff<Plain, BalancedCheckpointing>;
    let problem = problem(SIZES[0], true);
    let layer = layer::<Balanced>(&problem, ALPHA, Scaling::Alpha);
    let x = input::<Balanced>(&problem);
    check(&problem, &layer, &x, |y| y.sin().sum(), &problem.gradients());

    // Gradient checkpointing computes the layer's input again for the backward pass.
    let grads = layer.forward(x.clone().mul_scalar(1.0)).sin().sum().backward();
    assert_close(x.grad(&grads).unwrap(), &problem.gradients().x, TOLERANCE);
    let a = layer.adapter().unwrap().a.grad(&grads).unwrap();
    assert_close(a, &problem.gradients().a, TOLERANCE);
}

/// The same tensor, stored column by column.
fn turned<B: AutodiffBackend>(tensor: Tensor<B, 2>) -> Tensor<B, 2> {
    let device = tensor.device();
    Tensor::<B, 2>::from_data(tensor.transpose().into_data(), &device).transpose()
}

#[test]
fn views_of_other_tensors_serve_as_input_and_factors() {
    let problem = problem(SIZES[0], true);
    let plain = layer::<Train>(&problem, ALPHA, Scaling::Alpha);
    let adapter = plain.adapter().unwrap();
    let [a, b] = [adapter.a.val(), adapter.b.val()].map(turned);
    let weight = plain.base.weight.clone().map(turned);
    let mut layer = LoraLinear::from(Linear { weight, bias: plain.base.bias.clone() });
    layer.set_adapter(Some(LoraAdapter::new(a, b, ALPHA, Scaling::Alpha)));
    let x = turned(input::<Train>(&problem)).require_grad();
    check(&problem, &layer, &x, |y| y.sin().sum(), &problem.gradients());
    // The gradient of the output is a transposed tensor.
    check(&problem, &layer, &x, |y| y.transpose().sin().sum(), &problem.gradients());
}

#[test]
fn a_gradient_that_is_one_number_repeated() {
    let problem = problem(SIZES[0], true);
    let layer = layer::<Train>(&problem, ALPHA, Scaling::Alpha);
    let ones = Matrix::from_fn(problem.x.rows, problem.w.cols, |_, _| 1.0);
    let expected = problem.gradients_from(&ones);
    check(&problem, &layer, &input(&problem), |y| y.sum(), &expected);
}

#[test]
fn an_input_that_other_layers_share_gets_all_gradients() {
    let problem = problem(SIZES[0], true);
    let layer = layer::<Train>(&problem, ALPHA, Scaling::Alpha);
    let x = input::<Train>(&problem);
    let (y, z) = (layer.forward(x.clone()), layer.forward(x.clone()));
    // The input is used again after the layer, which must not have overwritten it.
    let grads = (y.sin().sum() + z.sin().sum() + x.clone().sum()).backward();
    let expected = problem.gradients();
    let ones = Matrix::from_fn(problem.x.rows, problem.x.cols, |_, _| 1.0);
    assert_close(x.grad(&grads).unwrap(), &expected.x.scaled(2.0).plus(&ones), TOLERANCE);
    let a = layer.adapter().unwrap().a.grad(&grads).unwrap();
    assert_close(a, &expected.a.scaled(2.0), TOLERANCE);
    assert_close(x, &problem.x, 0.0);
}

#[test]
fn what_is_not_tracked_gets_no_gradient() {
    let problem = problem(SIZES[0], true);
    let expected = problem.gradients();

    let first = layer::<Train>(&problem, ALPHA, Scaling::Alpha);
    let x = input::<Train>(&problem).detach().set_require_grad(false);
    let grads = first.forward(x.clone()).sin().sum().backward();
    assert!(x.grad(&grads).is_none());
    let adapter = first.adapter().unwrap();
    assert_close(adapter.a.grad(&grads).unwrap(), &expected.a, TOLERANCE);
    assert_close(adapter.b.grad(&grads).unwrap(), &expected.b, TOLERANCE);

    let mut frozen = first;
    let adapter = frozen.adapter().cloned().unwrap().no_grad();
    frozen.set_adapter(Some(adapter));
    let x = input::<Train>(&problem);
    let grads = frozen.forward(x.clone()).sin().sum().backward();
    let adapter = frozen.adapter().unwrap();
    assert!(adapter.a.grad(&grads).is_none() && adapter.b.grad(&grads).is_none());
    assert_close(x.grad(&grads).unwrap(), &expected.x, TOLERANCE);
}

#[test]
fn a_bias_of_one_number_counts_for_every_output() {
    let mut problem = problem(SIZES[0], false);
    let mut layer = layer::<Train>(&problem, ALPHA, Scaling::Alpha);
    layer.base.bias = Some(Param::from_tensor(Tensor::from_floats([0.5], &device::<Train>())));
    problem.bias = Some(Matrix::from_fn(1, problem.w.cols, |_, _| 0.5));
    check(&problem, &layer, &input(&problem), |y| y.sin().sum(), &problem.gradients());
}
