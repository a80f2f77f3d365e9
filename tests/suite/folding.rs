//! A batch norm that was folded into the convolution before it: the output of both is what it was.

use burn::{
    module::{Module, Param},
    nn::{
        BatchNormConfig, PaddingConfig2d,
        conv::{Conv1dConfig, Conv2dConfig},
    },
    tensor::{Tensor, backend::Backend},
};
use burn_lora::{
    Init, LoraConfig,
    nn::{BatchNorm, LoraConv1d, LoraConv2d},
};

use crate::{
    model::{Plain, Train, device},
    oracle::Matrix,
};

const CHANNELS: usize = 6;

fn random<B: Backend, const D: usize>(shape: [usize; D], seed: u64) -> Tensor<B, D> {
    Matrix::random(1, shape.iter().product(), seed).tensor(shape, &device::<B>())
}

/// A norm with statistics, factors and summands of its own.
fn norm<B: Backend>() -> BatchNorm<B> {
    let mut norm = BatchNormConfig::new(CHANNELS).with_epsilon(1e-3).init::<B>(&device::<B>());
    let tensor = |seed| random::<B, 1>([CHANNELS], seed);
    norm.gamma = Param::from_tensor(tensor(1) + 0.3);
    norm.beta = Param::from_tensor(tensor(2));
    norm.running_mean = burn::module::RunningState::new(tensor(3));
    norm.running_var = burn::module::RunningState::new(tensor(4) + 1.5);
    BatchNorm::from(norm).no_grad()
}

fn conv(bias: bool) -> LoraConv2d<Plain> {
    let config = Conv2dConfig::new([3, CHANNELS], [3, 3]).with_bias(bias);
    let mut conv =
        config.with_padding(PaddingConfig2d::Same).with_stride([1, 1]).init(&device::<Plain>());
    conv.weight = Param::from_tensor(random([CHANNELS, 3, 3, 3], 5));
    conv.bias = bias.then(|| Param::from_tensor(random([CHANNELS], 6)));
    conv.into()
}

#[track_caller]
fn close<const D: usize>(found: Tensor<Plain, D>, expected: Tensor<Plain, D>) {
    let size = expected.clone().abs().max().into_scalar().max(1.0);
    let error = (found - expected).abs().max().into_scalar();
    assert!(error < 1e-5 * size, "{error}, {size}");
}

#[test]
fn the_output_stays() {
    for bias in [true, false] {
        let (mut conv, mut norm) = (conv(bias), norm());
        let x = random::<Plain, 4>([2, 3, 7, 5], 7);
        let before = norm.forward(conv.forward(x.clone()));
        norm.fold_into(&mut conv);
        close(norm.forward(conv.forward(x.clone())), before.clone());
        // The norm does nothing any more.
        close(conv.forward(x), before);
        let y = random::<Plain, 4>([2, CHANNELS, 3, 4], 8);
        assert_eq!(norm.forward(y.clone()).into_data(), y.into_data());
        // To fold it once more changes nothing.
        let weight = conv.base.weight.val();
        norm.fold_into(&mut conv);
        assert_eq!(conv.base.weight.val().into_data(), weight.into_data());
    }
}

#[test]
fn one_dimension_too() {
    let conv = Conv1dConfig::new(4, CHANNELS, 3).init(&device::<Plain>());
    let (mut conv, mut norm) = (LoraConv1d::from(conv), norm());
    let x = random::<Plain, 3>([2, 4, 9], 9);
    let before = norm.forward(conv.forward(x.clone()));
    norm.fold_into(&mut conv);
    close(norm.forward(conv.forward(x)), before);
}

#[test]
fn gradients_of_a_frozen_norm_reach_its_input() {
    let (norm, x) = (norm::<Train>(), random::<Train, 4>([2, CHANNELS, 5, 3], 10).require_grad());
    let dy = random::<Train, 4>([2, CHANNELS, 5, 3], 11);
    let grads = (norm.forward(x.clone()) * dy.clone()).sum().backward();
    let factor = norm.gamma.val() / (norm.running_var() + 1e-3).sqrt();
    let expected = dy * factor.reshape([1, CHANNELS, 1, 1]);
    close(x.grad(&grads).expect("it has a gradient"), expected.inner());
}

#[test]
#[should_panic(expected = "a frozen norm expected")]
fn a_norm_that_trains_is_refused() {
    let mut norm: BatchNorm<Train> = BatchNormConfig::new(3).init(&device::<Train>()).into();
    let mut conv: LoraConv2d<Train> =
        Conv2dConfig::new([2, 3], [1, 1]).init(&device::<Train>()).into();
    norm.fold_into(&mut conv);
}

#[test]
#[should_panic(expected = "merge it first")]
fn a_convolution_with_an_adapter_is_refused() {
    let config = LoraConfig::new(2, 3.0).with_init(Init::RandomBoth);
    let base = Conv2dConfig::new([2, CHANNELS], [1, 1]).init::<Plain>(&device::<Plain>());
    let mut conv: LoraConv2d<Plain> = config.init(base);
    norm().fold_into(&mut conv);
}

#[test]
#[should_panic(expected = "a norm of 4 channels expected, got one of 6")]
fn another_number_of_channels_is_refused() {
    let conv = Conv2dConfig::new([2, 4], [1, 1]).init::<Plain>(&device::<Plain>());
    norm().fold_into(&mut LoraConv2d::from(conv));
}
