//! What Burn 0.21 gets wrong, and what this crate does about it.
//!
//! The tests below show the faults that a CPU backend has, and fail once Burn has removed one: the way around it can go
//! then. Those on GPUs have to be tried there.
//!
//! - **Memory that another thread is about to read is changed in place**, as that of a checkpoint, which burn-train
//!   reads while the training goes on. On GPUs. Way around it: [`unshared`], [`unshared_record`]. It can go when a
//!   training that is resumed on a GPU comes to the same bits without it (`examples/tests/suite/resuming.rs`).
//! - **The gradient of `repeat_dim` is in the wrong order.** With autodiff. Way around it: [`repeated`]. It can go
//!   when `the_gradient_of_repeat_dim_is_still_wrong` fails.
//! - **The `lazy_shape` of a weight in the column layout is the transpose**, until the weight is initialized. On all
//!   backends. Way around it: `shape`, which draws the values. It can go when
//!   `the_lazy_shape_of_a_column_layout_is_still_transposed` fails.
//! - **A detached tensor keeps its `require_grad` flag.** With autodiff. Way around it:
//!   `detach().set_require_grad(false)`. It can go when `a_detached_tensor_still_keeps_its_flag` fails.
//! - **Some operations on empty tensors panic.** On flex and others. Way around it: layers return before them. It can
//!   go when `tests/suite/empty.rs` passes without.
//! - **`Tensor::cat` drops its inputs before it has noted what became of them**, so that a backward pass on another
//!   thread clears away their gradients. With autodiff. Way around it: a `cat` of this crate that holds them. It can
//!   go when the tests with workers (`tests/suite/steps.rs`) pass many times with Burn's.
//! - **A transposed vector is reshaped wrongly later.** On wgpu. Way around it: vectors are reshaped and not
//!   transposed. It can go when the suite passes on wgpu with transposes.
//! - **Clones share the running statistics of a batch norm**, which move in passes of frozen models, too. With
//!   autodiff. Way around it: `nn::BatchNorm`, `Lora::with_own_statistics`, and an error without either. It can go
//!   when `clones_still_share_running_statistics` fails.

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
        module::Module,
        nn::{BatchNormConfig, LinearConfig, LinearLayout},
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
    fn clones_still_share_running_statistics() {
        let device: Device<Train> = Default::default();
        let norm = BatchNormConfig::new(1).init::<Train>(&device);
        let clone = norm.clone().no_grad();
        let _ = clone.forward(Tensor::<Train, 2>::from_data([[1.0], [2.0]], &device));
        let _ = clone.running_mean.value_sync();
        assert!(norm.running_mean.value().into_scalar() > 0.1);
    }

    #[test]
    fn a_detached_tensor_still_keeps_its_flag() {
        let tensor = Tensor::<Train, 1>::ones([1], &Default::default()).require_grad();
        assert!(tensor.detach().is_require_grad());
    }
}
