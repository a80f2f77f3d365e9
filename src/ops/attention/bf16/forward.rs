//! The forward pass, as [`forward`](crate::ops::attention::forward) has it.

use burn_lora_kernels::{Panel, Tile, Tiles};
use pulp::{Simd, WithSimd};

use super::{Head, ZEROS, pack_panels, there, tiles};
use crate::ops::attention::{
    block::Block,
    forward::{Online, Outputs, scale},
    panels::{Line, WIDTH},
};

/// Memory that is used again by the next block.
#[derive(Default)]
pub(in crate::ops::attention) struct Scratch {
    lines: Vec<Line>,
    q: Vec<Panel>,
    /// Of the keys of a part.
    scores: Vec<Tile>,
    weights: Panel,
    /// For each panel the numbers of a head.
    y: Vec<Tile>,
}

pub(in crate::ops::attention) struct Forward<'a> {
    pub block: Block<'a>,
    pub keys: &'a Head,
    pub outputs: Outputs<'a>,
    pub scratch: &'a mut Scratch,
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { block, keys: head, mut outputs, scratch } = self;
        let (call, products) = (block.call, Tiles::default());
        let size = call.shape.size;
        block.gather(call.q, call.scale, &mut scratch.lines);
        pack_panels(&scratch.lines, size, &mut scratch.q);
        scratch.y.clear();
        scratch.y.resize(block.panels() * tiles(size), ZEROS);
        let mut online = vec![Online::START; block.panels()];
        let unions = block.unions();
        for keys in block.parts(WIDTH) {
            for (panel, y) in scratch.y.chunks_exact_mut(tiles(size)).enumerate() {
                if unions[panel].start >= keys.end || unions[panel].end <= keys.start {
                    continue;
                }
                let count = unions[panel].end.min(keys.end) - keys.start;
                scratch.scores.resize(tiles(count), ZEROS);
                let online = &mut online[panel];
                let before = online.top;
                for (tile, scores) in scratch.scores.iter_mut().enumerate() {
                    let key = keys.start + tile * WIDTH;
                    products.multiply(&head.k, [key, 0], &scratch.q[panel], false, scores);
                    let scores = &mut scores.0[..there(count, tile)];
                    block.cap_and_mask(scores, panel, key);
                    online.raise(scores);
                }
                if let Some(factor) = online.factor(before) {
                    for y in y.iter_mut() {
                        scale(&mut y.0, &factor);
                    }
                }
                for (tile, scores) in scratch.scores.iter_mut().enumerate() {
                    let (scores, others) = scores.0.split_at_mut(there(count, tile));
                    online.add(scores);
                    others.fill([0.0; WIDTH]);
                }
                scratch.weights.fill_tiles(&scratch.scores);
                for (tile, y) in y.iter_mut().enumerate() {
                    let place = [tile * WIDTH, keys.start];
                    products.multiply(&head.v_columns, place, &scratch.weights, true, y);
                }
            }
        }
        for (panel, y) in scratch.y.chunks_exact(tiles(size)).enumerate() {
            let line = |number: usize| &y[number / WIDTH].0[number % WIDTH];
            outputs.finish(&block, panel, &online[panel], line);
        }
    }
}
