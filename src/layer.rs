//! Layers that can carry an adapter: each shows its weight to the same
//! [`LoraAdapter`] as a matrix.

mod linear;

use burn::tensor::{Tensor, backend::Backend};

use crate::LoraAdapter;

/// The name under which a layer shows its adapter, there or not, to visitors and mappers.
pub(crate) const ADAPTER: &str = "adapter";

/// The container that goes with [`ADAPTER`]: by it a walk through any model finds its LoRA layers.
pub(crate) const CONTAINER: &str = "Struct:LoraLayer";

pub use linear::{LoraLinear, LoraLinearRecord};

/// A frozen base layer with at most one adapter.
///
/// Implemented by the layers of this crate; whole models go through
/// [`LoraModule`](crate::LoraModule).
pub trait LoraLayer<B: Backend> {
    /// The adapter, if there is one.
    fn adapter(&self) -> Option<&LoraAdapter<B>>;

    /// Puts an adapter on the base, and freezes the base; or takes the adapter off, and leaves the
    /// base as it is.
    ///
    /// # Panics
    ///
    /// If the adapter's shape is not [`weight_shape`](Self::weight_shape).
    fn set_adapter(&mut self, adapter: Option<LoraAdapter<B>>);

    /// The shape of the base's weight seen as a matrix: `[d_input, d_output]`.
    fn weight_shape(&self) -> [usize; 2];

    /// The base's weight seen as a matrix, as a constant: `[d_input, d_output]`.
    fn weight_matrix(&self) -> Tensor<B, 2>;

    /// How many parameters the base has, its bias included.
    fn num_base_params(&self) -> usize;

    /// The device of the base.
    fn device(&self) -> B::Device;

    /// Adds the adapter's update to a copy of the base, which replaces it, and drops the adapter.
    /// Returns whether every weight is finite; if not, the layer is as it was.
    fn merge_adapter(&mut self) -> bool;
}
