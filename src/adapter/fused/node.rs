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
        let [x_node, a_node, b_node] = ops.parents;
        let State { x, weight, a, b, hidden, scale } = ops.state;
        let x = tensor::<K>(checkpointer.retrieve_node_output(x));
        let dy = tensor(grads.consume::<K>(&ops.node));
        if let Some(node) = b_node {
            let db = K::product(hidden.transpose(), dy.clone());
            grads.register::<K>(node.id, primitive(db));
        }
        if x_node.is_none() && a_node.is_none() {
            return;
        }
        let d_hidden = K::times_thin(dy.clone(), b.transpose()).mul_scalar(scale);
        if let Some(node) = a_node {
            // By way of the transpose: CPU kernels are several times slower at `xᵀ·dh`.
            let da = transposed(K::product(d_hidden.clone().transpose(), x));
            grads.register::<K>(node.id, primitive(da));
        }
        if let Some(node) = x_node {
            let dx = times_transposed(dy, weight);
            let dx = add_product(dx, None, d_hidden, transposed(a));
            grads.register::<K>(node.id, primitive(dx));
        }
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
