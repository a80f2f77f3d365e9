//! The forward pass, with an online softmax ([Milakov and Gimelshein
//! 2018](https://arxiv.org/abs/1805.02867)): blocks of keys are read one after the other, and what was summed so
//! far is scaled down whenever a larger score is found. So the scores of a text are never there as a whole.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{
    bf16::{self, Keys},
    block::{Block, Call, KEYS, LOW},
    panels::{Line, WIDTH, columns_by_panel, rows_by_panel},
};
use crate::{ops::simd::exp_of_negative, precision::Precision};

/// The output, `[batch, length, heads, size]`, and the logarithm of the sum of the exponentials of each query's
/// scores, `[batch, length, heads]`.
pub(super) fn forward(call: Call) -> (Vec<f32>, Vec<f32>) {
    match call.precision {
        Precision::F32 => by_blocks(call, |block, outputs, scratch: &mut Scratch| {
            Arch::new().dispatch(Forward { block, outputs, scratch });
        }),
        Precision::Bf16 => {
            let keys = Keys::of_forward(&call);
            by_blocks(call, |block, outputs, scratch: &mut bf16::forward::Scratch| {
                let keys = keys.of(&block);
                Arch::new().dispatch(bf16::forward::Forward { block, keys, outputs, scratch });
            })
        }
    }
}

/// The outputs of some queries of the only text in `f32`, on this core: `[queries, heads, size]`.
pub(super) fn block_by_block(call: Call, queries: Range<usize>, y: &mut [f32]) {
    let (shape, step) = (call.shape, call.shape.queries());
    let mut sums = vec![0.0; step * shape.heads];
    let (mut scratch, ends) = (Scratch::default(), queries.end);
    for (start, y) in queries.step_by(step).zip(y.chunks_mut(step * shape.heads * shape.size)) {
        for head in 0..shape.shared {
            let block = Block::new(call, 0, start..ends.min(start + step), head);
            let (outputs, scratch) = (Outputs { y: &mut *y, sums: &mut sums }, &mut scratch);
            Arch::new().dispatch(Forward { block, outputs, scratch });
        }
    }
}

/// The outputs of a block's queries, of all heads, and the logarithms of the sums of their exponentials.
pub(super) struct Outputs<'a> {
    pub y: &'a mut [f32],
    pub sums: &'a mut [f32],
}

/// The output and the sums, computed block by block. `work` has memory that it uses again.
fn by_blocks<S: Default>(
    call: Call,
    work: impl Fn(Block, Outputs, &mut S) + Sync,
) -> (Vec<f32>, Vec<f32>) {
    let shape = call.shape;
    let (width, block) = (shape.heads * shape.size, shape.queries());
    let mut y = vec![0.0; shape.batch * shape.length * width];
    let mut sums = vec![0.0; shape.batch * shape.length * shape.heads];
    let texts = y.par_chunks_mut(shape.length * width);
    let texts = texts.zip(sums.par_chunks_mut(shape.length * shape.heads)).enumerate();
    texts.for_each(|(text, (y, sums))| {
        let blocks = y.par_chunks_mut(block * width).zip(sums.par_chunks_mut(block * shape.heads));
        blocks.enumerate().for_each_init(S::default, |scratch, (index, (y, sums))| {
            let start = index * block;
            let queries = start..shape.length.min(start + block);
            for head in 0..shape.shared {
                let block = Block::new(call, text, queries.clone(), head);
                work(block, Outputs { y: &mut *y, sums: &mut *sums }, scratch);
            }
        });
    });
    (y, sums)
}

/// Memory that is used again by the next block.
#[derive(Default)]
struct Scratch {
    q: Vec<Line>,
    scores: Vec<Line>,
    y: Vec<Line>,
}

struct Forward<'a> {
    block: Block<'a>,
    outputs: Outputs<'a>,
    scratch: &'a mut Scratch,
}

/// What is known of the queries of a panel, after some of the keys.
#[derive(Clone, Copy)]
pub(super) struct Online {
    /// The largest score.
    pub top: Line,
    /// The sum of the exponentials of all scores minus the largest.
    sum: Line,
}

impl Online {
    /// Before the first key. The score is above what a key has that is not seen, so that its exponential is 0 also where
    /// none was seen before.
    pub const START: Self = Self { top: [LOW / 2.0; WIDTH], sum: [0.0; WIDTH] };
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { block, mut outputs, scratch } = self;
        let (size, call) = (block.call.shape.size, block.call);
        block.gather(call.q, call.scale, &mut scratch.q);
        scratch.scores.resize(KEYS, [0.0; WIDTH]);
        scratch.y.clear();
        scratch.y.resize(scratch.q.len(), [0.0; WIDTH]);
        let mut online = vec![Online::START; block.panels()];
        let unions = block.unions();
        // From whole parts on, so that the result of a query does not depend on the others of its block.
        for keys in block.parts(KEYS) {
            let [k, v] = [call.k, call.v].map(|it| block.rows_of(it, keys.clone()));
            let panels = scratch.q.chunks_exact(size).zip(scratch.y.chunks_exact_mut(size));
            for (panel, (q, y)) in panels.enumerate() {
                if unions[panel].start >= keys.end || unions[panel].end <= keys.start {
                    continue;
                }
                let count = unions[panel].end.min(keys.end) - keys.start;
                let scores = &mut scratch.scores[..count];
                rows_by_panel(simd, k.first(count), q, scores);
                block.cap_and_mask(scores, panel, keys.start);
                exponentials(scores, &mut online[panel], y);
                columns_by_panel(simd, v.first(count), scores, y);
            }
        }
        for (panel, online) in online.iter().enumerate() {
            let lines = &scratch.y[panel * size..][..size];
            outputs.finish(&block, panel, online, |number| &lines[number]);
        }
    }
}

impl Outputs<'_> {
    /// Writes the outputs of a panel, whose sums of values are lines, one for each number of a head.
    #[inline(always)]
    pub fn finish<'a>(
        &mut self,
        block: &Block,
        panel: usize,
        online: &Online,
        line: impl Fn(usize) -> &'a Line,
    ) {
        let (size, quiet) = (block.call.shape.size, block.call.quiet);
        for row in panel * WIDTH..block.rows().min((panel + 1) * WIDTH) {
            let (place, query) = (block.place_in_block(row), row % WIDTH);
            let (factor, total) = finish(online.top[query], online.sum[query], quiet);
            self.sums[place] = total;
            let y = &mut self.y[place * size..][..size];
            for (number, y) in y.iter_mut().enumerate() {
                *y = line(number)[query] * factor;
            }
        }
    }
}

/// What the sum of the values is multiplied by, and the logarithm of the sum of all exponentials. A query that sees
/// nothing has the output 0. With `quiet`, 1 is added to the exponentials.
#[inline(always)]
fn finish(top: f32, sum: f32, quiet: bool) -> (f32, f32) {
    if sum == 0.0 {
        return (0.0, -LOW);
    }
    match quiet {
        false => (1.0 / sum, top + sum.ln()),
        true if top > 0.0 => {
            let all = sum + (-top).exp();
            (1.0 / all, top + all.ln())
        }
        true => {
            let all = sum * top.exp() + 1.0;
            (top.exp() / all, all.ln())
        }
    }
}

/// Replaces scores by their exponentials, relative to the largest score so far, and makes what was computed from
/// the keys before relative to that, too.
#[inline(always)]
fn exponentials(scores: &mut [Line], online: &mut Online, y: &mut [Line]) {
    let before = online.top;
    online.raise(scores);
    if let Some(factor) = online.factor(before) {
        scale(y, &factor);
    }
    online.add(scores);
}

impl Online {
    /// The largest score, also of these.
    #[inline(always)]
    pub fn raise(&mut self, scores: &[Line]) {
        let mut top = self.top;
        for line in scores {
            for query in 0..WIDTH {
                top[query] = if line[query] > top[query] { line[query] } else { top[query] };
            }
        }
        self.top = top;
    }

    /// What sums have to be multiplied by, if the largest score was another one before. That of the exponentials is.
    #[inline(always)]
    pub fn factor(&mut self, before: Line) -> Option<Line> {
        if self.top == before {
            return None;
        }
        let mut factor = [0.0; WIDTH];
        for query in 0..WIDTH {
            factor[query] = exp_of_negative(before[query] - self.top[query]);
            self.sum[query] *= factor[query];
        }
        Some(factor)
    }

    /// Replaces scores by their exponentials, relative to the largest score, and adds these up.
    #[inline(always)]
    pub fn add(&mut self, scores: &mut [Line]) {
        let Self { top, sum } = self;
        for line in scores {
            for query in 0..WIDTH {
                line[query] = exp_of_negative(line[query] - top[query]);
                sum[query] += line[query];
            }
        }
    }
}

#[inline(always)]
pub(super) fn scale(lines: &mut [Line], factor: &Line) {
    for line in lines {
        for query in 0..WIDTH {
            line[query] *= factor[query];
        }
    }
}
