//! What CPU backends compute as one operation, where Burn's operations take several passes over memory.
//!
//! Each file has one [`Operation`](operation::Operation): what it takes and gives, how a CPU backend computes
//! it, and its node in the autodiff graph. [`run`] finds the backend. It returns `None` on other backends, and
//! for types and shapes that the operation is not made for. The caller then uses Burn's operations.

mod autodiff;
mod backend;
mod columns;
mod conv;
mod dispatch;
mod gelu;
mod heads;
mod linear;
mod mixed;
mod operation;
mod patches;
mod pool;
mod quantized;
mod rows;
#[cfg(test)]
mod testing;

pub(crate) use columns::{ColumnSquares, ScaleColumns, ScaledColumns};
pub(crate) use conv::{Conv, Convolve};
pub(crate) use dispatch::{run, runs_on};
pub(crate) use gelu::Gelu;
pub(crate) use heads::SwapHeads;
pub(crate) use linear::{AdaptedLinear, ForwardLinear};
pub(crate) use mixed::{ForwardMixed, MixedLinear, Update};
pub(crate) use quantized::{Dense, TimesQuantized};
