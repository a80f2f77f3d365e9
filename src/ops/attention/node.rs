//! Attention as one node of the autodiff graph.

use std::sync::Arc;

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

use super::{Attention, block::Shape};
use crate::{
    ops::{
        autodiff::{inner, output, parents, register},
        backend::Cpu,
    },
    precision::Precision,
    tensors::{primitive, tensor},
};

#[derive(Debug)]
struct AttentionNode;

/// The values that the gradients are computed from.
#[derive(Clone, Debug)]
struct State<K: Cpu> {
    /// The nodes of q, k and v. The checkpointer keeps the tensors.
    nodes: [NodeId; 3],
    ranges: Arc<[[u32; 2]]>,
    scale: f64,
    soft_cap: Option<f64>,
    quiet: bool,
    precision: Precision,
    shape: Shape,
    y: Tensor<K, 4>,
    /// `[batch, length, heads]`
    sums: Arc<[f32]>,
}

/// The parents are q, k and v.
impl<K: Cpu> Backward<K, 3> for AttentionNode {
    type State = State<K>;

    fn backward(
        self,
        ops: Ops<Self::State, 3>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let parents = parents(&ops);
        let State { nodes, ranges, scale, soft_cap, quiet, precision, shape, y, sums } = ops.state;
        let [q, k, v] = nodes.map(|it| tensor(checkpointer.retrieve_node_output(it)));
        let dy = tensor(grads.consume::<K>(&ops.node));
        let attention = Attention { q, k, v, ranges, scale, soft_cap, quiet, precision };
        let gradients = attention.gradients(shape, y, &sums, dy);
        register::<K, 3>(grads, parents, gradients.map(|it| Some(primitive(it))));
    }
}

/// The output of attention.
pub(super) fn output_of<K: Cpu, C: CheckpointStrategy>(
    input: &Attention<Autodiff<K, C>>,
    shape: Shape,
) -> Tensor<Autodiff<K, C>, 4> {
    let Attention { ranges, scale, soft_cap, quiet, precision, .. } = input.clone();
    let [q, k, v] = [&input.q, &input.k, &input.v].map(inner);
    let (y, sums) =
        Attention { q, k, v, ranges: ranges.clone(), scale, soft_cap, quiet, precision }
            .output(shape);
    let [q, k, v] = [&input.q, &input.k, &input.v].map(|it| primitive(it.clone()));
    output(AttentionNode, [&q, &k, &v], y.clone(), |prep| {
        let nodes = [&q, &k, &v].map(|it| prep.checkpoint(it));
        State { nodes, ranges, scale, soft_cap, quiet, precision, shape, y, sums: sums.into() }
    })
}
