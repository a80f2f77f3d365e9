//! The linear layer as one node of the autodiff graph.

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
    cpu::Cpu,
    linear::{Fused, Layer, in_pool},
    rows::{add_product, transposed},
};

#[derive(Debug)]
struct LoraLinearNode;

/// The values that the gradients are computed from. Only two tensors grow with the batch: x, which the
/// checkpointer keeps, and the hidden tensor, which has `rank` columns.
#[derive(Clone, Debug)]
struct State<K: Cpu> {
    /// The node of x. It is kept only for the gradient of A.
    x: Option<NodeId>,
    weight: Tensor<K, 2>,
    a: Tensor<K, 2>,
    b: Tensor<K, 2>,
    /// `s·(x·A)`: `[batch, rank]`. It is kept only for the gradient of B.
    hidden: Option<Tensor<K, 2>>,
    scale: f64,
}

impl<K: Cpu> Backward<K, 3> for LoraLinearNode {
    type State = State<K>;

    /// Computes, from the output's gradient `dy` and `h = s·(x·A)`:
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
        let x = ops.state.x.map(|x| tensor::<K>(checkpointer.retrieve_node_output(x)));
        let dy = tensor(grads.consume::<K>(&ops.node));
        let computed = ops.state.gradients(x, dy, ops.parents[0].is_some());
        for (node, gradient) in ops.parents.into_iter().zip(computed) {
            if let (Some(node), Some(gradient)) = (node, gradient) {
                grads.register::<K>(node.id, primitive(gradient));
            }
        }
    }
}

impl<K: Cpu> State<K> {
    /// The gradients of x, A and B; `None` for each that is not needed.
    fn gradients(
        self,
        x: Option<Tensor<K, 2>>,
        dy: Tensor<K, 2>,
        x_wanted: bool,
    ) -> [Option<Tensor<K, 2>>; 3] {
        let Self { weight, a, b, hidden, scale, .. } = self;
        in_pool(dy.dims()[0], weight.dims(), || {
            let db = hidden.map(|hidden| K::product(hidden.transpose(), dy.clone()));
            if !x_wanted && x.is_none() {
                return [None, None, db];
            }
            let d_hidden = K::times_thin(dy.clone(), b.transpose()).mul_scalar(scale);
            // `dA` is computed as its transpose: CPU kernels are several times slower at `xᵀ·dh`.
            let da = x.map(|x| transposed(K::product(d_hidden.clone().transpose(), x)));
            let dx = x_wanted
                .then(|| add_product(times_transposed(dy, weight), None, d_hidden, transposed(a)));
            [dx, da, db]
        })
    }
}

impl<K: Cpu, C: CheckpointStrategy> Fused for Autodiff<K, C> {
    fn forward(x: Tensor<Self, 2>, layer: &Layer<Self>) -> Tensor<Self, 2> {
        let [x, a, b] = [&x, &layer.a, &layer.b].map(|it| it.clone().into_primitive().tensor());
        let inner = Layer {
            weight: inner(&layer.weight),
            bias: layer.bias.as_ref().map(inner),
            a: inner(&layer.a),
            b: inner(&layer.b),
            scale: layer.scale,
        };
        let (hidden, y) = inner.hidden_and_output(tensor(x.primitive.clone()));
        let (a_tracked, b_tracked) = (a.is_tracked(), b.is_tracked());
        let nodes = [x.node.clone(), a.node, b.node];
        let y = match LoraLinearNode.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let Layer { weight, a, b, scale, .. } = inner;
                let x = a_tracked.then(|| prep.checkpoint(&x));
                let hidden = b_tracked.then_some(hidden);
                prep.finish(State { x, weight, a, b, hidden, scale }, primitive(y))
            }
            OpsKind::UnTracked(prep) => prep.finish(primitive(y)),
        };
        Tensor::from_primitive(TensorPrimitive::Float(y))
    }
}

/// The tensor without autodiff. `Tensor::inner` cannot be used, because its bounds on the backend are
/// stronger if another crate enables Burn's feature `distributed`.
fn inner<K: Cpu, C: CheckpointStrategy, const D: usize>(
    tensor: &Tensor<Autodiff<K, C>, D>,
) -> Tensor<K, D> {
    let tracked = tensor.clone().into_primitive().tensor();
    Tensor::from_primitive(TensorPrimitive::Float(tracked.primitive))
}

/// `y·Wᵀ`, for `y: [batch, d_output]` and `weight: [d_input, d_output]`.
fn times_transposed<K: Cpu>(y: Tensor<K, 2>, weight: Tensor<K, 2>) -> Tensor<K, 2> {
    let ([batch, _], [d_input, d_output]) = (y.dims(), weight.dims());
    // CPU kernels reorder a transposed weight before they multiply. For few rows it is cheaper to
    // compute `(W·yᵀ)ᵀ`, which reorders the input and the output instead.
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
