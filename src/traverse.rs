//! Visiting and changing the layers and the parameters of any model, each with its path.

pub(crate) mod statistics;
mod stock;
mod values;
mod walk;

pub(crate) use stock::{StockWeight, stock_weights};
pub(crate) use values::{Values, restore, values};
pub(crate) use walk::{
    Map, Place, Seen, Visit, Walk, changer, draw, layer_paths, layers, map, marks_are, params,
    visit,
};
