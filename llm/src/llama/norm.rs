//! The norms of a decoder.

use burn::{
    module::{Param, ParamId},
    nn::RmsNorm,
    tensor::{Tensor, backend::Backend},
};
use burn_lora::nn::rms_norm;

use crate::config::Design;

/// Each vector divided by its root mean square, times the weight, or 1 plus it.
pub(super) fn norm<B: Backend, const D: usize>(
    norm: &RmsNorm<B>,
    design: &Design,
    x: Tensor<B, D>,
) -> Tensor<B, D> {
    if !design.norms_add_one {
        return rms_norm(norm, x);
    }
    let gamma = Param::initialized(ParamId::new(), norm.gamma.val() + 1.0);
    rms_norm(&RmsNorm { gamma, epsilon: norm.epsilon }, x)
}
