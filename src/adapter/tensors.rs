//! Precision, and whether gradients reach a tensor.

use burn::{
    module::Param,
    tensor::{DType, FloatDType, Tensor, backend::Backend},
};

/// The tensor in another precision. Gradients are cast back.
pub(super) fn cast<B: Backend, const D: usize>(tensor: Tensor<B, D>, dtype: DType) -> Tensor<B, D> {
    if tensor.dtype() == dtype { tensor } else { tensor.cast(FloatDType::from(dtype)) }
}

/// The output of the base plus the adapter's update. If the base is in another precision than the
/// adapter, the sum is formed in the adapter's, and returned in the base's, as in PEFT.
pub(crate) fn add<B: Backend, const D: usize>(
    base: Tensor<B, D>,
    update: Tensor<B, D>,
) -> Tensor<B, D> {
    let dtype = base.dtype();
    cast(cast(base, update.dtype()) + update, dtype)
}

/// The tensor as a trainable parameter. `detach` makes it a leaf of the autodiff graph.
pub(super) fn trainable<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Param<Tensor<B, D>> {
    Param::from_tensor(tensor.detach())
}

/// The tensor as a constant. `detach` alone is not enough, because Burn keeps the `require_grad` flag of
/// a detached tensor.
pub(super) fn constant<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Tensor<B, D> {
    tensor.detach().set_require_grad(false)
}

/// The parameter's value as a constant.
pub(crate) fn frozen<B: Backend, const D: usize>(param: &Param<Tensor<B, D>>) -> Tensor<B, D> {
    constant(param.val())
}

/// The tensor, cast to `f32` if it is in half precision. Merging in half precision would round twice.
pub(crate) fn at_least_f32<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Tensor<B, D> {
    match tensor.dtype() {
        DType::F16 | DType::BF16 => tensor.cast(FloatDType::F32),
        _ => tensor,
    }
}
