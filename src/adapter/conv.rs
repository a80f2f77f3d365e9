//! The low-rank update of a convolution.

use burn::tensor::{Tensor, backend::Backend};

use super::{LoraAdapter, WeightLayout};
use crate::tensors::cast;

impl<B: Backend> LoraAdapter<B> {
    /// The update of the output of a convolution: `[batch, channels_in, ..]` to
    /// `[batch, channels_out, ..]`. `times_a` multiplies each patch of x with A, which gives
    /// `[batch, groups · rank, ..]`. B is then applied at each position.
    pub(crate) fn forward_conv<const D: usize>(
        &self,
        x: Tensor<B, D>,
        groups: usize,
        times_a: impl FnOnce(Tensor<B, D>, Tensor<B, 2>) -> Tensor<B, D>,
    ) -> Tensor<B, D> {
        let x = cast(x, self.a.dtype());
        let [a, b] = self.factors();
        let ([_, rank], [_, columns]) = (a.dims(), b.dims());
        let hidden = times_a(self.dropout.forward(x), a).mul_scalar(self.scale());
        let mut shape = hidden.dims();
        let (batch, places) = (shape[0], shape[2..].iter().product::<usize>());
        // B has a column for each output channel of all groups. In a transposed convolution it has
        // only the columns of one group, and all groups share them.
        let transposed = matches!(self.layout, WeightLayout::ConvTranspose { .. });
        let b_groups = if transposed { 1 } else { groups };
        shape[1] = groups * columns / b_groups;
        // Reshaped before it is permuted: Burn's wgpu backend reshapes a transposed vector wrongly.
        let b = b.reshape([1, rank, b_groups, columns / b_groups]);
        let b = b.permute([0, 2, 3, 1]);
        let mut y = b.matmul(hidden.reshape([batch, groups, rank, places]));
        if let Some(bias) = self.bias_delta() {
            y = y + bias.reshape([1, b_groups, columns / b_groups, 1]);
        }
        y.reshape(shape)
    }
}
