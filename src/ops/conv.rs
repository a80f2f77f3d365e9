//! Convolutions as products of the kernel with the patches of the images, for the CPU backends.
//!
//! The patches of some places are gathered into a matrix that fits a core's cache, and are multiplied at
//! once. Burn's convolutions copy whole batches into another order of dimensions instead, and on `ndarray`
//! the gradient of the input takes 30 times as long.
//!
//! An adapter's update `s·A·B` is added to the kernel before the product. That is little work, since a kernel
//! is applied at many places. The gradients of A and B need no gradient of the kernel's size.

mod node;

use burn::{
    backend::{Autodiff, autodiff::checkpoint::strategy::CheckpointStrategy},
    tensor::{DType, Tensor, backend::Backend},
};
use burn_lora_kernels::Left;
use rayon::prelude::*;

use super::{
    backend::Cpu,
    bf16::{self, Side, pack},
    operation::Operation,
    patches::Window,
    rows::{of_rows, row_by_row, rows, transposed},
};
use crate::precision::Precision;

/// The values that a convolution without groups computes with.
#[derive(Clone, Debug)]
pub(crate) struct Conv<B: Backend> {
    /// `[channels_out, channels_in, height, width]`. It is a constant if there is an adapter.
    pub kernel: Tensor<B, 4>,
    /// `[channels_out]`.
    pub bias: Option<Tensor<B, 1>>,
    /// The factors A, `[channels_in · height · width, rank]`, and B, `[rank, channels_out]`, and the scale s.
    pub adapter: Option<(Tensor<B, 2>, Tensor<B, 2>, f64)>,
    /// Vertical and horizontal, as all pairs.
    pub stride: [usize; 2],
    pub dilation: [usize; 2],
    /// At the top, left, bottom and right.
    pub padding: [usize; 4],
    pub precision: Precision,
}

/// The output of the convolution, `[batch, channels_in, height, width]` to `[batch, channels_out, height_out,
/// width_out]`. With autodiff, gradients reach the input, the bias, and either the factors or the kernel.
pub(crate) struct Convolve;

impl Operation for Convolve {
    type Input<B: Backend> = (Tensor<B, 4>, Conv<B>);
    type Output<B: Backend> = Tensor<B, 4>;

    fn forward<K: Cpu>((x, conv): &(Tensor<K, 4>, Conv<K>)) -> Option<Tensor<K, 4>> {
        Some(conv.output(x.clone(), conv.window(x)?))
    }

    fn tracked<K: Cpu, C: CheckpointStrategy>(
        (x, conv): &(Tensor<Autodiff<K, C>, 4>, Conv<Autodiff<K, C>>),
    ) -> Option<Tensor<Autodiff<K, C>, 4>> {
        Some(node::output_of(x.clone(), conv, conv.window(x)?))
    }
}

impl<B: Backend> Conv<B> {
    /// The shapes; `None` if they do not fit each other, something is empty, or not in `f32`. Burn's
    /// operations are used then, which report a wrong shape.
    fn window(&self, x: &Tensor<B, 4>) -> Option<Window> {
        let [batch, channels, height, width] = x.dims();
        let [channels_out, channels_in, kernel_height, kernel_width] = self.kernel.dims();
        if self.stride.contains(&0) || self.dilation.contains(&0) {
            return None;
        }
        let ([top, left, bottom, right], image) = (self.padding, [height, width]);
        let kernel = [kernel_height, kernel_width];
        let mut output = [0; 2];
        for (d, around) in [top + bottom, left + right].into_iter().enumerate() {
            let reach = self.dilation[d] * kernel[d].checked_sub(1)? + 1;
            output[d] = (image[d] + around).checked_sub(reach)? / self.stride[d] + 1;
        }
        let (stride, dilation, padding) = (self.stride, self.dilation, [top, left]);
        let window = Window { channels, image, kernel, stride, dilation, padding, output };

        let bias = self.bias.as_ref();
        let (a, b) = self.adapter.as_ref().map(|(a, b, _)| (a, b)).unzip();
        let in_f32 = [Some(x.dtype()), Some(self.kernel.dtype()), bias.map(Tensor::dtype)];
        let in_f32 = in_f32.into_iter().chain([a, b].map(|it| it.map(Tensor::dtype)));
        let sizes = [batch, window.volume(), channels_out, window.patch()];
        let fits = channels == channels_in
            && !sizes.contains(&0)
            && bias.is_none_or(|it| it.dims() == [channels_out])
            && in_f32.flatten().all(|dtype| dtype == DType::F32);
        fits.then_some(window)
    }
}

impl<K: Cpu> Conv<K> {
    /// The kernel with the update: `[channels_out, patch]`.
    fn matrix(&self) -> Tensor<K, 2> {
        let [channels_out, channels_in, height, width] = self.kernel.dims();
        let matrix = self.kernel.clone().reshape([channels_out, channels_in * height * width]);
        let Some((a, b, scale)) = &self.adapter else { return matrix };
        let b = b.clone().transpose().mul_scalar(*scale);
        matrix + K::product(b, a.clone().transpose())
    }

    /// The output of the convolution of x.
    fn output(&self, x: Tensor<K, 4>, window: Window) -> Tensor<K, 4> {
        let ([batch, ..], device) = (x.dims(), x.device());
        let (matrix, channels) = (self.left(self.matrix()), self.kernel.dims()[0]);
        let bias = self.bias.clone().map(row_by_row);
        let bias = bias.as_ref().map(rows::<K>);
        let x = row_by_row(x);
        let division = window.division(batch);
        let mut y = vec![0.0; batch * channels * window.places()];
        y.par_chunks_mut(division.images * channels * window.places())
            .zip(rows::<K>(&x).par_chunks(division.images * window.volume()))
            .for_each(|(y, x)| {
                let images = x.len() / window.volume();
                let parts: Vec<_> = window.parts(division).collect();
                let products: Vec<_> = parts
                    .par_iter()
                    .map(|part| {
                        let patches = window.gather(x, part.clone());
                        let patches = matrix_of(patches, window.patch());
                        row_by_row(self.product(&matrix, &patches, Side::Plain))
                    })
                    .collect();
                for (part, product) in parts.iter().zip(&products) {
                    let values = rows::<K>(product).chunks_exact(part.len() * window.output[1]);
                    let lines = window.lines(images, channels, part).zip(values);
                    for (index, (line, values)) in lines.enumerate() {
                        let bias = bias.map_or(0.0, |bias| bias[index / images]);
                        y[line].iter_mut().zip(values).for_each(|(y, value)| *y = value + bias);
                    }
                }
            });
        let [height, width] = window.output;
        of_rows(y, [batch, channels, height, width], &device)
    }
}

/// The gradients of a convolution's parameters: of the kernel, of the bias, and of the factors A and B. The
/// first is `[channels_out, patch]`, the others have the shapes `[channels_out, 1]`, `[rank, patch]` and
/// `[rank, channels_out]`.
type Gradients<K> = [Option<Tensor<K, 2>>; 4];

impl<K: Cpu> Conv<K> {
    /// The gradient of x, if `x_wanted`, and those of the parameters, each if it is `wanted`, from the
    /// output's gradient `dy`. The input `x` is needed for all but those of x and the bias.
    fn gradients(
        &self,
        x: Option<Tensor<K, 4>>,
        dy: Tensor<K, 4>,
        window: Window,
        x_wanted: bool,
        wanted: [bool; 4],
    ) -> (Option<Tensor<K, 4>>, Gradients<K>) {
        let ([batch, channels, ..], device) = (dy.dims(), dy.device());
        let (dy, x) = (row_by_row(dy), x.map(row_by_row));
        let (dy, x) = (rows::<K>(&dy), x.as_ref().map(rows::<K>));
        let mut dx = x_wanted.then(|| vec![0.0; batch * window.volume()]);
        let matrix = self.left(transposed(self.matrix()));

        // Each thread has a share of the images, and adds up the gradients of the parameters by itself.
        let share = batch.div_ceil(rayon::current_num_threads());
        let division = window.division(batch);
        let (places, volume) = (channels * window.places(), window.volume());
        let pixels = dx.as_mut().map(|dx| dx.chunks_mut(share * volume));
        let mut pixels = pixels.into_iter().flatten();
        let shares = dy.chunks(share * places).enumerate();
        let shares: Vec<_> = shares.map(|(index, dy)| (index, dy, pixels.next())).collect();
        let sums = shares.into_par_iter().map(|(index, dy, mut dx)| {
            let x = x.map(|x| &x[index * share * volume..]);
            let mut sums = [const { None }; 4];
            for (first, dy) in
                (0..).step_by(division.images).zip(dy.chunks(division.images * places))
            {
                let images = dy.len() / places;
                let pixels = first * volume..(first + images) * volume;
                for part in window.parts(division) {
                    let dy = matrix_of::<K>(window.take(dy, images, channels, &part), channels);
                    if let Some(dx) = &mut dx {
                        let product = row_by_row(self.product(&matrix, &dy, Side::Plain));
                        window.scatter(rows::<K>(&product), &mut dx[pixels.clone()], part.clone());
                    }
                    let patches = x.map(|x| window.gather(&x[pixels.clone()], part));
                    let patches = patches.map(|it| matrix_of(it, window.patch()));
                    add(&mut sums, self.of_parameters(patches, dy, wanted));
                }
            }
            sums
        });
        let sums = sums.collect::<Vec<_>>().into_iter().reduce(|mut sum, other| {
            add(&mut sum, other);
            sum
        });
        let shape = [batch, window.channels, window.image[0], window.image[1]];
        let dx = dx.map(|dx| of_rows(dx, shape, &device));
        (dx, sums.expect("the batch is not empty"))
    }

    /// The gradients of the parameters at some places, from the patches P there. With the hidden values
    /// `h = s·Aᵀ·P`:
    ///
    /// ```text
    /// dW = dy·Pᵀ        dh = s·(B·dy)        dAᵀ = dh·Pᵀ        dB = h·dyᵀ
    /// ```
    fn of_parameters(
        &self,
        patches: Option<Tensor<K, 2>>,
        dy: Tensor<K, 2>,
        [kernel, bias, a, b]: [bool; 4],
    ) -> Gradients<K> {
        let d_bias = bias.then(|| dy.clone().sum_dim(1));
        let Some(patches) = patches else { return [None, d_bias, None, None] };
        let transposed = patches.clone().transpose();
        let d_kernel =
            kernel.then(|| self.product(&self.left(dy.clone()), &patches, Side::Transposed));
        let Some((factor_a, factor_b, scale)) = &self.adapter else {
            return [d_kernel, d_bias, None, None];
        };
        let d_a = a.then(|| {
            let d_hidden = K::product(factor_b.clone(), dy.clone()).mul_scalar(*scale);
            K::product(d_hidden, transposed)
        });
        let d_b = b.then(|| {
            let hidden = K::product(factor_a.clone().transpose(), patches).mul_scalar(*scale);
            K::product(hidden, dy.transpose())
        });
        [d_kernel, d_bias, d_a, d_b]
    }
}

/// The left factor of a product.
enum LeftFactor<K: Cpu> {
    Full(Tensor<K, 2>),
    Bf16(Left),
}

impl<K: Cpu> Conv<K> {
    /// The matrix, in the form in which it is multiplied.
    fn left(&self, matrix: Tensor<K, 2>) -> LeftFactor<K> {
        match self.precision {
            Precision::F32 => LeftFactor::Full(matrix),
            Precision::Bf16 => LeftFactor::Bf16(pack(matrix)),
        }
    }

    fn product(&self, left: &LeftFactor<K>, right: &Tensor<K, 2>, side: Side) -> Tensor<K, 2> {
        match (left, side) {
            (LeftFactor::Full(left), Side::Plain) => K::product(left.clone(), right.clone()),
            (LeftFactor::Full(left), Side::Transposed) => {
                K::product(left.clone(), right.clone().transpose())
            }
            (LeftFactor::Bf16(left), side) => bf16::product(left, right, side),
        }
    }
}

fn add<K: Cpu>(sums: &mut Gradients<K>, others: Gradients<K>) {
    for (sum, other) in sums.iter_mut().zip(others) {
        *sum = match (sum.take(), other) {
            (Some(sum), Some(other)) => Some(sum + other),
            (sum, other) => sum.or(other),
        };
    }
}

fn matrix_of<K: Cpu>(elements: Vec<f32>, height: usize) -> Tensor<K, 2> {
    let width = elements.len() / height;
    of_rows(elements, [height, width], &Default::default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{run, testing::test_on_each_backend};

    fn is_one_operation<B: Backend>() -> bool {
        let device = B::Device::default();
        let kernel = Tensor::<B, 4>::ones([3, 2, 2, 2], &device);
        let (bias, adapter, padding) = (None, None, [0; 4]);
        let (stride, dilation, precision) = ([1; 2], [1; 2], Precision::F32);
        let conv = Conv { kernel, bias, adapter, stride, dilation, padding, precision };
        run::<Convolve, B>(&(Tensor::ones([2, 2, 4, 5], &device), conv)).is_some()
    }

    test_on_each_backend!(is_one_operation);
}
