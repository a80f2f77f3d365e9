//! The layer as one node of the autodiff graph.

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
    tensor::{Tensor, TensorPrimitive, ops::FloatTensor},
};

use super::{
    Fused, Layer,
    cpu::Cpu,
    in_pool,
    rows::{add_product, transposed},
};

#[derive(Debug)]
struct LoraLinearNode;

/// What the gradients are computed from. Of a batch's size there are x, which the checkpointer keeps,
/// and the hidden tensor with its few columns.
#[derive(Clone, Debug)]
struct State<K: Cpu> {
    x: NodeId,
    weight: Tensor<K, 2>,
    a: Tensor<K, 2>,
    b: Tensor<K, 2>,
    /// `s·(x·A)`: `[batch, rank]`.
    hidden: Tensor<K, 2>,
    scale: f64,
}

impl<K: Cpu> Backward<K, 3> for LoraLinearNode {
    type State = State<K>;

    /// With `dy` the output's gradient and `h = s·(x·A)`:
    ///
    /// ```text
    /// dB = hᵀ·dy        dh = s·(dy·Bᵀ)        dA = xᵀ·dh        dx = dy·Wᵀ + dh·Aᵀ
    /// ```
    fn backward(
        self,
        ops: Ops<Self::State, 3>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let x = tensor::<K>(checkpointer.retrieve_node_output(ops.state.x));
        let dy = tensor(grads.consume::<K>(&ops.node));
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let computed = ops.state.gradients(x, dy, wanted);
        for (node, gradient) in ops.parents.into_iter().zip(computed) {
            if let (Some(node), Some(gradient)) = (node, gradient) {
                grads.register::<K>(node.id, primitive(gradient));
            }
        }
    }
}

impl<K: Cpu> State<K> {
    /// The gradients of x, A and B, as far as they are wanted.
    fn gradients(
        self,
        x: Tensor<K, 2>,
        dy: Tensor<K, 2>,
        [x_wanted, a_wanted, b_wanted]: [bool; 3],
    ) -> [Option<Tensor<K, 2>>; 3] {
        let Self { weight, a, b, hidden, scale, .. } = self;
        in_pool(x.dims()[0], weight.dims(), || {
            let db = b_wanted.then(|| K::product(hidden.transpose(), dy.clone()));
            if !x_wanted && !a_wanted {
                return [None, None, db];
            }
            let d_hidden = K::times_thin(dy.clone(), b.transpose()).mul_scalar(scale);
            // By way of the transpose: CPU kernels are several times slower at `xᵀ·dh`.
            let da = a_wanted.then(|| transposed(K::product(d_hidden.clone().transpose(), x)));
            let dx = x_wanted
                .then(|| add_product(times_transposed(dy, weight), None, d_hidden, transposed(a)));
            [dx, da, db]
        })
    }
}

impl<K: Cpu, C: CheckpointStrategy> Fused for Autodiff<K, C> {
    fn forward(x: Tensor<Self, 2>, layer: &Layer<Self>) -> Tensor<Self, 2> {
        let [x, a, b] = [&x, &layer.a, &layer.b].map(|it| it.clone().into_primitive().tensor());
        let inner = layer.inner();
        let (hidden, y) = inner.hidden_and_output(tensor(x.primitive.clone()));
        let nodes = [x.node.clone(), a.node.clone(), b.node.clone()];
        let y = match LoraLinearNode.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let Layer { weight, a, b, scale, .. } = inner;
                let state = State { x: prep.checkpoint(&x), weight, a, b, hidden, scale };
                prep.finish(state, primitive(y))
            }
            OpsKind::UnTracked(prep) => prep.finish(primitive(y)),
        };
        Tensor::from_primitive(TensorPrimitive::Float(y))
    }
}

/// `y·Wᵀ`, for `y: [batch, d_output]` and `weight: [d_input, d_output]`.
fn times_transposed<K: Cpu>(y: Tensor<K, 2>, weight: Tensor<K, 2>) -> Tensor<K, 2> {
    let ([batch, _], [d_input, d_output]) = (y.dims(), weight.dims());
    // CPU kernels copy a transposed weight into another order before they multiply. For few rows it
    // is cheaper to multiply the other way round, and to reorder what comes in and goes out.
    if batch * (d_input + d_output) > d_input * d_output {
        return K::product(y, weight.transpose());
    }
    transposed(K::product(weight, transposed(y)))
}

fn tensor<K: Cpu>(primitive: FloatTensor<K>) -> Tensor<K, 2> {
    Tensor::from_primitive(TensorPrimitive::Float(primitive))
}

fn primitive<K: Cpu>(tensor: Tensor<K, 2>) -> FloatTensor<K> {
    tensor.into_primitive().tensor()
}
