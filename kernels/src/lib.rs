//! Products of matrices in bfloat16 with sums in `f32`, dot products in 8 bits, and products in `f32` with weights that are
//! unpacked on the way ([`Stripes`]), by the fastest instructions that the processor has.
//!
//! A product has a left factor that is packed once ([`Left`]), and right factors that are packed on the way from whatever
//! gives rows of numbers ([`Rows`]): slices of `f32`, `f16` and `bf16` ([`Matrix`]), blocks of GGUF files ([`Blocks`]), or
//! a type of one's own. [`multiply`] adds up several products at once.
//!
//! The processor's instructions are chosen at run time: see [`instructions()`] and [`dots()`].

mod dots;
#[forbid(unsafe_code)]
mod instructions;
#[forbid(unsafe_code)]
mod left;
#[forbid(unsafe_code)]
mod matrix;
mod panels;
mod product;
#[forbid(unsafe_code)]
mod right;
mod round;
#[forbid(unsafe_code)]
mod stripes;
mod team;
mod tile;
mod transpose;

pub use dots::{BlockFormat, Blocks, Codes, DotMemory, Dots, Floats, SplitRow, Vector8, dots};
pub use instructions::{Instructions, VARIABLE, instructions};
pub use left::Left;
pub use matrix::{Matrix, Number, Rows, round_all};
pub use panels::{Panel, Tiles};
pub use product::{Output, Term, multiply, multiply_by, sum_of_products};
pub use right::Right;
pub use stripes::Stripes;
pub use team::Team;
pub use tile::Tile;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}
