//! What CPU backends compute as one operation, where Burn's operations take several passes over memory.
//!
//! Each file has one [`Operation`](operation::Operation): what it takes and gives, how a CPU backend computes
//! it, and its node in the autodiff graph. [`run`] finds the backend. It returns `None` on other backends, and
//! for types and shapes that the operation is not made for. The caller then uses Burn's operations.

mod along;
mod attention;
mod autodiff;
mod backend;
mod bf16;
mod channels;
mod columns;
mod conv;
mod cross_entropy;
mod dispatch;
mod gated;
mod gelu;
mod heads;
mod host;
mod linear;
mod mixed;
mod normalize;
mod operation;
mod patches;
mod pool;
mod quantized;
mod rotation;
mod rows;
mod simd;
pub(crate) mod slices;
#[cfg(test)]
mod testing;
mod times;
mod weight;

pub(crate) use along::Along;
pub(crate) use attention::{Attend, Attention, Queries, Single};
pub(crate) use channels::{Channels, ScaleChannels};
pub(crate) use columns::{ColumnSquares, ScaleColumns, ScaledColumns};
pub(crate) use conv::{Conv, Convolve};
pub(crate) use cross_entropy::{CrossEntropy, Scored};
pub(crate) use dispatch::{run, runs_on};
pub(crate) use gated::{Activation, Gated, GeluTanh, Silu, gated};
pub(crate) use gelu::Gelu;
pub(crate) use heads::SwapHeads;
pub(crate) use host::{HostWeight, OnHost};
pub(crate) use linear::{AdaptedLinear, ForwardLinear};
pub(crate) use mixed::{ForwardMixed, MixedLinear, Update};
pub(crate) use normalize::{Norm, Normalize};
pub(crate) use quantized::Dense;
pub(crate) use rotation::{Rotate, Rotation, turn};
pub(crate) use times::TimesWeight;
