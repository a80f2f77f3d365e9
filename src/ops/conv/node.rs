//! The convolution as one node of the autodiff graph.

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
    tensor::Tensor,
};

use super::Conv;
use crate::{
    ops::{
        autodiff::{inner, nothing, output, parents, register},
        backend::Cpu,
        patches::Window,
        rows::transposed,
    },
    tensors::{primitive, tensor},
};

#[derive(Debug)]
struct ConvNode;

/// The values that the gradients are computed from. Only x, which the checkpointer keeps, grows with the
/// batch.
#[derive(Clone, Debug)]
struct State<K: Cpu> {
    /// The node of x. It is kept only for the gradients of the kernel and the factors.
    x: Option<NodeId>,
    conv: Conv<K>,
    window: Window,
}

/// The parents are x, the kernel, the bias, A and B.
impl<K: Cpu> Backward<K, 5> for ConvNode {
    type State = State<K>;

    fn backward(
        self,
        ops: Ops<Self::State, 5>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let parents = parents(&ops);
        let State { x, conv, window } = ops.state;
        let x = x.map(|x| tensor(checkpointer.retrieve_node_output(x)));
        let dy = tensor(grads.consume::<K>(&ops.node));
        let [x_wanted, wanted @ ..] = parents.map(|it| it.is_some());
        let shape = conv.kernel.shape();
        let (dx, [d_kernel, d_bias, d_a, d_b]) = conv.gradients(x, dy, window, x_wanted, wanted);
        let gradients = [
            dx.map(primitive),
            d_kernel.map(|it| primitive(it.reshape::<4, _>(shape))),
            d_bias.map(|it| primitive(it.flatten::<1>(0, 1))),
            d_a.map(|it| primitive(transposed(it))),
            d_b.map(primitive),
        ];
        register::<K, 5>(grads, parents, gradients);
    }
}

/// The output of the convolution of x.
pub(super) fn output_of<K: Cpu, C: CheckpointStrategy>(
    x: Tensor<Autodiff<K, C>, 4>,
    conv: &Conv<Autodiff<K, C>>,
    window: Window,
) -> Tensor<Autodiff<K, C>, 4> {
    let pair = conv.adapter.as_ref();
    let plain = Conv {
        kernel: inner(&conv.kernel),
        bias: conv.bias.as_ref().map(inner),
        adapter: pair.map(|(a, b, scale)| (inner(a), inner(b), *scale)),
        stride: conv.stride,
        dilation: conv.dilation,
        padding: conv.padding,
        precision: conv.precision,
    };
    let y = plain.output(inner(&x), window);

    let (x, kernel) = (primitive(x), primitive(conv.kernel.clone()));
    let bias = conv.bias.clone().map(primitive);
    let [a, b] = [pair.map(|it| &it.0), pair.map(|it| &it.1)].map(|it| it.cloned().map(primitive));
    let reads_x = kernel.is_tracked() || [&a, &b].into_iter().flatten().any(|it| it.is_tracked());
    let none = nothing::<K, C>();
    let [bias, a, b] = [&bias, &a, &b].map(|it| it.as_ref().unwrap_or(&none));
    output(ConvNode, [&x, &kernel, bias, a, b], y, |prep| {
        let x = reads_x.then(|| prep.checkpoint(&x));
        State { x, conv: plain, window }
    })
}
