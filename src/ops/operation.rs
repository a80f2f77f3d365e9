//! What an operation is.

use burn::{
    backend::{Autodiff, autodiff::checkpoint::strategy::CheckpointStrategy},
    tensor::backend::Backend,
};

use super::backend::Cpu;

/// A function of tensors that a CPU backend computes at once.
pub(crate) trait Operation: 'static {
    /// What it takes.
    type Input<B: Backend>: 'static;

    /// What it gives.
    type Output<B: Backend>: 'static;

    /// The output; `None` if the input has types or shapes for which Burn's operations are used.
    fn forward<K: Cpu>(input: &Self::Input<K>) -> Option<Self::Output<K>>;

    /// The same with autodiff, as one node of the graph.
    fn tracked<K: Cpu, C: CheckpointStrategy>(
        input: &Self::Input<Autodiff<K, C>>,
    ) -> Option<Self::Output<Autodiff<K, C>>>;
}
