//! Convolutions of sizes at which the CPU backends divide their work: many images at once, and parts of
//! one; with an adapter, and without one, where the kernel trains.

use burn::{
    module::Param,
    nn::{
        PaddingConfig2d,
        conv::{Conv2d, Conv2dConfig},
    },
    tensor::{Tensor, backend::Backend},
};
use burn_lora::{LoraAdapter, Scaling, nn::LoraConv2d};

use crate::{
    model::{Plain, Train, device},
    oracle::{Matrix, Problem, assert_close},
};

const TOLERANCE: f64 = 2e-5;
const ALPHA: f64 = 0.7;
const RANK: usize = 3;

/// The images and the kernel of a convolution.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    /// Channels, in and out.
    channels: [usize; 2],
    image: [usize; 2],
    kernel: [usize; 2],
    stride: [usize; 2],
    /// Top, left, bottom, right.
    padding: [usize; 4],
}

const SIZES: [Sizes; 4] = [
    // Several images at once, and a last part with fewer.
    Sizes {
        batch: 11,
        channels: [20, 7],
        image: [21, 24],
        kernel: [3, 3],
        stride: [1, 1],
        padding: [1, 1, 1, 1],
    },
    // The rows of one image in several parts, the last of which has fewer.
    Sizes {
        batch: 2,
        channels: [64, 5],
        image: [23, 40],
        kernel: [3, 3],
        stride: [1, 1],
        padding: [1, 0, 1, 2],
    },
    // Rows too wide to have two at once.
    Sizes {
        batch: 1,
        channels: [8, 4],
        image: [5, 9000],
        kernel: [2, 3],
        stride: [2, 2],
        padding: [0, 1, 0, 1],
    },
    // Each pixel by itself.
    Sizes {
        batch: 3,
        channels: [40, 30],
        image: [9, 7],
        kernel: [1, 1],
        stride: [1, 1],
        padding: [0; 4],
    },
];

impl Sizes {
    fn output(&self) -> [usize; 2] {
        [0, 1].map(|d| {
            let padded = self.image[d] + self.padding[d] + self.padding[d + 2];
            (padded - self.kernel[d]) / self.stride[d] + 1
        })
    }

    fn places(&self) -> usize {
        self.output()[0] * self.output()[1]
    }

    fn patch(&self) -> usize {
        self.channels[0] * self.kernel[0] * self.kernel[1]
    }

    /// The pixel that an element of the kernel reads at a place of an image, unless it is padding.
    fn pixel(&self, place: usize, element: usize) -> Option<usize> {
        let [height, width] = self.image;
        let [kernel_height, kernel_width] = self.kernel;
        let at = [place / self.output()[1], place % self.output()[1]];
        let channel = element / (kernel_height * kernel_width);
        let within = [element / kernel_width % kernel_height, element % kernel_width];
        let pixel = |d: usize| (at[d] * self.stride[d] + within[d]).checked_sub(self.padding[d]);
        let (y, x) = (pixel(0)?, pixel(1)?);
        (y < height && x < width).then_some((channel * height + y) * width + x)
    }

    /// The patches at all places as rows, for the images in the rows of `images`.
    fn patches(&self, images: &Matrix) -> Matrix {
        Matrix::from_fn(self.batch * self.places(), self.patch(), |row, element| {
            let (image, place) = (row / self.places(), row % self.places());
            self.pixel(place, element).map_or(0.0, |pixel| images.at(image, pixel))
        })
    }

    /// The images' gradient for that of the patches.
    fn gathered(&self, patches: &Matrix) -> Matrix {
        let [height, width] = self.image;
        let mut images = Matrix::from_fn(self.batch, self.channels[0] * height * width, |_, _| 0.0);
        for row in 0..patches.rows {
            let (image, place) = (row / self.places(), row % self.places());
            for element in 0..patches.cols {
                if let Some(pixel) = self.pixel(place, element) {
                    images.data[image * images.cols + pixel] += patches.at(row, element);
                }
            }
        }
        images
    }

    /// Images whose values are the rows of `places`: a row per place.
    fn images_of(&self, places: &Matrix) -> Matrix {
        Matrix::from_fn(self.batch, places.cols * self.places(), |image, at| {
            let (channel, place) = (at / self.places(), at % self.places());
            places.at(image * self.places() + place, channel)
        })
    }

    fn input<B: Backend>(&self, images: &Matrix) -> Tensor<B, 4> {
        let [height, width] = self.image;
        images.tensor([self.batch, self.channels[0], height, width], &device::<B>())
    }

    fn layer<B: Backend>(&self, problem: &Problem) -> LoraConv2d<B> {
        let [channels_in, channels_out] = self.channels;
        let [top, left, bottom, right] = self.padding;
        let base: Conv2d<B> = Conv2dConfig::new([channels_in, channels_out], self.kernel)
            .with_stride(self.stride)
            .with_padding(PaddingConfig2d::Explicit(top, left, bottom, right))
            .init(&device::<B>());
        let [height, width] = self.kernel;
        let shape = [channels_out, channels_in, height, width];
        let weight = problem.w.transpose().tensor(shape, &device::<B>());
        let bias = problem.bias.as_ref().unwrap().tensor([channels_out], &device::<B>());
        let (weight, bias) = (Param::from_tensor(weight), Some(Param::from_tensor(bias)));
        LoraConv2d::from(Conv2d { weight, bias, ..base })
    }

    fn adapter<B: Backend>(&self, problem: &Problem) -> LoraAdapter<B> {
        let a = problem.a.tensor([self.patch(), RANK], &device::<B>());
        let b = problem.b.tensor([RANK, self.channels[1]], &device::<B>());
        LoraAdapter::new(a, b, ALPHA, Scaling::Alpha)
    }
}

/// Images, and the layer as a matrix that multiplies their patches.
fn problem(sizes: &Sizes, adapter: bool) -> (Matrix, Problem) {
    let ([channels_in, channels_out], [height, width]) = (sizes.channels, sizes.image);
    let images = Matrix::random(sizes.batch, channels_in * height * width, 1);
    // Of such a size that outputs are about 1, where a sine is not flat.
    let small = |matrix: Matrix| matrix.map(|it| f64::from((it * 0.1) as f32));
    let problem = Problem {
        x: sizes.patches(&images),
        w: small(Matrix::random(sizes.patch(), channels_out, 2)),
        bias: Some(Matrix::random(1, channels_out, 3)),
        a: small(Matrix::random(sizes.patch(), RANK, 4)),
        b: Matrix::random(RANK, channels_out, 5),
        adapter_bias: None,
        scale: if adapter { ALPHA } else { 0.0 },
    };
    (images, problem)
}

#[test]
fn outputs_and_gradients_with_an_adapter() {
    for sizes in SIZES {
        let (images, problem) = problem(&sizes, true);
        let (y, expected) = (sizes.images_of(&problem.output()), problem.gradients());
        let mut plain = sizes.layer::<Plain>(&problem);
        plain.set_adapter(Some(sizes.adapter(&problem)));
        assert_close(plain.forward(sizes.input(&images)), &y, TOLERANCE);

        let mut layer = sizes.layer::<Train>(&problem);
        layer.set_adapter(Some(sizes.adapter(&problem)));
        let x = sizes.input::<Train>(&images).require_grad();
        let output = layer.forward(x.clone());
        assert_close(output.clone(), &y, TOLERANCE);
        let grads = output.sin().sum().backward();
        let adapter = layer.adapter().unwrap();
        assert_close(adapter.a.grad(&grads).unwrap(), &expected.a, TOLERANCE);
        assert_close(adapter.b.grad(&grads).unwrap(), &expected.b, TOLERANCE);
        assert_close(x.grad(&grads).unwrap(), &sizes.gathered(&expected.x), TOLERANCE);
    }
}

#[test]
fn outputs_and_gradients_of_a_kernel_that_trains() {
    for sizes in SIZES {
        let (images, problem) = problem(&sizes, false);
        let layer = sizes.layer::<Train>(&problem);
        let x = sizes.input::<Train>(&images).require_grad();
        let output = layer.forward(x.clone());
        assert_close(output.clone(), &sizes.images_of(&problem.output()), TOLERANCE);
        let grads = output.sin().sum().backward();
        let dy = problem.output().map(f64::cos);
        let kernel = layer.base.weight.grad(&grads).unwrap();
        assert_close(kernel, &dy.transpose().times(&problem.x), TOLERANCE);
        let bias = layer.base.bias.unwrap().grad(&grads).unwrap();
        assert_close(bias, &dy.sum_rows(), TOLERANCE);
        let dx = sizes.gathered(&problem.gradients().x);
        assert_close(x.grad(&grads).unwrap(), &dx, TOLERANCE);
    }
}
