//! What the CPU backends of the features `flex` and `ndarray` compute as one operation, where Burn's
//! operations take several passes over memory. Each function returns `None` on other backends.

mod columns;
mod conv;
mod conv_node;
mod cpu;
mod gelu;
mod heads;
mod linear;
mod mixed;
mod node;
mod patches;
mod quantized;
mod rows;

pub(crate) use columns::{Columns, column_squares, times_columns};
pub(crate) use conv::{Conv, convolve};
pub(crate) use cpu::computes_on;
pub(crate) use gelu::gelu;
pub(crate) use heads::swapped;
pub(crate) use linear::{Layer, forward};
pub(crate) use mixed::{MixedLayer, Update, forward_mixed};
pub(crate) use quantized::{dense, times_quantized};
