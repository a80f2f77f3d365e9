use std::ops::Range;

use super::share;
use crate::{
    ops::{Queries, Single},
    precision::Precision,
};

/// The heads of an attention, and how scores become weights. As in [`attention`](crate::nn::attention).
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// The number of heads of queries, a multiple of `shared`.
    pub queries: usize,
    /// The number of heads of keys, and of values, each of which a group of heads of queries shares.
    pub shared: usize,
    /// The numbers of a head.
    pub size: usize,
    /// What the products of queries and keys are multiplied by.
    pub scale: f32,
    /// If there is one, a score s becomes `cap·tanh(s/cap)`.
    pub soft_cap: Option<f32>,
    /// The precision of the products of many queries.
    pub precision: Precision,
}

/// One text of a step.
#[derive(Debug)]
pub struct Reading<'a> {
    /// Its new queries, `[count, queries, size]`.
    pub q: &'a [f32],
    /// The keys of all of its tokens, of which the last are those of the queries: `[total, shared, size]`.
    pub k: &'a [f32],
    /// The values.
    pub v: &'a [f32],
    /// Whether it is a token of an answer, and not of a prompt that is read: those are computed in other ways.
    pub is_single: bool,
    /// How many tokens each query sees at most, itself among them.
    pub window: Option<usize>,
    /// The outputs, `[count, queries, size]`.
    pub y: &'a mut [f32],
}

impl Reading<'_> {
    /// The number of queries, and of keys.
    fn counts(&self, heads: &Heads) -> [usize; 2] {
        [self.q.len() / (heads.queries * heads.size), self.k.len() / (heads.shared * heads.size)]
    }

    /// The keys that a query sees.
    fn seen(&self, query: usize, [count, total]: [usize; 2]) -> Range<usize> {
        let end = total - count + query + 1;
        end - self.window.map_or(end, |it| it.min(end))..end
    }
}

/// Attention of the new tokens of some texts, each of which sees itself and those before it.
///
/// # Panics
///
/// If the slices of a text do not fit each other and the heads, or a single one has several queries.
pub fn attend(heads: &Heads, texts: Vec<Reading>) {
    let Heads { queries, shared, size, .. } = *heads;
    assert!(shared > 0 && queries.is_multiple_of(shared), "{queries} heads cannot share {shared}");
    let (mut single, mut work) = (Vec::new(), 0);
    for text in texts {
        let counts = text.counts(heads);
        let [count, total] = counts;
        assert!(
            text.q.len() == count * queries * size
                && text.k.len() == total * shared * size
                && [text.v.len(), text.y.len()] == [text.k.len(), text.q.len()]
                && count <= total,
            "{count} queries and {total} keys: {} queries, {} keys, {} values and {} outputs",
            text.q.len(),
            text.k.len(),
            text.v.len(),
            text.y.len(),
        );
        if !text.is_single {
            let range = |query| {
                let seen = text.seen(query, counts);
                [seen.start, seen.end].map(|it| it as u32)
            };
            let ranges: Vec<_> = (0..count).map(range).collect();
            let Heads { scale, soft_cap, precision, .. } = *heads;
            let Reading { q, k, v, y, .. } = text;
            let (ranges, heads) = (&*ranges, [queries, shared, size]);
            let queries = Queries { q, k, v, ranges, heads, scale, soft_cap, precision };
            y.copy_from_slice(&queries.outputs());
            continue;
        }
        assert!(count == 1, "one query expected, got {count}");
        let seen = text.seen(0, counts);
        work += seen.len() * queries * size;
        let group = queries / shared * size;
        let parts = text.q.chunks_exact(group).zip(text.y.chunks_exact_mut(group)).enumerate();
        single.extend(parts.map(|(head, (q, y))| {
            let [k, v] = [text.k, text.v].map(|it| &it[head * size..]);
            (q, k, v, seen.clone(), y)
        }));
    }
    let attention =
        Single { size, stride: shared * size, scale: heads.scale, soft_cap: heads.soft_cap };
    let one = |(q, k, v, seen, y)| attention.attend(q, k, v, seen, y);
    share(single, work, one);
}
