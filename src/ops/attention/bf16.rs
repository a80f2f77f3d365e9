//! Attention whose products are in bf16. What is computed of scores is in `f32`, as before.
//!
//! Keys and values are rounded and packed once for all queries, as rows and, where products need them, as columns. The
//! products that [`panels`](super::panels) makes have 32 columns, which are those of a tile.

pub(super) mod backward;
pub(super) mod forward;

use burn_lora_kernels::{Left, Matrix, Panel, Rows, Tile};
use rayon::prelude::*;

use super::{
    block::{Block, Call, Shape},
    panels::{Line, WIDTH},
};

/// A tile of zeros.
const ZEROS: Tile = Tile([[0.0; WIDTH]; WIDTH]);

/// The keys and the values of all texts and heads, packed.
pub(super) struct Keys {
    /// For each text its heads.
    heads: Vec<Head>,
    shared: usize,
}

/// The keys and the values of one head of a text. What a pass does not read is empty.
pub(super) struct Head {
    /// `[total, size]`
    pub k: Left,
    pub v: Left,
    /// `[size, total]`
    pub k_columns: Left,
    pub v_columns: Left,
}

impl Keys {
    /// What the forward pass reads.
    pub fn of_forward(call: &Call) -> Self {
        Self::of_heads(call, |k, v| Head {
            k: Left::new(&k),
            v: empty(),
            k_columns: empty(),
            v_columns: Left::new(&Columns(v)),
        })
    }

    /// What the backward pass reads.
    pub fn of_backward(call: &Call) -> Self {
        Self::of_heads(call, |k, v| Head {
            k: Left::new(&k),
            v: Left::new(&v),
            k_columns: Left::new(&Columns(k)),
            v_columns: empty(),
        })
    }

    fn of_heads(call: &Call, pack: impl Fn(Strided, Strided) -> Head + Sync) -> Self {
        let Shape { batch, shared, .. } = call.shape;
        let heads = (0..batch * shared).into_par_iter().map(|index| {
            let [k, v] = [call.k, call.v]
                .map(|values| Strided::of(call.shape, values, index / shared, index % shared));
            pack(k, v)
        });
        Self { heads: heads.collect(), shared }
    }

    /// Those that the queries of a block read.
    pub fn of(&self, block: &Block) -> &Head {
        &self.heads[block.text * self.shared + block.head]
    }
}

fn empty() -> Left {
    Left::zeros([0, 0])
}

/// The rows of one head: `[total, size]`.
#[derive(Clone, Copy)]
struct Strided<'a> {
    values: &'a [f32],
    total: usize,
    size: usize,
    stride: usize,
}

impl<'a> Strided<'a> {
    fn of(shape: Shape, values: &'a [f32], text: usize, head: usize) -> Self {
        let Shape { total, shared, size, .. } = shape;
        let values = &values[(text * total * shared + head) * size..];
        Self { values, total, size, stride: shared * size }
    }
}

impl Rows for Strided<'_> {
    fn dims(&self) -> [usize; 2] {
        [self.total, self.size]
    }

    fn write(&self, row: usize, start: usize, to: &mut [u16]) {
        Matrix::strided(self.values, self.dims(), self.stride).write(row, start, to);
    }
}

/// The columns of one head as rows: `[size, total]`.
struct Columns<'a>(Strided<'a>);

impl Rows for Columns<'_> {
    fn dims(&self) -> [usize; 2] {
        [self.0.size, self.0.total]
    }

    fn write(&self, row: usize, start: usize, to: &mut [u16]) {
        let Strided { values, stride, .. } = self.0;
        for (chunk, to) in to.chunks_mut(WIDTH).enumerate() {
            let first = start + chunk * WIDTH;
            let mut numbers = [0.0; WIDTH];
            for (place, number) in numbers[..to.len()].iter_mut().enumerate() {
                *number = values[(first + place) * stride + row];
            }
            burn_lora_kernels::round_all(&numbers[..to.len()], to);
        }
    }
}

/// Packs panels of queries, each of `size` lines one after the other.
fn pack_panels(lines: &[Line], size: usize, panels: &mut Vec<Panel>) {
    panels.resize_with(lines.len() / size, Panel::default);
    for (panel, lines) in panels.iter_mut().zip(lines.chunks_exact(size)) {
        panel.fill(size, |row| &lines[row]);
    }
}

/// The tiles of so many rows.
fn tiles(rows: usize) -> usize {
    rows.div_ceil(WIDTH)
}

/// How many of so many rows are in a tile.
fn there(rows: usize, tile: usize) -> usize {
    WIDTH.min(rows - tile * WIDTH)
}
