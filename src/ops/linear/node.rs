//! The linear layer as one node of the autodiff graph.

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

use super::AdaptedLinear;
use crate::{
    ops::{
        autodiff::{inner, nothing, output, parents, register},
        backend::Cpu,
        bf16::{self, Side, pack},
        pool::in_pool,
        rows::{add_product, transposed},
        weight::plain,
    },
    quantized::Weight,
    tensors::{primitive, tensor},
};

#[derive(Debug)]
struct LoraLinearNode;

/// The values that the gradients are computed from. Only two tensors grow with the batch: what the adapter
/// reads, which the checkpointer keeps, and the hidden tensor, which has `rank` columns.
#[derive(Clone, Debug)]
struct State<K: Cpu> {
    /// The node of what the adapter reads. It is kept only for the gradient of A.
    read: Option<NodeId>,
    /// Whether the adapter reads x.
    reads_x: bool,
    weight: Weight<K>,
    a: Tensor<K, 2>,
    b: Tensor<K, 2>,
    /// `s·(x·A)`: `[batch, rank]`. It is kept only for the gradient of B.
    hidden: Option<Tensor<K, 2>>,
    scale: f64,
}

/// The parents are x, what the adapter reads if that is not x, A, B and the bias.
impl<K: Cpu> Backward<K, 5> for LoraLinearNode {
    type State = State<K>;

    /// Computes, from the output's gradient `dy` and `h = s·(x·A)`:
    ///
    /// ```text
    /// dB = hᵀ·dy        dh = s·(dy·Bᵀ)        dA = xᵀ·dh        dx = dy·Wᵀ + dh·Aᵀ
    /// ```
    ///
    /// If the adapter does not read x, `dh·Aᵀ` is the gradient of what it reads.
    fn backward(
        self,
        ops: Ops<Self::State, 5>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let parents = parents(&ops);
        let read = ops.state.read.map(|read| tensor(checkpointer.retrieve_node_output(read)));
        let dy: Tensor<K, 2> = tensor(grads.consume::<K>(&ops.node));
        let [x_wanted, read_wanted, _, _, bias_wanted] = parents.map(|it| it.is_some());
        let d_bias = bias_wanted.then(|| primitive(dy.clone().sum_dim(0).flatten::<1>(0, 1)));
        let [dx, d_read, da, db] =
            ops.state.gradients(read, dy, x_wanted, read_wanted).map(|it| it.map(primitive));
        register::<K, 5>(grads, parents, [dx, d_read, da, db, d_bias]);
    }
}

impl<K: Cpu> State<K> {
    /// The gradients of x, of what the adapter reads, and of A and B; `None` for each that is not needed.
    fn gradients(
        self,
        read: Option<Tensor<K, 2>>,
        dy: Tensor<K, 2>,
        x_wanted: bool,
        read_wanted: bool,
    ) -> [Option<Tensor<K, 2>>; 4] {
        let Self { reads_x, weight, a, b, hidden, scale, .. } = self;
        in_pool(dy.dims()[0], weight.dims(), || {
            let packed = weight.in_bf16(dy.dims()[0]).then(|| pack(dy.clone()));
            let db = hidden.map(|hidden| K::product(hidden.transpose(), dy.clone()));
            let by_adapter = read.is_some() || read_wanted || (x_wanted && reads_x);
            let d_hidden = by_adapter.then(|| {
                let product = match &packed {
                    Some(packed) => bf16::product(packed, &b, Side::Transposed),
                    None => K::times_thin(dy.clone(), b.transpose()),
                };
                product.mul_scalar(scale)
            });
            // `dA` is computed as its transpose: CPU kernels are several times slower at `xᵀ·dh`.
            let da = read.zip(d_hidden.clone());
            let da = da.map(|(read, dh)| transposed(K::product(dh.transpose(), read)));
            let adds = d_hidden.clone().filter(|_| reads_x && x_wanted);
            let update = adds.map(|dh| (dh, transposed(a.clone())));
            let dx = x_wanted.then(|| match &packed {
                Some(packed) => {
                    let update = update.as_ref().map(|(dh, up)| [dh, up]);
                    let device = dy.device();
                    bf16::times(packed, &weight, Side::Transposed, update, None, &device)
                }
                None => {
                    let dx = weight.times_transposed(dy);
                    match update {
                        Some((dh, up)) => add_product(dx, None, dh, up),
                        None => dx,
                    }
                }
            });
            let d_read = d_hidden.filter(|_| read_wanted && !reads_x);
            let d_read = d_read.map(|dh| match packed {
                Some(_) => bf16::product(&pack(dh), &a, Side::Transposed),
                None => K::product(dh, a.transpose()),
            });
            [dx, d_read, da, db]
        })
    }
}

/// The output of the layer.
pub(super) fn output_of<K: Cpu, C: CheckpointStrategy>(
    x: Tensor<Autodiff<K, C>, 2>,
    layer: &AdaptedLinear<Autodiff<K, C>>,
) -> Tensor<Autodiff<K, C>, 2> {
    let values = AdaptedLinear {
        weight: plain(&layer.weight),
        bias: layer.bias.as_ref().map(inner),
        read: layer.read.as_ref().map(inner),
        a: inner(&layer.a),
        b: inner(&layer.b),
        scale: layer.scale,
    };
    let (hidden, y) = values.hidden_and_output(inner(&x));

    let [x, a, b] = [x, layer.a.clone(), layer.b.clone()].map(primitive);
    let (read, bias) = (layer.read.clone().map(primitive), layer.bias.clone().map(primitive));
    let none = nothing::<K, C>();
    let [reading, bias] = [&read, &bias].map(|it| it.as_ref().unwrap_or(&none));
    output(LoraLinearNode, [&x, reading, &a, &b, bias], y, |prep| {
        let reads_x = read.is_none();
        let read = a.is_tracked().then(|| prep.checkpoint(read.as_ref().unwrap_or(&x)));
        let hidden = b.is_tracked().then_some(hidden);
        let AdaptedLinear { weight, a, b, scale, .. } = values;
        State { read, reads_x, weight, a, b, hidden, scale }
    })
}
