//! Convolutions with adapters, for random strides, paddings, dilations, groups and kernels: the layer, the
//! merged kernel and the naive formula agree. On CPU backends the layer computes in one operation, and with
//! groups or dropout in two convolutions.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use burn::{
    module::Param,
    nn::{
        PaddingConfig1d, PaddingConfig2d,
        conv::{
            Conv1d, Conv1dConfig, Conv2d, Conv2dConfig, ConvTranspose2d, ConvTranspose2dConfig,
        },
    },
    tensor::{Tensor, backend::Backend},
};
use burn_lora::{
    Lora, LoraAdapter, LoraConfig, Scaling,
    nn::{LoraConv1d, LoraConv2d, LoraConvTranspose2d},
};
use proptest::prelude::*;

use crate::{
    model::{Plain, Train, device, random_cases},
    oracle::{Matrix, assert_close, differences},
};

const TOLERANCE: f64 = 2e-5;

/// A convolution with its adapter and an input. In a transposed one, input and output are exchanged.
#[derive(Clone, Debug)]
struct Case {
    transposed: bool,
    batch: usize,
    groups: usize,
    /// Channels per group, in and out.
    channels: [usize; 2],
    kernel: [usize; 2],
    stride: [usize; 2],
    dilation: [usize; 2],
    /// Top, left, bottom, right. A transposed convolution uses only the first two.
    padding: [usize; 4],
    size: [usize; 2],
    rank: usize,
    alpha: f64,
    x: Matrix,
    w: Matrix,
    bias: Option<Matrix>,
    a: Matrix,
    b: Matrix,
    adapter_bias: Option<Matrix>,
    /// The adapter's dropout in training, which must drop nothing.
    dropout: f64,
}

#[derive(Clone, Debug)]
struct Shape {
    transposed: bool,
    batch: usize,
    groups: usize,
    channels: [usize; 2],
    kernel: [usize; 2],
    stride: [usize; 2],
    dilation: [usize; 2],
    padding: [usize; 4],
    extra: [usize; 2],
    rank: usize,
}

fn case(shape: Shape, bias: bool, adapter_bias: bool, alpha: f64) -> Case {
    let Shape { transposed, batch, groups, channels, kernel, stride, dilation, padding, .. } =
        shape;
    let [c_in, c_out] = channels;
    let places = kernel[0] * kernel[1];
    // Large enough for the kernel, and `extra` more.
    let size = [0, 1].map(|d| dilation[d] * (kernel[d] - 1) + 1 + shape.extra[d]);
    let (d_input, d_output) = match transposed {
        true => (c_in * groups * places, c_out),
        false => (c_in * places, c_out * groups),
    };
    let vector = |wanted: bool, size, seed| wanted.then(|| Matrix::random(1, size, seed));
    let adapter_bias = adapter_bias && !(transposed && groups > 1);
    Case {
        transposed,
        batch,
        groups,
        channels,
        kernel,
        stride,
        dilation,
        padding,
        size,
        rank: shape.rank,
        alpha,
        x: Matrix::random(batch, c_in * groups * size[0] * size[1], 1),
        w: Matrix::random(1, c_in * groups * c_out * places, 2),
        bias: vector(bias, c_out * groups, 3),
        a: Matrix::random(d_input, shape.rank, 4),
        b: Matrix::random(shape.rank, d_output, 5),
        adapter_bias: vector(adapter_bias, d_output, 6),
        dropout: 0.0,
    }
}

impl Case {
    /// The weight plus the update, from an input channel to an output channel of a group.
    fn weight(&self, group: usize, c_in: usize, c_out: usize, place: usize) -> f64 {
        let [per_in, per_out] = self.channels;
        let places = self.kernel[0] * self.kernel[1];
        let (index, row, column) = match self.transposed {
            true => {
                let channel = group * per_in + c_in;
                ((channel * per_out + c_out) * places + place, channel * places + place, c_out)
            }
            false => {
                let channel = group * per_out + c_out;
                ((channel * per_in + c_in) * places + place, c_in * places + place, channel)
            }
        };
        let update: f64 = (0..self.rank).map(|j| self.a.at(row, j) * self.b.at(j, column)).sum();
        self.w.data[index] + self.alpha * update
    }

    fn output_size(&self) -> [usize; 2] {
        [0, 1].map(|d| {
            let reach = self.dilation[d] * (self.kernel[d] - 1);
            match self.transposed {
                true => (self.size[d] - 1) * self.stride[d] + reach + 1 - 2 * self.padding[d],
                false => {
                    let padded = self.size[d] + self.padding[d] + self.padding[d + 2];
                    (padded - reach - 1) / self.stride[d] + 1
                }
            }
        })
    }

    fn output(&self) -> Matrix {
        let ([height, width], [out_height, out_width]) = (self.size, self.output_size());
        let [per_in, per_out] = self.channels;
        let plane = out_height * out_width;
        let mut y = Matrix::from_fn(self.batch, self.groups * per_out * plane, |_, column| {
            let channel = column / plane;
            let shared = if self.transposed { channel % per_out } else { channel };
            self.bias.as_ref().map_or(0.0, |it| it.data[channel])
                + self.adapter_bias.as_ref().map_or(0.0, |it| self.alpha * it.data[shared])
        });
        for item in 0..self.batch {
            for group in 0..self.groups {
                for c_in in 0..per_in {
                    for c_out in 0..per_out {
                        for (kh, kw) in (0..self.kernel[0])
                            .flat_map(|kh| (0..self.kernel[1]).map(move |kw| (kh, kw)))
                        {
                            let weight = self.weight(group, c_in, c_out, kh * self.kernel[1] + kw);
                            let rows = if self.transposed { height } else { out_height };
                            let columns = if self.transposed { width } else { out_width };
                            for row in 0..rows {
                                for column in 0..columns {
                                    // The position at the other side of this kernel element.
                                    let far = |at: usize, k: usize, d: usize| {
                                        (at * self.stride[d] + k * self.dilation[d])
                                            .checked_sub(self.padding[d])
                                    };
                                    let (Some(far_row), Some(far_column)) =
                                        (far(row, kh, 0), far(column, kw, 1))
                                    else {
                                        continue;
                                    };
                                    let (x_at, y_at) = match self.transposed {
                                        true => ((row, column), (far_row, far_column)),
                                        false => ((far_row, far_column), (row, column)),
                                    };
                                    let outside = x_at.0 >= height
                                        || x_at.1 >= width
                                        || y_at.0 >= out_height
                                        || y_at.1 >= out_width;
                                    if outside {
                                        continue;
                                    }
                                    let x_channel = group * per_in + c_in;
                                    let y_channel = group * per_out + c_out;
                                    let x_index = (x_channel * height + x_at.0) * width + x_at.1;
                                    let y_index =
                                        (y_channel * out_height + y_at.0) * out_width + y_at.1;
                                    y.data[item * y.cols + y_index] +=
                                        weight * self.x.at(item, x_index);
                                }
                            }
                        }
                    }
                }
            }
        }
        y
    }

    fn loss(&self) -> f64 {
        self.output().data.iter().map(|y| y.sin()).sum()
    }

    fn input<B: Backend>(&self) -> Tensor<B, 4> {
        let channels = self.groups * self.channels[0];
        self.x.tensor([self.batch, channels, self.size[0], self.size[1]], &device::<B>())
    }

    fn adapter<B: Backend>(&self) -> LoraAdapter<B> {
        let device = device::<B>();
        let (a, b) = (&self.a, &self.b);
        let (a, b) = (a.tensor([a.rows, a.cols], &device), b.tensor([b.rows, b.cols], &device));
        let mut adapter = LoraAdapter::new(a, b, self.alpha, Scaling::Alpha);
        adapter.bias = self.vector(&self.adapter_bias);
        adapter.dropout.prob = self.dropout;
        adapter
    }

    fn vector<B: Backend>(&self, values: &Option<Matrix>) -> Option<Param<Tensor<B, 1>>> {
        let values = values.as_ref()?;
        Some(Param::from_tensor(values.tensor([values.cols], &device::<B>())))
    }

    fn conv2d<B: Backend>(&self) -> LoraConv2d<B> {
        let [per_in, per_out] = self.channels;
        let [top, left, bottom, right] = self.padding;
        let base: Conv2d<B> =
            Conv2dConfig::new([per_in * self.groups, per_out * self.groups], self.kernel)
                .with_stride(self.stride)
                .with_dilation(self.dilation)
                .with_groups(self.groups)
                .with_padding(PaddingConfig2d::Explicit(top, left, bottom, right))
                .init(&device::<B>());
        let shape = [per_out * self.groups, per_in, self.kernel[0], self.kernel[1]];
        let weight = Param::from_tensor(self.w.tensor(shape, &device::<B>()));
        let mut layer = LoraConv2d::from(Conv2d { weight, bias: self.vector(&self.bias), ..base });
        layer.set_adapter(Some(self.adapter()));
        layer
    }

    /// The same in one dimension, for cases of height 1.
    fn conv1d<B: Backend>(&self) -> LoraConv1d<B> {
        let [per_in, per_out] = self.channels;
        let [_, left, _, right] = self.padding;
        let base: Conv1d<B> =
            Conv1dConfig::new(per_in * self.groups, per_out * self.groups, self.kernel[1])
                .with_stride(self.stride[1])
                .with_dilation(self.dilation[1])
                .with_groups(self.groups)
                .with_padding(PaddingConfig1d::Explicit(left, right))
                .init(&device::<B>());
        let shape = [per_out * self.groups, per_in, self.kernel[1]];
        let weight = Param::from_tensor(self.w.tensor(shape, &device::<B>()));
        let mut layer = LoraConv1d::from(Conv1d { weight, bias: self.vector(&self.bias), ..base });
        layer.set_adapter(Some(self.adapter()));
        layer
    }

    fn conv_transpose2d<B: Backend>(&self) -> LoraConvTranspose2d<B> {
        let [per_in, per_out] = self.channels;
        let base: ConvTranspose2d<B> =
            ConvTranspose2dConfig::new([per_in * self.groups, per_out * self.groups], self.kernel)
                .with_stride(self.stride)
                .with_dilation(self.dilation)
                .with_groups(self.groups)
                .with_padding([self.padding[0], self.padding[1]])
                .init(&device::<B>());
        let shape = [per_in * self.groups, per_out, self.kernel[0], self.kernel[1]];
        let weight = Param::from_tensor(self.w.tensor(shape, &device::<B>()));
        let bias = self.vector(&self.bias);
        let mut layer = LoraConvTranspose2d::from(ConvTranspose2d { weight, bias, ..base });
        layer.set_adapter(Some(self.adapter()));
        layer
    }
}

/// Compares the outputs, merged and not, with the formula. If `$gradients`, compares the gradients of the
/// factors and the input with finite differences.
macro_rules! check {
    ($case:expr, $layer:ident, $input:expr, $gradients:expr) => {{
        let case: &Case = $case;
        let expected = case.output();
        let layer = case.$layer::<Plain>();
        let input = $input;
        let y = layer.forward(input(case.input::<Plain>()));
        assert_close(y, &expected, TOLERANCE);
        let merged = Lora::new(layer).merge().unwrap();
        assert!(merged.adapter().is_none());
        assert_close(merged.base.forward(input(case.input::<Plain>())), &expected, TOLERANCE);
        if $gradients {
            let layer = case.$layer::<Train>();
            let input = $input;
            let x = case.input::<Train>().require_grad();
            let grads = layer.forward(input(x.clone())).sin().sum().backward();
            let adapter = layer.adapter().unwrap();
            let by = |of: fn(&mut Case) -> &mut Matrix| differences(case, of, Case::loss);
            assert_close(adapter.a.grad(&grads).unwrap(), &by(|it| &mut it.a), TOLERANCE);
            assert_close(adapter.b.grad(&grads).unwrap(), &by(|it| &mut it.b), TOLERANCE);
            assert_close(x.grad(&grads).unwrap(), &by(|it| &mut it.x), TOLERANCE);
            if let Some(bias) = &adapter.bias {
                let expected = by(|it| it.adapter_bias.as_mut().unwrap());
                assert_close(bias.grad(&grads).unwrap(), &expected, TOLERANCE);
            }
            assert!(layer.base.weight.grad(&grads).is_none(), "the kernel is frozen");
            assert!(layer.base.bias.is_none_or(|it| it.grad(&grads).is_none()));
        }
    }};
}

fn square<B: Backend>(x: Tensor<B, 4>) -> Tensor<B, 4> {
    x
}

fn line<B: Backend>(x: Tensor<B, 4>) -> Tensor<B, 3> {
    x.squeeze_dim(2)
}

fn shapes(transposed: bool) -> impl Strategy<Value = Shape> {
    let pair = |range: std::ops::RangeInclusive<usize>| [range.clone(), range];
    (
        [1..=2usize, 1..=3, 1..=3],
        pair(1..=3),
        [pair(1..=3), pair(1..=2), pair(1..=2), pair(0..=4)],
        [0..=2usize, 0..=2, 0..=2, 0..=2],
    )
        .prop_map(move |(sizes, channels, [kernel, stride, dilation, extra], padding)| {
            let [batch, groups, rank] = sizes;
            // The padding of a transposed convolution cannot exceed the size of its kernel.
            let fits = |d: usize| padding[d].min(dilation[d] * (kernel[d] - 1) / 2);
            let padding = if transposed { [fits(0), fits(1), 0, 0] } else { padding };
            // Burn's wgpu backend returns zeros if the stride is larger than the kernel.
            let steps = |d: usize| if transposed { stride[d].min(kernel[d]) } else { stride[d] };
            let stride = [0, 1].map(steps);
            let shape = (transposed, batch, groups, channels, kernel, stride, dilation);
            let (transposed, batch, groups, channels, kernel, stride, dilation) = shape;
            Shape {
                transposed,
                batch,
                groups,
                channels,
                kernel,
                stride,
                dilation,
                padding,
                extra,
                rank,
            }
        })
}

fn cases(transposed: bool) -> impl Strategy<Value = Case> {
    let values = (any::<[bool; 2]>(), 0.3..2.0f64);
    (shapes(transposed), values)
        .prop_map(|(shape, ([bias, adapter_bias], alpha))| case(shape, bias, adapter_bias, alpha))
}

proptest! {
    #![proptest_config(random_cases(24))]

    #[test]
    fn conv2d(case in cases(false)) {
        check!(&case, conv2d, square, false);
    }

    #[test]
    fn conv1d(case in cases(false).prop_map(flattened)) {
        check!(&case, conv1d, line, false);
    }

    #[test]
    fn conv_transpose2d(case in cases(true)) {
        check!(&case, conv_transpose2d, square, false);
    }
}

/// Cases whose gradients Burn computes correctly. On wgpu, that of the input is zero where the stride is
/// larger than the kernel.
fn gradient_cases(transposed: bool) -> impl Strategy<Value = Case> {
    cases(transposed).prop_filter("a stride within the kernel", |case| {
        !cfg!(feature = "wgpu") || (0..2).all(|d| case.stride[d] <= case.kernel[d])
    })
}

/// The same case with a height of 1.
fn flattened(it: Case) -> Case {
    let first = |[_, width]: [usize; 2]| [1, width];
    let shape = Shape {
        transposed: it.transposed,
        batch: it.batch,
        groups: it.groups,
        channels: it.channels,
        kernel: first(it.kernel),
        stride: first(it.stride),
        dilation: first(it.dilation),
        padding: [0, it.padding[1], 0, it.padding[3]],
        extra: [0, 3],
        rank: it.rank,
    };
    case(shape, it.bias.is_some(), it.adapter_bias.is_some(), it.alpha)
}

fn example(transposed: bool, groups: usize) -> Case {
    let shape = Shape {
        transposed,
        batch: 2,
        groups,
        channels: [2, 3],
        kernel: [3, 2],
        stride: [2, 1],
        dilation: [1, 2],
        padding: if transposed { [1, 1, 0, 0] } else { [1, 2, 0, 1] },
        extra: [2, 1],
        rank: 2,
    };
    case(shape, true, true, 1.3)
}

#[test]
fn gradients_agree_with_finite_differences() {
    for groups in [1, 2] {
        check!(&example(false, groups), conv2d, square, true);
        check!(&flattened(example(false, groups)), conv1d, line, true);
        check!(&example(true, groups), conv_transpose2d, square, true);
    }
}

#[test]
fn gradients_agree_with_finite_differences_with_dropout() {
    let case = Case { dropout: f64::MIN_POSITIVE, ..example(false, 1) };
    check!(&case, conv2d, square, true);
    let case = Case { dropout: f64::MIN_POSITIVE, ..flattened(example(false, 1)) };
    check!(&case, conv1d, line, true);
}

#[test]
fn a_kernel_of_one_dimension_trains() {
    let case = Case { alpha: 0.0, ..flattened(example(false, 1)) };
    let mut layer = case.conv1d::<Train>();
    layer.set_adapter(None);
    layer.base.weight = layer.base.weight.set_require_grad(true);
    layer.base.bias = layer.base.bias.map(|it| it.set_require_grad(true));
    let grads = layer.forward(line(case.input())).sin().sum().backward();
    let by = |of: fn(&mut Case) -> &mut Matrix| differences(&case, of, Case::loss);
    assert_close(layer.base.weight.grad(&grads).unwrap(), &by(|it| &mut it.w), TOLERANCE);
    let bias = layer.base.bias.unwrap().grad(&grads).unwrap();
    assert_close(bias, &by(|it| it.bias.as_mut().unwrap()), TOLERANCE);
}

#[test]
fn padding_with_a_stride_is_the_bases() {
    for stride in [1, 2, 3] {
        let base = Conv2dConfig::new([2, 3], [2, 4])
            .with_stride([stride; 2])
            .with_padding(PaddingConfig2d::Same)
            .init::<Plain>(&device::<Plain>());
        let x = Matrix::random(2, 2 * 7 * 8, 8).tensor([2, 2, 7, 8], &device::<Plain>());
        let expected = base.forward(x.clone());
        let dims = expected.dims();
        let data = expected.into_data().convert::<f64>().to_vec().unwrap();
        let y = LoraConv2d::from(base).forward(x);
        assert_eq!(y.dims(), dims);
        assert_close(y, &Matrix { rows: 1, cols: data.len(), data }, TOLERANCE);
    }
}

proptest! {
    #![proptest_config(random_cases(32))]

    #[test]
    fn gradients_of_conv2d(case in gradient_cases(false)) {
        check!(&case, conv2d, square, true);
    }

    #[test]
    fn gradients_of_conv1d(case in gradient_cases(false).prop_map(flattened)) {
        check!(&case, conv1d, line, true);
    }

    #[test]
    fn gradients_of_conv_transpose2d(case in gradient_cases(true)) {
        check!(&case, conv_transpose2d, square, true);
    }
}

/// Burn's own gradient of such a kernel is wrong.
#[test]
fn gradients_with_groups_and_a_stride_that_leaves_a_remainder() {
    let shape = Shape {
        transposed: false,
        batch: 1,
        groups: 2,
        channels: [2, 2],
        kernel: [1, 2],
        stride: [1, 2],
        dilation: [1, 1],
        padding: [0, 1, 0, 0],
        extra: [0, 6],
        rank: 2,
    };
    check!(&case(shape, true, true, 1.3), conv1d, line, true);
}

#[test]
fn padding_that_depends_on_the_input_is_the_bases() {
    // A kernel of even size needs uneven padding.
    let base = Conv2dConfig::new([2, 3], [2, 4]).with_padding(PaddingConfig2d::Same);
    let config = LoraConfig::new(2, 3.0).with_init(burn_lora::Init::RandomBoth);
    let layer = config.init(base.init::<Plain>(&device::<Plain>()));
    let x = Matrix::random(1, 2 * 5 * 6, 8).tensor([1, 2, 5, 6], &device::<Plain>());
    let y = layer.forward(x.clone());
    assert_eq!(y.dims(), [1, 3, 5, 6]);
    let values = y.into_data().convert::<f64>().to_vec().unwrap();
    let expected = Matrix { rows: 1, cols: values.len(), data: values };
    assert_close(Lora::new(layer).merge().unwrap().forward(x), &expected, TOLERANCE);
}

#[test]
fn the_update_is_the_difference_of_the_kernels() {
    // The matrix has a row for each element of a patch.
    let layer = example(false, 2).conv2d::<Plain>();
    assert_eq!(layer.adapter().unwrap().shape(), [2 * 3 * 2, 6]);
    let merged = Lora::new(layer.clone()).merge().unwrap();
    let difference = merged.base.weight.val() - layer.base.weight.val();
    let difference: Tensor<Plain, 2> = difference.reshape([6, 12]).transpose();
    let delta = layer.adapter().unwrap().delta();
    let values = delta.into_data().convert::<f64>().to_vec().unwrap();
    assert_close(difference, &Matrix { rows: 12, cols: 6, data: values }, 1e-6);
}

#[test]
#[should_panic = "cannot take one"]
fn a_bias_on_a_transposed_convolution_with_groups_is_refused() {
    let base = ConvTranspose2dConfig::new([4, 4], [2, 2]).with_groups(2);
    LoraConfig::new(2, 3.0).with_bias(true).init(base.init::<Plain>(&device::<Plain>()));
}

/// Burn drops an operation if nothing holds its result while another thread runs a backward pass. After
/// a first backward pass, parameters no longer protect what is computed from them.
#[test]
fn no_gradient_is_lost_while_other_threads_go_backward() {
    // What could be lost is autodiff's, whatever the backend.
    let passes = if cfg!(feature = "wgpu") { 40 } else { 200 };
    let layers = [1, 2].map(|groups| example(false, groups).conv2d::<Train>());
    let done = AtomicBool::new(false);
    let lost = thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let x = Tensor::<Train, 1>::ones([2], &device::<Train>()).require_grad();
                    let _ = x.sin().sum().backward();
                }
            });
        }
        let inputs = [1, 2].map(|groups| example(false, groups).input::<Train>());
        let lost = (0..passes)
            .filter(|pass| {
                let (layer, x) = (&layers[pass % 2], &inputs[pass % 2]);
                let grads = layer.forward(x.clone()).sin().sum().backward();
                layer.adapter().unwrap().a.grad(&grads).is_none()
            })
            .count();
        done.store(true, Ordering::Relaxed);
        lost
    });
    assert_eq!(lost, 0, "passes without a gradient of A");
}
