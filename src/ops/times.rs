//! A layer without an adapter as one operation: the product with its weight.

use burn::{
    backend::{
        Autodiff,
        autodiff::{
            NodeId,
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops},
        },
    },
    tensor::{DType, Tensor, backend::Backend},
};

use super::{
    autodiff::{inner, nothing, output, parents, register},
    backend::Cpu,
    bf16::{self, Side, pack},
    operation::Operation,
    pool::in_pool,
    rows::transposed,
    weight::plain,
};
use crate::{
    precision::Precision,
    quantized::{Matrix, Weight},
    tensors::{primitive, tensor},
};

/// `x·W`, where all is in `f32` and the weight is quantized or is multiplied in bf16: `[batch, d_input]` to `[batch,
/// d_output]`. With autodiff, gradients reach x, and a weight that trains.
pub(crate) struct TimesWeight;

impl Operation for TimesWeight {
    type Input<B: Backend> = (Tensor<B, 2>, Weight<B>);
    type Output<B: Backend> = Tensor<B, 2>;

    fn forward<K: Cpu>((x, weight): &(Tensor<K, 2>, Weight<K>)) -> Option<Tensor<K, 2>> {
        let gains = match &weight.matrix {
            Matrix::Full(_) => weight.precision == Precision::Bf16,
            Matrix::Quantized(_) => true,
        };
        let fits = x.dtype() == DType::F32 && weight.is_in_f32() && x.dims()[1] == weight.dims()[0];
        let times = || in_pool(x.dims()[0], weight.dims(), || weight.times(x.clone()));
        (gains && fits).then(times)
    }

    fn tracked<K: Cpu, C: CheckpointStrategy>(
        (x, weight): &(Tensor<Autodiff<K, C>, 2>, Weight<Autodiff<K, C>>),
    ) -> Option<Tensor<Autodiff<K, C>, 2>> {
        let values = (inner(x), plain(weight));
        let y = Self::forward::<K>(&values)?;
        let x = primitive(x.clone());
        let matrix = match &weight.matrix {
            Matrix::Full(matrix) => primitive(matrix.clone()),
            Matrix::Quantized(_) => nothing::<K, C>(),
        };
        Some(output(TimesWeightNode, [&x, &matrix], y, |prep| State {
            x: matrix.is_tracked().then(|| prep.checkpoint(&x)),
            weight: values.1,
        }))
    }
}

#[derive(Debug)]
struct TimesWeightNode;

#[derive(Clone, Debug)]
struct State<K: Cpu> {
    /// The node of x. It is kept only for the gradient of the weight.
    x: Option<NodeId>,
    weight: Weight<K>,
}

/// The parents are x and the weight: `dx = dy·Wᵀ` and `dW = xᵀ·dy`.
impl<K: Cpu> Backward<K, 2> for TimesWeightNode {
    type State = State<K>;

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let parents = parents(&ops);
        let State { x, weight } = ops.state;
        let x = x.map(|x| tensor(checkpointer.retrieve_node_output(x)));
        let dy: Tensor<K, 2> = tensor(grads.consume::<K>(&ops.node));
        let [x_wanted, _] = parents.map(|it| it.is_some());
        let gradients = in_pool(dy.dims()[0], weight.dims(), || {
            let dx = x_wanted.then(|| weight.times_transposed(dy.clone()));
            let d_weight = x.map(|x: Tensor<K, 2>| match weight.in_bf16(dy.dims()[0]) {
                true => bf16::product(&pack(transposed(x)), &dy, Side::Plain),
                false => K::product(x.transpose(), dy),
            });
            [dx, d_weight].map(|it| it.map(primitive))
        });
        register::<K, 2>(grads, parents, gradients);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ops::{run, testing::test_on_each_backend},
        quantized::{Quantization, QuantizedWeight},
    };

    fn is_one_operation<B: Backend>() -> bool {
        let device = B::Device::default();
        let ones = |shape: [usize; 2]| Tensor::<B, 2>::ones(shape, &device);
        let weights = [
            Weight::quantized(
                QuantizedWeight::new(ones([5, 3]), Quantization::Int8),
                Precision::F32,
            ),
            Weight::full(ones([3, 5]), Precision::Bf16),
        ];
        weights.into_iter().all(|it| run::<TimesWeight, B>(&(ones([2, 3]), it)).is_some())
    }

    test_on_each_backend!(is_one_operation);
}
