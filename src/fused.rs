//! What the CPU backends of the features `flex` and `ndarray` compute as one operation, where Burn's
//! operations take several passes over memory. Each function returns `None` on other backends.

mod cpu;
mod heads;
mod linear;
mod node;
mod rows;

pub(crate) use heads::swapped;
pub(crate) use linear::{Layer, forward};
