//! The backward pass, as [`backward`](crate::ops::attention::backward) has it.

use burn_lora_kernels::{Left, Panel, Tile, Tiles};
use pulp::{Simd, WithSimd};

use super::{Head, ZEROS, pack_panels, there, tiles};
use crate::ops::attention::{
    backward::{Given, differentiate, write_dq},
    block::{Block, KEYS},
    panels::{Line, WIDTH},
};

/// Memory that is used again by the next block.
#[derive(Default)]
pub(in crate::ops::attention) struct Scratch {
    lines: Vec<Line>,
    q: Vec<Panel>,
    dy: Vec<Panel>,
    /// The same row by row: for each 32 numbers of a head, all rows of the block.
    q_rows: Vec<Panel>,
    dy_rows: Vec<Panel>,
    /// For each panel the numbers of a head.
    dq: Vec<Tile>,
    /// Of the keys of a part.
    weights: Vec<Tile>,
    d_scores: Vec<Tile>,
    d_scores_panel: Panel,
    /// Of the keys of a part, and all panels: `[keys, rows]`.
    all: Option<All>,
}

/// What the gradients of keys and values are computed from.
struct All {
    weights: Left,
    d_scores: Left,
    panels: usize,
}

impl All {
    fn new(panels: usize) -> Self {
        let zeros = || Left::zeros([KEYS, panels * WIDTH]);
        Self { weights: zeros(), d_scores: zeros(), panels }
    }

    fn set(&mut self, place: [usize; 2], weights: &Tile, d_scores: &Tile) {
        self.weights.set_tile(place, weights);
        self.d_scores.set_tile(place, d_scores);
    }
}

pub(in crate::ops::attention) struct Backward<'a> {
    pub block: Block<'a>,
    pub keys: &'a Head,
    pub given: Given<'a>,
    /// Of the block's queries, of all heads.
    pub dq: &'a mut [f32],
    /// Of the keys and the values of this head.
    pub found: [&'a mut [Line]; 2],
    pub scratch: &'a mut Scratch,
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { block, keys: head, given, dq, found: [dk, dv], scratch } = self;
        let (call, products, panels) = (block.call, Tiles::default(), block.panels());
        let (size, lines) = (call.shape.size, call.shape.lines());
        for (values, scale, columns, rows) in [
            (call.q, call.scale, &mut scratch.q, &mut scratch.q_rows),
            (given.dy, 1.0, &mut scratch.dy, &mut scratch.dy_rows),
        ] {
            block.gather(values, scale, &mut scratch.lines);
            pack_panels(&scratch.lines, size, columns);
            block.gather_rows(values, scale, &mut scratch.lines);
            rows.resize_with(lines, Panel::default);
            for (line, panel) in rows.iter_mut().enumerate() {
                panel.fill(panels * WIDTH, |row| &scratch.lines[row * lines + line]);
            }
        }
        scratch.dq.clear();
        scratch.dq.resize(panels * lines, ZEROS);
        let all = match &mut scratch.all {
            Some(all) if all.panels == panels => all,
            other => other.insert(All::new(panels)),
        };
        let of_panels: Vec<_> = (0..panels).map(|panel| given.of_panel(&block, panel)).collect();
        let unions = block.unions();
        for keys in block.parts(WIDTH) {
            for (panel, union) in unions.iter().enumerate() {
                let is_seen = union.start < keys.end && union.end > keys.start;
                let count = if is_seen { union.end.min(keys.end) - keys.start } else { 0 };
                // What no query of a panel sees is 0.
                for tile in tiles(count)..tiles(keys.len()) {
                    all.set([tile * WIDTH, panel * WIDTH], &ZEROS, &ZEROS);
                }
                if !is_seen {
                    continue;
                }
                let [sums, along] = &of_panels[panel];
                scratch.weights.resize(tiles(count), ZEROS);
                scratch.d_scores.resize(tiles(count), ZEROS);
                let both = scratch.weights.iter_mut().zip(&mut scratch.d_scores);
                for (tile, (weights, d_scores)) in both.enumerate() {
                    let key = keys.start + tile * WIDTH;
                    products.multiply(&head.k, [key, 0], &scratch.q[panel], false, weights);
                    products.multiply(&head.v, [key, 0], &scratch.dy[panel], false, d_scores);
                    let there = there(count, tile);
                    block.cap_and_mask(&mut weights.0[..there], panel, key);
                    differentiate(
                        &mut weights.0[..there],
                        &mut d_scores.0[..there],
                        sums,
                        along,
                        call.soft_cap,
                    );
                    weights.0[there..].fill([0.0; WIDTH]);
                    d_scores.0[there..].fill([0.0; WIDTH]);
                    all.set([tile * WIDTH, panel * WIDTH], weights, d_scores);
                }
                scratch.d_scores_panel.fill_tiles(&scratch.d_scores);
                for line in 0..lines {
                    let (place, dq) =
                        ([line * WIDTH, keys.start], &mut scratch.dq[panel * lines + line]);
                    products.multiply(&head.k_columns, place, &scratch.d_scores_panel, true, dq);
                }
            }
            for (left, rows, found) in [
                (&all.weights, &scratch.dy_rows, &mut *dv),
                (&all.d_scores, &scratch.q_rows, &mut *dk),
            ] {
                for tile in 0..tiles(keys.len()) {
                    for line in 0..lines {
                        let mut sums = ZEROS;
                        products.multiply(left, [tile * WIDTH, 0], &rows[line], false, &mut sums);
                        let first = keys.start + tile * WIDTH;
                        for (place, sums) in sums.0[..there(keys.len(), tile)].iter().enumerate() {
                            let found = &mut found[(first + place) * lines + line];
                            for number in 0..WIDTH {
                                found[number] += sums[number];
                            }
                        }
                    }
                }
            }
        }
        write_dq(&block, dq, |row, number| {
            let tile = row / WIDTH * lines + number / WIDTH;
            scratch.dq[tile].0[number % WIDTH][row % WIDTH]
        });
    }
}
