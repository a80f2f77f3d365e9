//! Operations as nodes of the autodiff graph.

use burn::{
    backend::{
        Autodiff,
        autodiff::{
            NodeId,
            checkpoint::strategy::CheckpointStrategy,
            grads::Gradients,
            ops::{Backward, Ops, OpsKind, OpsPrep, Tracked},
        },
    },
    tensor::{Tensor, ops::FloatTensor},
};

use super::backend::Cpu;
use crate::tensors::{primitive, tensor};

/// The primitive of a tensor with autodiff: its value, and its node.
pub(super) type Float<K, C> = FloatTensor<Autodiff<K, C>>;

/// A node whose values are about to be kept for the backward pass.
pub(super) type Keeping<N, K, C, const P: usize> =
    OpsPrep<N, K, <N as Backward<K, P>>::State, C, P, Tracked>;

/// The output `y` of a node with these parents. `keep` gives what the backward pass needs; it is called only if
/// a gradient can reach a parent.
pub(super) fn output<N, K, C, const P: usize, const D: usize>(
    node: N,
    parents: [&Float<K, C>; P],
    y: Tensor<K, D>,
    keep: impl FnOnce(&mut Keeping<N, K, C, P>) -> N::State,
) -> Tensor<Autodiff<K, C>, D>
where
    N: Backward<K, P>,
    K: Cpu,
    C: CheckpointStrategy,
{
    let (parents, y) = (parents.map(|it| it.node.clone()), primitive(y));
    tensor(match node.prepare::<C>(parents).compute_bound().stateful() {
        OpsKind::Tracked(mut prep) => {
            let state = keep(&mut prep);
            prep.finish(state, y)
        }
        OpsKind::UnTracked(prep) => prep.finish(y),
    })
}

/// The parents that gradients can reach.
pub(super) fn parents<S, const P: usize>(ops: &Ops<S, P>) -> [Option<NodeId>; P] {
    ops.parents.each_ref().map(|it| it.as_ref().map(|it| it.id))
}

/// Gives the parents their gradients. There need be none for a parent that none can reach.
pub(super) fn register<K: Cpu, const P: usize>(
    grads: &mut Gradients,
    parents: [Option<NodeId>; P],
    gradients: [Option<FloatTensor<K>>; P],
) {
    for (parent, gradient) in parents.into_iter().zip(gradients) {
        if let (Some(parent), Some(gradient)) = (parent, gradient) {
            grads.register::<K>(parent, gradient);
        }
    }
}

/// A constant in the place of a parent that is not there.
pub(super) fn nothing<K: Cpu, C: CheckpointStrategy>() -> Float<K, C> {
    primitive(Tensor::<Autodiff<K, C>, 1>::zeros([1], &Default::default()))
}

/// The tensor as a constant. `Tensor::from_inner` cannot be used, for the same reason as `Tensor::inner`.
pub(super) fn constant<K: Cpu, C: CheckpointStrategy, const D: usize>(
    value: Tensor<K, D>,
) -> Tensor<Autodiff<K, C>, D> {
    let mut constant = nothing::<K, C>();
    constant.primitive = primitive(value);
    tensor(constant)
}

/// The tensor without autodiff. `Tensor::inner` cannot be used, because its bounds on the backend are
/// stronger if another crate enables Burn's feature `distributed`.
pub(super) fn inner<K: Cpu, C: CheckpointStrategy, const D: usize>(
    outer: &Tensor<Autodiff<K, C>, D>,
) -> Tensor<K, D> {
    tensor(primitive(outer.clone()).primitive)
}
