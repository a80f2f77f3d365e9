//! What the forward and the backward pass have in common: a block of queries, as panels.

use std::ops::Range;

use super::panels::{Line, Rows, WIDTH};
use crate::{ops::simd::tanh, precision::Precision};

/// How many keys are read at once.
pub(super) const KEYS: usize = 128;

/// Far below any score, and far from what is not finite.
pub(super) const LOW: f32 = -1e30;

/// The sizes of an attention.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub batch: usize,
    /// The number of queries of a text.
    pub length: usize,
    /// The number of keys of a text.
    pub total: usize,
    /// The number of heads of queries.
    pub heads: usize,
    /// The number of heads of keys. Each is shared by a group of heads of queries.
    pub shared: usize,
    /// The size of a head.
    pub size: usize,
}

/// The values that attention is computed from, row by row.
#[derive(Clone, Copy)]
pub(super) struct Call<'a> {
    pub shape: Shape,
    /// `[batch, length, heads, size]`
    pub q: &'a [f32],
    /// `[batch, total, shared, size]`
    pub k: &'a [f32],
    pub v: &'a [f32],
    /// The first key that each query sees, and the one after the last: `[batch or 1, length]`.
    pub ranges: &'a [[u32; 2]],
    pub scale: f32,
    pub soft_cap: Option<f32>,
    pub quiet: bool,
    pub precision: Precision,
}

impl Shape {
    pub fn group(&self) -> usize {
        self.heads / self.shared
    }

    /// How many queries of a text are in a block. With the heads of a group they fill a few panels.
    pub fn queries(&self) -> usize {
        (192 / self.group()).clamp(8, 64)
    }

    /// The lines that hold the numbers of one head, filled up with zeros.
    pub fn lines(&self) -> usize {
        self.size.div_ceil(WIDTH)
    }
}

/// Some queries of a text, one head of keys, and the heads of queries that share it.
#[derive(Clone)]
pub(super) struct Block<'a> {
    pub call: Call<'a>,
    pub text: usize,
    pub queries: Range<usize>,
    pub head: usize,
    /// The keys that each query sees. Each panel has two lines: the first keys, and the ends.
    seen: Vec<[Line; 2]>,
}

impl<'a> Block<'a> {
    pub fn new(call: Call<'a>, text: usize, queries: Range<usize>, head: usize) -> Self {
        let mut block = Self { call, text, queries, head, seen: Vec::new() };
        block.seen = vec![[[0.0; WIDTH]; 2]; block.panels()];
        for row in 0..block.rows() {
            let [start, end] = block.range(row).map(|it| it as f32);
            let [starts, ends] = &mut block.seen[row / WIDTH];
            (starts[row % WIDTH], ends[row % WIDTH]) = (start, end);
        }
        block
    }

    /// The queries of all heads of the group.
    pub fn rows(&self) -> usize {
        self.queries.len() * self.call.shape.group()
    }

    pub fn panels(&self) -> usize {
        self.rows().div_ceil(WIDTH)
    }

    /// Where the row is in a tensor `[batch, length, heads]`.
    pub fn place(&self, row: usize) -> usize {
        let (shape, group) = (self.call.shape, self.call.shape.group());
        let query = self.text * shape.length + self.queries.start + row / group;
        query * shape.heads + self.head * group + row % group
    }

    /// The same, counted from the first query of the block.
    pub fn place_in_block(&self, row: usize) -> usize {
        let (heads, group) = (self.call.shape.heads, self.call.shape.group());
        row / group * heads + self.head * group + row % group
    }

    fn range(&self, row: usize) -> [u32; 2] {
        let (ranges, length) = (self.call.ranges, self.call.shape.length);
        let query = self.text * length + self.queries.start + row / self.call.shape.group();
        ranges[query % ranges.len()]
    }

    /// The keys that some query of the rows sees.
    fn union(&self, rows: Range<usize>) -> Range<usize> {
        let seen = rows.map(|row| self.range(row)).filter(|[start, end]| start < end);
        let union = seen.reduce(|[start, end], [other, last]| [start.min(other), end.max(last)]);
        let [start, end] = union.unwrap_or_default();
        start as usize..end as usize
    }

    /// The keys that are seen, in parts, of which the first begins at a multiple of `steps`.
    pub fn parts(&self, steps: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let seen = self.union(0..self.rows());
        let all = seen.start / steps * steps..seen.end;
        all.clone().step_by(KEYS).map(move |start| start..all.end.min(start + KEYS))
    }

    /// The keys that each panel sees.
    pub fn unions(&self) -> Vec<Range<usize>> {
        let rows = (0..self.rows()).step_by(WIDTH);
        rows.map(|start| self.union(start..self.rows().min(start + WIDTH))).collect()
    }

    /// Rows of the keys or the values.
    pub fn rows_of(&self, values: &'a [f32], keys: Range<usize>) -> Rows<'a> {
        let Shape { total, shared, size, .. } = self.call.shape;
        let start = ((self.text * total + keys.start) * shared + self.head) * size;
        Rows { values: &values[start..], stride: shared * size, count: keys.len(), width: size }
    }

    /// Numbers of the queries, times `scale`, as panels of `size` lines each.
    pub fn gather(&self, values: &[f32], scale: f32, panels: &mut Vec<Line>) {
        let size = self.call.shape.size;
        panels.clear();
        panels.resize(self.panels() * size, [0.0; WIDTH]);
        for row in 0..self.rows() {
            let numbers = &values[self.place(row) * size..][..size];
            let panel = &mut panels[row / WIDTH * size..][..size];
            for (line, number) in panel.iter_mut().zip(numbers) {
                line[row % WIDTH] = number * scale;
            }
        }
    }

    /// The same, row by row, each filled up to whole lines.
    pub fn gather_rows(&self, values: &[f32], scale: f32, rows: &mut Vec<Line>) {
        let (size, lines) = (self.call.shape.size, self.call.shape.lines());
        rows.clear();
        rows.resize(self.panels() * WIDTH * lines, [0.0; WIDTH]);
        for row in 0..self.rows() {
            let numbers = &values[self.place(row) * size..][..size];
            let line = rows[row * lines..][..lines].as_flattened_mut();
            line.iter_mut().zip(numbers).for_each(|(to, number)| *to = number * scale);
        }
    }

    /// One number for each row, as lines. Rows that are not there have the number `other`.
    pub fn line_up(&self, panel: usize, other: f32, number: impl Fn(usize) -> f32) -> Line {
        let mut line = [other; WIDTH];
        let rows = panel * WIDTH..self.rows().min((panel + 1) * WIDTH);
        line.iter_mut().zip(rows).for_each(|(to, row)| *to = number(row));
        line
    }

    /// Makes scores of products: caps them, and lowers those of keys that are not seen.
    #[inline(always)]
    pub fn cap_and_mask(&self, scores: &mut [Line], panel: usize, first_key: usize) {
        if let Some(cap) = self.call.soft_cap {
            for score in scores.as_flattened_mut() {
                *score = cap * tanh(*score / cap);
            }
        }
        let [starts, ends] = &self.seen[panel];
        let (start, end) = (first_key as f32, (first_key + scores.len()) as f32);
        if starts.iter().all(|it| *it <= start) && ends.iter().all(|it| *it >= end) {
            return;
        }
        for (key, line) in (first_key..).zip(scores) {
            let key = key as f32;
            for query in 0..WIDTH {
                let seen = starts[query] <= key && key < ends[query];
                line[query] = if seen { line[query] } else { LOW };
            }
        }
    }
}
