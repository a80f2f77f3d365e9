//! Which side of a quantized weight a layer reads from.

use burn::tensor::{Tensor, backend::Backend};

use crate::{
    adapter::WeightLayout,
    quantized::{Quantization, QuantizedWeight},
    tensors::transposed,
};

/// The shape of a layer's weight, `[d_input, d_output]`.
pub(crate) fn shape<B: Backend>(weight: &QuantizedWeight<B>, layout: &WeightLayout) -> [usize; 2] {
    let [rows, columns] = weight.shape();
    if is_table(layout) { [rows, columns] } else { [columns, rows] }
}

/// A layer's weight, unpacked: `[d_input, d_output]`.
pub(crate) fn matrix<B: Backend>(
    weight: &QuantizedWeight<B>,
    layout: &WeightLayout,
) -> Tensor<B, 2> {
    if is_table(layout) { weight.dense() } else { transposed(weight.dense()) }
}

/// The weight `[d_input, d_output]` of a layer, rounded.
pub(crate) fn rounded<B: Backend>(
    matrix: Tensor<B, 2>,
    layout: &WeightLayout,
    to: Quantization,
) -> QuantizedWeight<B> {
    QuantizedWeight::new(if is_table(layout) { matrix } else { transposed(matrix) }, to)
}

/// Whether a row is what is looked up, and not what an output is computed from.
fn is_table(layout: &WeightLayout) -> bool {
    *layout == WeightLayout::Embedding
}
