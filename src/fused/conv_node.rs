//! The convolution as one node of the autodiff graph.

use burn::{
    backend::{
        Autodiff,
        autodiff::{
            NodeId,
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops, OpsKind},
        },
    },
    tensor::{Tensor, TensorPrimitive},
};

use super::{
    conv::{Conv, Convolves},
    cpu::Cpu,
    node::{inner, nothing, primitive, tensor},
    patches::Window,
    rows::transposed,
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
        let State { x, conv, window } = ops.state;
        let x = x.map(|x| tensor(checkpointer.retrieve_node_output(x)));
        let dy = tensor(grads.consume::<K>(&ops.node));
        let [x_wanted, wanted @ ..] = [0, 1, 2, 3, 4].map(|parent| ops.parents[parent].is_some());
        let shape = conv.kernel.shape();
        let (dx, [d_kernel, d_bias, d_a, d_b]) = conv.gradients(x, dy, window, x_wanted, wanted);
        let gradients = [
            dx.map(primitive),
            d_kernel.map(|it| primitive(it.reshape::<4, _>(shape))),
            d_bias.map(|it| primitive(it.flatten::<1>(0, 1))),
            d_a.map(|it| primitive(transposed(it))),
            d_b.map(primitive),
        ];
        for (node, gradient) in ops.parents.into_iter().zip(gradients) {
            if let (Some(node), Some(gradient)) = (node, gradient) {
                grads.register::<K>(node.id, gradient);
            }
        }
    }
}

impl<K: Cpu, C: CheckpointStrategy> Convolves for Autodiff<K, C> {
    fn convolve(x: Tensor<Self, 4>, conv: &Conv<Self>, window: Window) -> Tensor<Self, 4> {
        let pair = conv.adapter.as_ref();
        let plain = Conv {
            kernel: inner(&conv.kernel),
            bias: conv.bias.as_ref().map(inner),
            adapter: pair.map(|(a, b, scale)| (inner(a), inner(b), *scale)),
            stride: conv.stride,
            dilation: conv.dilation,
            padding: conv.padding,
        };
        let x = x.into_primitive().tensor();
        let y = K::convolve(tensor(x.primitive.clone()), &plain, window);

        let kernel = conv.kernel.clone().into_primitive().tensor();
        let bias = conv.bias.clone().map(|it| it.into_primitive().tensor());
        let [a, b] = [pair.map(|it| &it.0), pair.map(|it| &it.1)]
            .map(|it| it.cloned().map(|factor| factor.into_primitive().tensor()));
        let reads_x =
            kernel.is_tracked() || [&a, &b].into_iter().flatten().any(|it| it.is_tracked());
        let none = nothing::<K, C>();
        let [bias, a, b] = [bias, a, b].map(|it| it.unwrap_or_else(|| none.clone()).node);
        let nodes = [x.node.clone(), kernel.node, bias, a, b];
        let y = match ConvNode.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let x = reads_x.then(|| prep.checkpoint(&x));
                prep.finish(State { x, conv: plain, window }, primitive(y))
            }
            OpsKind::UnTracked(prep) => prep.finish(primitive(y)),
        };
        Tensor::from_primitive(TensorPrimitive::Float(y))
    }
}
