//! The work of one thread on a product.

use std::{cell::RefCell, ops::Range};

use super::{
    Target, Term,
    store::{Sum, add_bias, store},
};
use crate::{
    instructions::Instructions,
    right::pairs,
    tile::{Factors, Pair, SIDE, Tile, Unit},
};

/// A part of the result that one thread computes.
pub(super) struct Task<'a, S> {
    first_row: usize,
    panels: Range<usize>,
    rows: Vec<&'a mut [S]>,
    adds: bool,
    /// Of its columns.
    bias: Option<&'a [f32]>,
}

/// Divides the columns among the threads, and the rows where there are too few columns, since a part packs its columns
/// of the right factors by itself.
pub(super) fn tasks<S>(target: Target<S>, threads: usize) -> Vec<Task<S>> {
    /// With fewer columns to a row of tiles, the left factor would be read from memory too often.
    const PANELS: usize = 4;

    let Target { numbers, dims: [rows, columns], stride, adds, bias } = target;
    let panels = columns.div_ceil(SIDE);
    let across = threads.min(panels.div_ceil(PANELS));
    let down = threads.div_ceil(across).min(rows.div_ceil(SIDE));
    let width = panels.div_ceil(across);
    let height = rows.div_ceil(SIDE).div_ceil(down) * SIDE;
    let mut tasks = Vec::new();
    let mut lines = numbers.chunks_mut(stride);
    for first_row in (0..rows).step_by(height) {
        let starts = (0..panels).step_by(width);
        let first = tasks.len();
        tasks.extend(starts.map(|start| Task {
            first_row,
            panels: start..panels.min(start + width),
            rows: Vec::with_capacity(height),
            adds,
            bias: bias.map(|bias| &bias[start * SIDE..columns.min((start + width) * SIDE)]),
        }));
        for line in lines.by_ref().take(height.min(rows - first_row)) {
            let mut rest = &mut line[..columns];
            for task in &mut tasks[first..] {
                let (row, right) = rest.split_at_mut(rest.len().min(task.panels.len() * SIDE));
                task.rows.push(row);
                rest = right;
            }
        }
    }
    tasks
}

/// A term's numbers that are multiplied at once: these rows of the right factor.
type Part<'a> = (&'a Term<'a>, Range<usize>);

/// What stays in the cache of a core while the rows of the left factors pass by.
const BYTES: usize = 768 << 10;

/// The most numbers that are summed up before the sums go to the result.
pub(super) const INNER: usize = 2048;

/// Of them, those whose left factor stays in the innermost cache for all panels.
const STEP: usize = 320;

thread_local! {
    /// Packed panels, and tiles. They are kept, since new memory would have to be cleared each time.
    static SCRATCH: RefCell<(Vec<Pair>, Vec<Tile>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

impl<S: Sum> Task<'_, S> {
    pub fn run(&mut self, by: Instructions, terms: &[Term]) {
        let mut passes: Vec<Vec<Part>> = vec![Vec::new()];
        let mut left = INNER;
        for term in terms {
            let inner = term.left.dims()[1];
            let mut start = 0;
            while start < inner {
                if left == 0 {
                    passes.push(Vec::new());
                    left = INNER;
                }
                let end = inner.min(start + left);
                left -= (end - start).next_multiple_of(SIDE).min(left);
                passes.last_mut().expect("there is one").push((term, start..end));
                start = end;
            }
        }
        // They are taken, since rows of the right factors may be computed by products on this thread.
        let (mut packed, mut tiles) = SCRATCH.take();
        for pass in &passes {
            self.pass(by, pass, &mut packed, &mut tiles);
            (self.adds, self.bias) = (true, None);
        }
        SCRATCH.set((packed, tiles));
    }

    /// Adds up some parts, for a few panels after the other.
    fn pass(
        &mut self,
        by: Instructions,
        parts: &[Part],
        packed: &mut Vec<Pair>,
        tiles: &mut Vec<Tile>,
    ) {
        let pairs_of =
            |parts: &[Part]| parts.iter().map(|(_, inner)| pairs(inner.len())).sum::<usize>();
        let height = pairs_of(parts);
        let width = (BYTES / (size_of::<Pair>() * height.max(1))).clamp(1, self.panels.len());
        packed.resize(packed.len().max(width * height), Pair([0; SIDE]));
        tiles.resize(tiles.len().max(width), Tile([[0.0; SIDE]; SIDE]));
        for start in self.panels.clone().step_by(width) {
            let panels = start..self.panels.end.min(start + width);
            let mut rest = &mut packed[..];
            for (term, inner) in parts {
                let (to, next) = rest.split_at_mut(panels.len() * pairs(inner.len()));
                term.right.pack(by, panels.clone(), inner.clone(), to);
                rest = next;
            }
            // Not before: products that compute what was packed would leave other registers.
            let unit = Unit::new(by);
            let column = (start - self.panels.start) * SIDE;
            for (block, rows) in self.rows.chunks_mut(SIDE).enumerate() {
                let row = self.first_row + block * SIDE;
                let mut adds = false;
                let mut rest = &packed[..];
                for (term, inner) in parts {
                    let count = pairs(inner.len());
                    let steps = (2 * count).div_ceil(STEP);
                    let step = count.div_ceil(steps).next_multiple_of(SIDE / 2);
                    for from in (0..count).step_by(step) {
                        let to = count.min(from + step);
                        let left = term.left.from(row, inner.start + 2 * from);
                        for (panel, tile) in
                            rest.chunks_exact(count).zip(&mut tiles[..panels.len()])
                        {
                            let factors = Factors::new(left, term.left.stride(), &panel[from..to]);
                            unit.multiply(factors, rows.len(), adds, tile);
                        }
                        adds = true;
                    }
                    rest = &rest[panels.len() * count..];
                }
                if !adds {
                    tiles.fill(Tile([[0.0; SIDE]; SIDE]));
                }
                for (panel, tile) in tiles[..panels.len()].iter_mut().enumerate() {
                    let column = column + panel * SIDE;
                    if let Some(bias) = self.bias {
                        add_bias(tile, rows.len(), &bias[column..]);
                    }
                    store(tile, rows, column, self.adds);
                }
            }
        }
    }
}
