//! Convolutions. Burn's own, of the rounded input and the rounded kernel, is the reference: its products of numbers
//! in bf16 are exact, and both are added up in `f32`.

mod others;

use burn::{
    module::Param,
    nn::{
        PaddingConfig2d,
        conv::{Conv2d, Conv2dConfig},
    },
    tensor::Tensor,
};
use burn_lora::{
    LoraAdapter, LoraModule, Scaling,
    nn::{LoraConv2d, Precision},
};

use super::{THERE, backward, to_bf16};
use crate::{
    model::{Plain, Train, device},
    oracle::{Matrix, assert_identical},
};

const SCALE: f64 = 0.5;
const RANK: usize = 3;

/// What the rounding of sums to `f32` may change, of the largest number. That of factors to bf16 changes a thousand
/// times as much. Elsewhere the update is a convolution of its own.
const TOLERANCE: f32 = if THERE { 3e-6 } else { 2e-5 };

/// Numbers of which sums of some products are exact in `f32`, so that a kernel with its update is rounded to bf16 in
/// the same way by everyone.
fn exact(rows: usize, cols: usize, seed: u64, steps: f64) -> Matrix {
    Matrix::random(rows, cols, seed).map(|it| (it * steps).round() / steps)
}

fn rounded(matrix: &Matrix) -> Matrix {
    if THERE { matrix.map(to_bf16) } else { matrix.clone() }
}

fn tensor<const D: usize>(matrix: &Matrix, shape: [usize; D]) -> Tensor<Train, D> {
    matrix.tensor(shape, &device::<Train>())
}

#[track_caller]
fn close<const D: usize>(of: &str, found: Tensor<Plain, D>, expected: Tensor<Plain, D>) {
    assert_eq!(found.dims(), expected.dims(), "{of}");
    let size = expected.clone().abs().max().into_scalar().max(1.0);
    let error = (found - expected).abs().max().into_scalar();
    assert!(error <= TOLERANCE * size, "{of}: {error} of {size}");
}

#[derive(Clone, Copy, Debug)]
struct Case {
    batch: usize,
    channels: [usize; 2],
    image: [usize; 2],
    kernel: [usize; 2],
    stride: [usize; 2],
    dilation: [usize; 2],
    padding: [usize; 2],
}

const CASES: [Case; 6] = [
    Case {
        batch: 2,
        channels: [3, 5],
        image: [7, 9],
        kernel: [3, 3],
        stride: [1; 2],
        dilation: [1; 2],
        padding: [1; 2],
    },
    Case {
        batch: 3,
        channels: [2, 7],
        image: [9, 7],
        kernel: [2, 3],
        stride: [2, 1],
        dilation: [1; 2],
        padding: [0; 2],
    },
    Case {
        batch: 1,
        channels: [4, 3],
        image: [11, 10],
        kernel: [3, 2],
        stride: [1, 2],
        dilation: [2, 3],
        padding: [2, 1],
    },
    // A product with each pixel.
    Case {
        batch: 4,
        channels: [33, 6],
        image: [3, 2],
        kernel: [1; 2],
        stride: [1; 2],
        dilation: [1; 2],
        padding: [0; 2],
    },
    // A single place.
    Case {
        batch: 1,
        channels: [2, 3],
        image: [3, 3],
        kernel: [3; 2],
        stride: [1; 2],
        dilation: [1; 2],
        padding: [0; 2],
    },
    Case {
        batch: 5,
        channels: [8, 34],
        image: [16, 16],
        kernel: [3; 2],
        stride: [1; 2],
        dilation: [1; 2],
        padding: [1; 2],
    },
];

/// The numbers of a case.
struct Numbers {
    case: Case,
    /// By row of the matrix that the kernel is: `[channels_out, patch]`.
    kernel: Matrix,
    bias: Matrix,
    /// `[patch, rank]` and `[rank, channels_out]`.
    factors: [Matrix; 2],
    x: Matrix,
}

impl Numbers {
    fn of(case: Case) -> Self {
        let [c_in, c_out] = case.channels;
        let patch = c_in * case.kernel[0] * case.kernel[1];
        Self {
            case,
            kernel: exact(c_out, patch, 1, 65536.0),
            bias: Matrix::random(1, c_out, 2),
            factors: [exact(patch, RANK, 3, 64.0), exact(RANK, c_out, 4, 64.0)],
            x: Matrix::random(1, case.batch * c_in * case.image[0] * case.image[1], 5),
        }
    }

    fn x(&self, matrix: &Matrix) -> Tensor<Train, 4> {
        let Case { batch, channels: [c_in, _], image: [height, width], .. } = self.case;
        tensor(matrix, [batch, c_in, height, width])
    }

    fn conv(&self, kernel: &Matrix, bias: bool) -> Conv2d<Train> {
        let Case { channels, kernel: size, stride, dilation, padding: [y, x], .. } = self.case;
        let mut conv = Conv2dConfig::new(channels, size)
            .with_stride(stride)
            .with_dilation(dilation)
            .with_padding(PaddingConfig2d::Explicit(y, x, y, x))
            .with_bias(bias)
            .init(&device::<Train>());
        let shape = [channels[1], channels[0], size[0], size[1]];
        conv.weight = Param::from_tensor(tensor(kernel, shape));
        conv.bias = bias.then(|| Param::from_tensor(tensor(&self.bias, [channels[1]])));
        conv
    }

    fn adapter(&self) -> LoraAdapter<Train> {
        let [a, b] = &self.factors;
        let (a, b) = (tensor(a, [a.rows, a.cols]), tensor(b, [b.rows, b.cols]));
        LoraAdapter::new(a, b, SCALE, Scaling::Alpha)
    }

    fn adapted(&self, bias: bool) -> LoraConv2d<Train> {
        let mut layer = LoraConv2d::from(self.conv(&self.kernel, bias));
        layer.set_adapter(Some(self.adapter()));
        layer
    }

    /// The kernel with its update.
    fn updated(&self) -> Matrix {
        let [a, b] = &self.factors;
        self.kernel.plus(&a.times(b).scaled(SCALE).transpose())
    }
}

#[test]
fn adapted_kernels_are_rounded_with_their_update() {
    for case in CASES {
        for bias in [true, false] {
            let numbers = Numbers::of(case);
            let layer = numbers.adapted(bias).with_precision(Precision::Bf16);
            let burns = numbers.conv(&rounded(&numbers.updated()), bias);
            let of = format!("{case:?}");
            let y = burns.forward(numbers.x(&rounded(&numbers.x)));
            let dy = Matrix::random(1, y.shape().num_elements(), 6);
            let dims = y.dims();
            let (found, dx, grads) =
                backward(numbers.x(&numbers.x), tensor(&dy, dims), |x| layer.forward(x));
            close(&of, found, y.inner());
            let x = numbers.x(&rounded(&numbers.x));
            let (_, expected, _) = backward(x, tensor(&rounded(&dy), dims), |x| burns.forward(x));
            close(&format!("dx of {of}"), dx, expected);

            // The gradients of the factors are those of `f32`, of the same numbers.
            let full = numbers.adapted(bias);
            let (_, _, expected) =
                backward(numbers.x(&numbers.x), tensor(&dy, dims), |x| full.forward(x));
            let [ours, full] = [&layer, &full].map(|it| it.adapter().unwrap());
            assert_identical(
                ours.a.val().grad(&grads).unwrap(),
                full.a.val().grad(&expected).unwrap(),
            );
            assert_identical(
                ours.b.val().grad(&grads).unwrap(),
                full.b.val().grad(&expected).unwrap(),
            );
        }
    }
}

#[test]
fn kernels_that_train_have_gradients_of_rounded_factors() {
    for case in CASES {
        for bias in [true, false] {
            let numbers = Numbers::of(case);
            // Not those that a sum is exact of.
            let kernel = Matrix::random(numbers.kernel.rows, numbers.kernel.cols, 7);
            let layer = LoraConv2d::from(numbers.conv(&kernel, bias));
            let layer = layer.with_precision(Precision::Bf16);
            let burns = numbers.conv(&rounded(&kernel), bias);
            let of = format!("{case:?}");
            let y = burns.forward(numbers.x(&rounded(&numbers.x)));
            let (dims, dy) = (y.dims(), Matrix::random(1, y.shape().num_elements(), 6));
            let (found, dx, grads) =
                backward(numbers.x(&numbers.x), tensor(&dy, dims), |x| layer.forward(x));
            close(&of, found, y.inner());
            let x = numbers.x(&rounded(&numbers.x));
            let (_, d_rounded, expected) =
                backward(x, tensor(&rounded(&dy), dims), |x| burns.forward(x));
            close(&format!("dx of {of}"), dx, d_rounded);
            close(
                &format!("the kernel of {of}"),
                layer.base.weight.val().grad(&grads).unwrap(),
                burns.weight.val().grad(&expected).unwrap(),
            );
            if let Some(bias) = &layer.base.bias {
                // It is a sum, and not rounded.
                let dy = tensor(&dy, dims).inner();
                let expected = dy.swap_dims(0, 1).flatten::<2>(1, 3).sum_dim(1).squeeze_dim(1);
                close(&format!("the bias of {of}"), bias.val().grad(&grads).unwrap(), expected);
            }
        }
    }
}
