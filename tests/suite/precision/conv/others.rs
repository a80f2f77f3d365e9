//! Convolutions of one dimension, and those that are not products of patches with a kernel alone.

use burn::{
    module::Param,
    nn::{
        PaddingConfig1d,
        conv::{Conv1d, Conv1dConfig, Conv2dConfig, ConvTranspose2dConfig},
    },
    tensor::Tensor,
};
use burn_lora::{
    Init, LoraAdapter, LoraConfig, LoraModule, Scaling,
    nn::{LoraConv1d, LoraConv2d, LoraConvTranspose2d, Precision},
};

use super::{CASES, Numbers, RANK, SCALE, THERE, backward, close, exact, rounded, tensor};
use crate::{
    model::{Train, device},
    oracle::{Matrix, assert_identical, bits},
    precision::random,
};

/// A layer of one dimension, with and without its update.
fn signals(rounds: bool) -> [Conv1d<Train>; 2] {
    let conv = |kernel: &Matrix| {
        let mut conv = Conv1dConfig::new(4, 6, 3)
            .with_stride(2)
            .with_dilation(2)
            .with_padding(PaddingConfig1d::Explicit(2, 2))
            .init(&device::<Train>());
        let kernel = if rounds { rounded(kernel) } else { kernel.clone() };
        conv.weight = Param::from_tensor(tensor(&kernel, [6, 4, 3]));
        conv.bias = Some(Param::from_tensor(tensor(&Matrix::random(1, 6, 2), [6])));
        conv
    };
    let kernel = exact(6, 12, 1, 65536.0);
    let [a, b] = factors_of_signals();
    let updated = kernel.plus(&a.times(&b).scaled(SCALE).transpose());
    [conv(&kernel), conv(&updated)]
}

fn factors_of_signals() -> [Matrix; 2] {
    [exact(12, RANK, 3, 64.0), exact(RANK, 6, 4, 64.0)]
}

#[test]
fn convolutions_of_one_dimension() {
    let x = Matrix::random(1, 3 * 4 * 15, 5);
    let dy = Matrix::random(1, 3 * 6 * 8, 6);
    let [a, b] = factors_of_signals();
    for adapted in [false, true] {
        let [base, _] = signals(false);
        let mut layer = LoraConv1d::from(base);
        if adapted {
            let (a, b) = (tensor(&a, [12, RANK]), tensor(&b, [RANK, 6]));
            layer.set_adapter(Some(LoraAdapter::new(a, b, SCALE, Scaling::Alpha)));
        }
        let layer = layer.with_precision(Precision::Bf16);
        let [base, updated] = signals(true);
        let burns = if adapted { updated } else { base };
        let (y, dx, grads) =
            backward(tensor(&x, [3, 4, 15]), tensor(&dy, [3, 6, 8]), |x| layer.forward(x));
        let x = tensor(&rounded(&x), [3, 4, 15]);
        let (expected, d_x, d) =
            backward(x, tensor(&rounded(&dy), [3, 6, 8]), |x| burns.forward(x));
        close("y", y, expected);
        close("dx", dx, d_x);
        if !adapted {
            let found = layer.base.weight.val().grad(&grads).unwrap();
            close("the kernel", found, burns.weight.val().grad(&d).unwrap());
        }
    }
}

#[test]
fn it_is_bf16_where_it_is_there() {
    let numbers = Numbers::of(CASES[0]);
    let layer = numbers.adapted(true);
    let of = |precision| bits(layer.with_precision(precision).forward(numbers.x(&numbers.x)));
    assert_eq!(of(Precision::Bf16) != of(Precision::F32), THERE);
}

#[test]
fn what_has_no_form_of_its_own_stays_in_f32() {
    let device = device::<Train>();
    let config = LoraConfig::new(2, 3.0).with_init(Init::RandomBoth).with_seed(3);
    let grouped: LoraConv2d<Train> =
        config.init(Conv2dConfig::new([4, 6], [3, 3]).with_groups(2).init(&device));
    let transposed: LoraConvTranspose2d<Train> =
        config.init(ConvTranspose2dConfig::new([4, 6], [3, 3]).init(&device));
    let x = random::<Train, 4>([2, 4, 7, 6], 1);
    let of = |precision| {
        let grouped = grouped.with_precision(precision).forward(x.clone());
        [grouped, transposed.with_precision(precision).forward(x.clone())].map(bits)
    };
    assert_eq!(of(Precision::Bf16), of(Precision::F32));
}

#[test]
fn magnitudes_and_dropout_work() {
    let numbers = Numbers::of(CASES[0]);
    let of = |dora: bool, dropout: f64, precision| {
        let config = LoraConfig::new(RANK, SCALE).with_init(Init::RandomBoth).with_seed(4);
        let config = config.with_dora(dora).with_dropout(dropout);
        let base = numbers.conv(&numbers.kernel, true);
        let layer: LoraConv2d<Train> = config.init(base);
        let layer = layer.with_precision(precision);
        let x = numbers.x(&numbers.x).require_grad();
        let y = layer.forward(x.clone());
        let grads = y.clone().sin().sum().backward();
        (y.inner(), x.grad(&grads).unwrap())
    };
    // So rare that nothing is dropped.
    for (dora, dropout) in [(true, 0.0), (false, 1e-30)] {
        let [ours, full] = [Precision::Bf16, Precision::F32].map(|it| of(dora, dropout, it));
        for (ours, full) in [(ours.0, full.0), (ours.1, full.1)] {
            let size = full.clone().abs().max().into_scalar();
            let error = (ours - full).abs().max().into_scalar();
            assert!(error <= 2e-2 * size, "{error} of {size}");
        }
    }
}

#[test]
fn no_images_have_no_output() {
    let layer = Numbers::of(CASES[0]).adapted(true).with_precision(Precision::Bf16);
    let none = Tensor::<Train, 4>::zeros([0, 3, 7, 9], &device::<Train>());
    assert_eq!(layer.forward(none).dims(), [0, 5, 7, 9]);
}

#[test]
fn what_is_not_finite_stays_in_its_image() {
    if !THERE {
        // A GPU may take all numbers for finite ones.
        return;
    }
    let numbers = Numbers::of(CASES[1]);
    let layer = numbers.adapted(true).with_precision(Precision::Bf16);
    let expected = layer.forward(numbers.x(&numbers.x));
    for broken in [f64::NAN, f64::INFINITY] {
        let mut x = numbers.x.clone();
        // In the second of three images.
        let volume = x.data.len() / 3;
        x.data[volume + 40] = broken;
        let y = layer.forward(numbers.x(&x));
        for image in [0, 2] {
            let [y, expected] = [&y, &expected].map(|it| it.clone().narrow(0, image, 1));
            assert_identical(y, expected);
        }
        let second: Vec<_> = y.narrow(0, 1, 1).into_data().iter::<f32>().collect();
        assert!(second.iter().any(|it| !it.is_finite()));
    }
}
