//! The backward pass: the scores are computed again, block by block, as in FlashAttention ([Dao et al.
//! 2022](https://arxiv.org/abs/2205.14135)). With the weights `P = exp(q·kᵀ - sums)`:
//!
//! ```text
//! dv = Pᵀ·dy    dP = dy·vᵀ    dS = P∘(dP - Σ dy∘y)    dq = dS·k    dk = dSᵀ·q
//! ```
//!
//! All queries add to the gradients of a key. So each thread has sums of its own for a part of the queries, and
//! they are added up in order.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{
    bf16::{self, Keys},
    block::{Block, Call, LOW},
    panels::{Line, WIDTH, columns_by_panel, panels_by_rows, rows_by_panel},
};
use crate::{ops::simd::exp_of_negative, precision::Precision};

/// In how many parts the queries of a text are shared among threads, at most: each has gradients of all its keys.
const SHARES: usize = 16;

/// The gradients of q, k and v, from the output and the sums that [`forward`](super::forward::forward) gave.
pub(super) fn backward(call: Call, y: &[f32], sums: &[f32], dy: &[f32]) -> [Vec<f32>; 3] {
    let given = Given { y, sums, dy };
    match call.precision {
        Precision::F32 => by_blocks(call, |block, dq, found, scratch: &mut Scratch| {
            Arch::new().dispatch(Backward { block, given, dq, found, scratch });
        }),
        Precision::Bf16 => {
            let keys = Keys::of_backward(&call);
            by_blocks(call, |block, dq, found, scratch: &mut bf16::backward::Scratch| {
                let keys = keys.of(&block);
                Arch::new().dispatch(bf16::backward::Backward {
                    block,
                    keys,
                    given,
                    dq,
                    found,
                    scratch,
                });
            })
        }
    }
}

/// The gradients, computed block by block. `work` gets the gradients of the block's queries, of all heads, those of the
/// keys and the values of its head, to which it adds, and memory that it uses again.
fn by_blocks<S: Default>(
    call: Call,
    work: impl Fn(Block, &mut [f32], [&mut [Line]; 2], &mut S) + Sync,
) -> [Vec<f32>; 3] {
    let shape = call.shape;
    let (width, queries) = (shape.heads * shape.size, shape.queries());
    let key_width = shape.shared * shape.size;
    let mut dq = vec![0.0; call.q.len()];
    let [mut dk, mut dv] = [0; 2].map(|_| vec![0.0; call.k.len()]);
    let blocks = shape.length.div_ceil(queries);
    let shares = rayon::current_num_threads().div_ceil(shape.batch).min(blocks).min(SHARES);
    let texts = dq.par_chunks_mut(shape.length * width).zip(
        dk.par_chunks_mut(shape.total * key_width).zip(dv.par_chunks_mut(shape.total * key_width)),
    );
    texts.enumerate().for_each(|(text, (dq, (dk, dv)))| {
        let mut shared: Vec<_> = (0..shares).map(|_| Vec::new()).collect();
        for (index, dq) in dq.chunks_mut(queries * width).enumerate() {
            // There and back, because later queries may see more keys.
            let turn = index % (2 * shares);
            shared[turn.min(2 * shares - 1 - turn)].push((index * queries, dq));
        }
        let found: Vec<_> = shared
            .into_par_iter()
            .map(|share| {
                let mut found = Found::new(&call);
                let mut scratch = S::default();
                for (start, dq) in share {
                    let queries = start..shape.length.min(start + queries);
                    for head in 0..shape.shared {
                        let block = Block::new(call, text, queries.clone(), head);
                        work(block, &mut *dq, found.of(head), &mut scratch);
                    }
                }
                found
            })
            .collect();
        dk.par_chunks_mut(key_width).zip(dv.par_chunks_mut(key_width)).enumerate().for_each(
            |(key, (dk, dv))| {
                for found in &found {
                    found.add_to(key, dk, dv);
                }
            },
        );
    });
    [dq, dk, dv]
}

/// The gradients of all keys and values, as a part of the queries gives them. Rows are filled up to whole lines.
struct Found {
    /// `[shared, total, size]`
    dk: Vec<Line>,
    dv: Vec<Line>,
    size: usize,
    /// The lines of a head.
    head: usize,
    /// The lines of a row.
    lines: usize,
}

impl Found {
    fn new(call: &Call) -> Self {
        let (shape, lines) = (call.shape, call.shape.lines());
        let zeros = || vec![[0.0; WIDTH]; shape.shared * shape.total * lines];
        Self { dk: zeros(), dv: zeros(), size: shape.size, head: shape.total * lines, lines }
    }

    fn of(&mut self, head: usize) -> [&mut [Line]; 2] {
        let range = head * self.head..(head + 1) * self.head;
        [&mut self.dk[range.clone()], &mut self.dv[range]]
    }

    /// Adds the gradients of one key and its values, of all heads.
    fn add_to(&self, key: usize, dk: &mut [f32], dv: &mut [f32]) {
        for (found, d) in [(&self.dk, dk), (&self.dv, dv)] {
            for (head, d) in d.chunks_exact_mut(self.size).enumerate() {
                let row = &found[head * self.head + key * self.lines..][..self.lines];
                d.iter_mut().zip(row.as_flattened()).for_each(|(d, found)| *d += found);
            }
        }
    }
}

/// Memory that is used again by the next block.
#[derive(Default)]
struct Scratch {
    q: Vec<Line>,
    q_rows: Vec<Line>,
    dy: Vec<Line>,
    dy_rows: Vec<Line>,
    dq: Vec<Line>,
    weights: Vec<Line>,
    d_scores: Vec<Line>,
}

/// What the forward pass gave, and the gradient of its output.
#[derive(Clone, Copy)]
pub(super) struct Given<'a> {
    y: &'a [f32],
    sums: &'a [f32],
    pub dy: &'a [f32],
}

impl Given<'_> {
    /// For the queries of a panel, the sums of the exponentials, and `Σ dy∘y`.
    #[inline(always)]
    pub fn of_panel(&self, block: &Block, panel: usize) -> [Line; 2] {
        let size = block.call.shape.size;
        let sums = block.line_up(panel, -LOW, |row| self.sums[block.place(row)]);
        let along = block.line_up(panel, 0.0, |row| {
            let [y, dy] = [self.y, self.dy].map(|it| &it[block.place(row) * size..][..size]);
            y.iter().zip(dy).map(|(y, dy)| y * dy).sum()
        });
        [sums, along]
    }
}

struct Backward<'a> {
    block: Block<'a>,
    given: Given<'a>,
    /// Of the block's queries, of all heads.
    dq: &'a mut [f32],
    /// Of the keys and the values of this head.
    found: [&'a mut [Line]; 2],
    scratch: &'a mut Scratch,
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { block, given, dq, found: [dk, dv], scratch } = self;
        let call = block.call;
        let (size, lines, panels) = (call.shape.size, call.shape.lines(), block.panels());
        block.gather(call.q, call.scale, &mut scratch.q);
        block.gather_rows(call.q, call.scale, &mut scratch.q_rows);
        block.gather(given.dy, 1.0, &mut scratch.dy);
        block.gather_rows(given.dy, 1.0, &mut scratch.dy_rows);
        scratch.dq.clear();
        scratch.dq.resize(panels * size, [0.0; WIDTH]);
        let of_panels: Vec<_> = (0..panels).map(|panel| given.of_panel(&block, panel)).collect();
        let unions = block.unions();
        for keys in block.parts(1) {
            let [k, v] = [call.k, call.v].map(|it| block.rows_of(it, keys.clone()));
            // What no query of a panel sees stays 0.
            for lines in [&mut scratch.weights, &mut scratch.d_scores] {
                lines.clear();
                lines.resize(panels * keys.len(), [0.0; WIDTH]);
            }
            for (panel, [sums, along]) in of_panels.iter().enumerate() {
                if unions[panel].start >= keys.end || unions[panel].end <= keys.start {
                    continue;
                }
                let count = unions[panel].end.min(keys.end) - keys.start;
                let numbers = panel * size..(panel + 1) * size;
                let weights = &mut scratch.weights[panel * keys.len()..][..count];
                let d_scores = &mut scratch.d_scores[panel * keys.len()..][..count];
                rows_by_panel(simd, k.first(count), &scratch.q[numbers.clone()], weights);
                block.cap_and_mask(weights, panel, keys.start);
                rows_by_panel(simd, v.first(count), &scratch.dy[numbers.clone()], d_scores);
                differentiate(weights, d_scores, sums, along, call.soft_cap);
                columns_by_panel(simd, k.first(count), d_scores, &mut scratch.dq[numbers]);
            }
            let rows = keys.start * lines..keys.end * lines;
            panels_by_rows(
                simd,
                &scratch.weights,
                keys.len(),
                &scratch.dy_rows,
                &mut dv[rows.clone()],
            );
            panels_by_rows(simd, &scratch.d_scores, keys.len(), &scratch.q_rows, &mut dk[rows]);
        }
        write_dq(&block, dq, |row, number| scratch.dq[row / WIDTH * size + number][row % WIDTH]);
    }
}

/// Writes the gradients of the queries of a block, which `number` gives for each row before they are scaled.
#[inline(always)]
pub(super) fn write_dq(block: &Block, dq: &mut [f32], number: impl Fn(usize, usize) -> f32) {
    let (size, scale) = (block.call.shape.size, block.call.scale);
    for row in 0..block.rows() {
        let dq = &mut dq[block.place_in_block(row) * size..][..size];
        for (place, dq) in dq.iter_mut().enumerate() {
            *dq = number(row, place) * scale;
        }
    }
}

/// Makes weights of scores, and the gradients of the scores of those of the weights.
#[inline(always)]
pub(super) fn differentiate(
    scores: &mut [Line],
    d_weights: &mut [Line],
    sums: &Line,
    along: &Line,
    soft_cap: Option<f32>,
) {
    for (scores, d_weights) in scores.iter_mut().zip(d_weights) {
        for query in 0..WIDTH {
            let score = scores[query];
            // At most 0 but for rounding.
            let exponent = score - sums[query];
            let weight = exp_of_negative(if exponent > 0.0 { 0.0 } else { exponent });
            let inner = soft_cap.map_or(1.0, |cap| 1.0 - (score / cap) * (score / cap));
            // What is not seen has the weight 0, whatever its score.
            d_weights[query] = if weight == 0.0 {
                0.0
            } else {
                weight * (d_weights[query] - along[query]) * inner
            };
            scores[query] = weight;
        }
    }
}
