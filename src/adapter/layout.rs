//! How layers store their weights, and how an adapter sees the weights as matrices.

use burn::tensor::{Tensor, backend::Backend};

use crate::tensors::{transposed, with_rank};

/// How a layer stores the weight that its adapter sees as a matrix `[d_input, d_output]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum WeightLayout {
    /// Not known: of an adapter that was put together by hand, and was on no layer yet.
    Unknown,
    /// As the matrix itself, `[d_input, d_output]`, like [`Linear`](burn::nn::Linear). A weight with
    /// more dimensions is seen as `[first, all others]`.
    Matrix,
    /// As the kernel of a convolution, `[d_output, channels_in / groups, ..kernel]`. The matrix has
    /// `d_input = channels_in / groups · kernel` rows.
    Conv {
        /// The kernel's size, per spatial dimension.
        kernel: Vec<usize>,
        /// The number of groups of channels; 1 if it is not known.
        groups: usize,
    },
    /// As the kernel of a transposed convolution, `[channels_in, d_output, ..kernel]`, where
    /// `d_output = channels_out / groups`. The matrix has `d_input = channels_in · kernel` rows.
    ConvTranspose {
        /// The kernel's size, per spatial dimension.
        kernel: Vec<usize>,
    },
    /// As a table of embeddings, `[d_input, d_output]`, from which the input selects rows. An adapter
    /// starts with A at zero and B at random, so that a lookup in training changes only its own rows.
    Embedding,
}

impl WeightLayout {
    /// The shape of the matrix, `[d_input, d_output]`, for a weight of shape `dims`.
    pub fn matrix_shape(&self, dims: &[usize]) -> [usize; 2] {
        let rest = |dims: &[usize]| dims.iter().product::<usize>();
        match self {
            Self::Unknown | Self::Matrix | Self::Embedding => [dims[0], rest(&dims[1..])],
            Self::Conv { .. } => [rest(&dims[1..]), dims[0]],
            Self::ConvTranspose { .. } => [dims[0] * rest(&dims[2..]), dims[1]],
        }
    }

    /// The weight as a matrix.
    pub fn to_matrix<B: Backend, const D: usize>(&self, weight: Tensor<B, D>) -> Tensor<B, 2> {
        let dims = weight.dims();
        let [d_input, d_output] = self.matrix_shape(&dims);
        match self {
            Self::Unknown | Self::Matrix | Self::Embedding if D == 2 => with_rank(weight),
            Self::Unknown | Self::Matrix | Self::Embedding => weight.reshape([d_input, d_output]),
            Self::Conv { .. } => transposed(weight.reshape([d_output, d_input])),
            Self::ConvTranspose { .. } => {
                let places = d_input / dims[0];
                transposed(weight.reshape([dims[0], d_output, places])).reshape([d_input, d_output])
            }
        }
    }

    /// The matrix as a weight of shape `dims`.
    pub fn to_weight<B: Backend, const D: usize>(
        &self,
        matrix: Tensor<B, 2>,
        dims: [usize; D],
    ) -> Tensor<B, D> {
        let [d_input, d_output] = matrix.dims();
        match self {
            Self::Unknown | Self::Matrix | Self::Embedding if D == 2 => with_rank(matrix),
            Self::Unknown | Self::Matrix | Self::Embedding => matrix.reshape(dims),
            // Reshaped last, so that it is not a permuted view: of such kernels Burn's wgpu backend
            // computes wrong gradients of the input.
            Self::Conv { .. } => transposed(matrix.reshape([1, d_input, d_output])).reshape(dims),
            Self::ConvTranspose { .. } => {
                transposed(matrix.reshape([dims[0], d_input / dims[0], d_output])).reshape(dims)
            }
        }
    }

    /// Why PEFT's files cannot hold an adapter with this layout; `None` if they can.
    pub fn not_in_peft(&self) -> Option<&'static str> {
        match self {
            Self::Conv { groups, .. } if *groups > 1 => {
                Some("its convolution has groups, for which PEFT computes a different update")
            }
            Self::ConvTranspose { .. } => Some("PEFT has no adapters of transposed convolutions"),
            _ => None,
        }
    }

    /// Whether an adapter with this layout can be put on a layer with the layout `layer`. A plain matrix, and what is
    /// not known, fits every layout, and the number of groups does not matter.
    pub fn fits(&self, layer: &Self) -> bool {
        match (self, layer) {
            (Self::Unknown | Self::Matrix, _) => true,
            (Self::Conv { kernel, .. }, Self::Conv { kernel: other, .. }) => kernel == other,
            (adapter, layer) => adapter == layer,
        }
    }
}
