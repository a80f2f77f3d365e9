//! What Burn 0.21 gets wrong, and what this crate does about it.
//!
//! The tests below show the faults that a CPU backend has, and fail once Burn has removed one: the way around it can go
//! then. Those on GPUs have to be tried there.
//!
//! | what was observed | where | the way around it | when it can go |
//! |---|---|---|---|
//! | an operation in place changes memory that another thread is about to read, as burn-train does with a checkpoint | GPU backends | [`unshared`], [`unshared_record`] | a resumed training on a GPU comes to the same bits without them (`tests/suite/resuming.rs`) |
//! | the gradient of `repeat_dim` is in the wrong order | autodiff | [`repeated`] | `the_gradient_of_repeat_dim_is_still_wrong` |
//! | until a weight in the column layout is initialized, its `lazy_shape` is the transpose | all | `shape` is asked for, which draws the values | `the_lazy_shape_of_a_column_layout_is_still_transposed` |
//! | a detached tensor keeps its `require_grad` flag | autodiff | `detach().set_require_grad(false)` | `a_detached_tensor_still_keeps_its_flag` |
//! | some operations on empty tensors panic | flex and others | layers return before them | `tests/suite/empty.rs` passes without |
//! | `Tensor::cat` drops its inputs before it has noted what became of them, so that a backward pass on another thread clears away their gradients | autodiff | a `cat` that holds them | the tests of `tests/suite/replicas.rs` pass many times with Burn's |
//! | a transposed vector is later reshaped wrongly | wgpu | vectors are reshaped, not transposed | the suite passes on wgpu with transposes |
//! | the running statistics of a batch norm are shared between clones, and move in passes of frozen models | all | `traverse::statistics`, and errors where they would be put on | a clone's statistics stay when the original's move |

use burn::{
    module::Param,
    record::{DoublePrecisionSettings, Record},
    tensor::{Tensor, backend::Backend},
};

/// The parameter in memory of its own, for a record that another thread reads.
pub(crate) fn unshared<B: Backend, const D: usize>(
    param: Param<Tensor<B, D>>,
) -> Param<Tensor<B, D>> {
    let (id, value, mapper) = param.consume();
    let options = (&value.device(), value.dtype());
    let value = Tensor::from_data(value.to_data(), options);
    Param::from_mapped_value(id, value, mapper)
}

/// The record in memory of its own, on the default device.
pub(crate) fn unshared_record<B: Backend, R: Record<B>>(record: R) -> R {
    let device = B::Device::default();
    R::from_item::<DoublePrecisionSettings>(record.into_item(), &device)
}

/// The tensor `times` times, one after the other along the first dimension.
pub(crate) fn repeated<B: Backend, const D: usize>(
    tensor: Tensor<B, D>,
    times: usize,
) -> Tensor<B, D> {
    if times == 1 { tensor } else { Tensor::cat(vec![tensor.clone(); times], 0) }
}

#[cfg(test)]
mod tests {
    use burn::{
        backend::{Autodiff, Flex},
        nn::{LinearConfig, LinearLayout},
        tensor::Device,
    };

    use super::*;

    type Train = Autodiff<Flex>;

    #[test]
    fn the_gradient_of_repeat_dim_is_still_wrong() {
        let device: Device<Train> = Default::default();
        let gradient = |repeat: &dyn Fn(Tensor<Train, 2>) -> Tensor<Train, 2>| {
            let x = Tensor::<Train, 2>::ones([2, 1], &device).require_grad();
            let weights = Tensor::<Train, 2>::from_data([[1.0], [2.0], [4.0], [8.0]], &device);
            let grads = (repeat(x.clone()) * weights).sum().backward();
            x.grad(&grads).unwrap().into_data().to_vec::<f32>().unwrap()
        };
        assert_eq!(gradient(&|x| repeated(x, 2)), [5.0, 10.0]);
        assert_ne!(gradient(&|x| x.repeat_dim(0, 2)), [5.0, 10.0]);
    }

    #[test]
    fn the_lazy_shape_of_a_column_layout_is_still_transposed() {
        let config = LinearConfig::new(2, 3).with_layout(LinearLayout::Col);
        let weight = config.init::<Flex>(&Default::default()).weight;
        assert_eq!(weight.lazy_shape().to_vec(), [3, 2]);
        assert_eq!(weight.shape().to_vec(), [2, 3]);
    }

    #[test]
    fn a_detached_tensor_still_keeps_its_flag() {
        let tensor = Tensor::<Train, 1>::ones([1], &Default::default()).require_grad();
        assert!(tensor.detach().is_require_grad());
    }
}
