//! Small helpers for tensors: precision, whether gradients reach them, their shape, and Burn's primitives.

use burn::{
    module::Param,
    tensor::{DType, FloatDType, Tensor, TensorPrimitive, backend::Backend, ops::FloatTensor},
};

/// The tensor in another precision. Gradients are cast back.
pub(crate) fn cast<B: Backend, const D: usize>(tensor: Tensor<B, D>, dtype: DType) -> Tensor<B, D> {
    if tensor.dtype() == dtype { tensor } else { tensor.cast(FloatDType::from(dtype)) }
}

/// The tensor, cast to `f32` if it is in half precision. Merging in half precision would round twice.
pub(crate) fn at_least_f32<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Tensor<B, D> {
    match tensor.dtype() {
        DType::F16 | DType::BF16 => tensor.cast(FloatDType::F32),
        _ => tensor,
    }
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
pub(crate) fn trainable<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Param<Tensor<B, D>> {
    Param::from_tensor(tensor.detach())
}

/// The tensor as a constant. `detach` alone is not enough, because Burn keeps the `require_grad` flag of
/// a detached tensor.
pub(crate) fn constant<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Tensor<B, D> {
    tensor.detach().set_require_grad(false)
}

/// The parameter's value as a constant.
pub(crate) fn frozen<B: Backend, const D: usize>(param: &Param<Tensor<B, D>>) -> Tensor<B, D> {
    constant(param.val())
}

/// `Tensor::cat` of several tensors, along `dim`. Burn drops them before it has noted what became of
/// them. If another thread goes backward just then, it clears away the operations that made them, and
/// their gradients are lost. Here they are held until the end.
pub(crate) fn cat<B: Backend, const D: usize>(
    tensors: &[Tensor<B, D>],
    dim: usize,
) -> Tensor<B, D> {
    Tensor::cat(tensors.to_vec(), dim)
}

/// The tensor with its last two dimensions swapped. Where no element moves, it is reshaped: Burn's wgpu
/// backend later reshapes a transposed vector wrongly.
pub(crate) fn transposed<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Tensor<B, D> {
    let mut shape = tensor.dims();
    if shape[D - 2] != 1 && shape[D - 1] != 1 {
        return tensor.swap_dims(D - 2, D - 1);
    }
    shape.swap(D - 2, D - 1);
    tensor.reshape(shape)
}

/// The same tensor under a type with `E` dimensions, where `D` and `E` are known to be equal. On some
/// backends `reshape` copies even if the shape stays.
pub(crate) fn with_rank<B: Backend, const D: usize, const E: usize>(
    tensor: Tensor<B, D>,
) -> Tensor<B, E> {
    assert!(D == E, "a tensor of {D} dimensions cannot have {E}");
    Tensor::from_primitive(tensor.into_primitive())
}

/// The tensor with this primitive.
pub(crate) fn tensor<B: Backend, const D: usize>(primitive: FloatTensor<B>) -> Tensor<B, D> {
    Tensor::from_primitive(TensorPrimitive::Float(primitive))
}

/// The primitive of the tensor.
pub(crate) fn primitive<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> FloatTensor<B> {
    tensor.into_primitive().tensor()
}
