//! GELU and its gradient are those of the normal distribution, integrated in double precision.

use std::f64::consts::PI;

use burn::tensor::{Tensor, TensorData};
use burn_lora::nn::gelu;

use crate::model::{Plain, Train, device};

fn density(x: f64) -> f64 {
    (-0.5 * x * x).exp() / (2.0 * PI).sqrt()
}

/// The integral of the density up to x, by Simpson's rule. Beyond 10 there is nothing left of it.
fn cumulative(x: f64) -> f64 {
    let width = x.clamp(-10.0, 10.0) / 100.0;
    let at = |place: f64| density(place * width);
    let parts = (0..100).map(f64::from);
    let sum: f64 = parts.map(|part| at(part) + 4.0 * at(part + 0.5) + at(part + 1.0)).sum();
    0.5 + sum * width / 6.0
}

/// What the gradient may differ by. Burn's gradient on other backends is that of an approximation.
const OF_GRADIENTS: f64 =
    if cfg!(any(feature = "flex", feature = "ndarray")) { 1e-6 } else { 2e-3 };

#[track_caller]
fn check<const D: usize>(shape: [usize; D], from: f64, step: f64) {
    let count = shape.iter().product::<usize>();
    let numbers: Vec<f32> = (0..count).map(|index| (from + step * index as f64) as f32).collect();
    let data = TensorData::new(numbers.clone(), shape);
    let y = gelu(Tensor::<Plain, D>::from_data(data.clone(), &device::<Plain>()));
    assert_eq!(y.dims(), shape);

    // The weights of the sum are not all 1, so that the gradient is multiplied by what comes in.
    let x = Tensor::<Train, D>::from_data(data.clone(), &device::<Train>()).require_grad();
    let grads = (gelu(x.clone()) * (x.clone().detach() + 3.0)).sum().backward();
    let (y, dx) = (y.into_data(), x.grad(&grads).unwrap().into_data());
    let both = y.iter::<f64>().zip(dx.iter::<f64>());
    for (x, (y, dx)) in numbers.into_iter().map(f64::from).zip(both) {
        let (size, phi) = (x.abs().max(1.0), cumulative(x));
        let right = x * phi;
        assert!((y - right).abs() < 1e-6 * size, "gelu({x}) is {y}, and not {right}");
        let right = (phi + x * density(x)) * (x + 3.0);
        let size = (x + 3.0).abs().max(1.0);
        assert!(
            (dx - right).abs() < OF_GRADIENTS * size,
            "the gradient at {x} is {dx}, not {right}"
        );
    }
}

#[test]
fn gelu_and_its_gradient_are_exact() {
    check([4000], -12.0, 0.006);
    check([3, 5, 7], -0.01, 0.000_2);
    // So many that several threads share them.
    check([2, 300, 256], -8.0, 0.000_1);
    // What `exp` makes of it is no number of 32 bits any more.
    check([2, 2, 1, 2], -150.0, 40.0);
}

#[test]
fn gelu_of_views_and_of_nothing() {
    let x =
        Tensor::<Plain, 2>::from_data([[-1.0, 0.5, 2.0], [3.0, -0.25, 0.0]], &device::<Plain>());
    let [view, rows] = [gelu(x.clone().transpose()), gelu(x.clone()).transpose()];
    assert_eq!(view.into_data(), rows.into_data());
    assert_eq!(gelu(x.slice([0..2, 0..0])).dims(), [2, 0]);
}
