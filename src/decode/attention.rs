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
    fn seen(&self, query: usize, [count, total]: [usize; 2]) -> [u32; 2] {
        let end = total - count + query + 1;
        [end - self.window.map_or(end, |it| it.min(end)), end].map(|it| it as u32)
    }
}

/// Attention of the new tokens of some texts, each of which sees itself and those before it.
///
/// # Panics
///
/// If the slices of a text do not fit each other and the heads, or a single one has several queries.
pub fn attend(heads: &Heads, mut texts: Vec<Reading>) {
    let Heads { queries, shared, size, scale, soft_cap, precision } = *heads;
    assert!(shared > 0 && queries.is_multiple_of(shared), "{queries} heads cannot share {shared}");
    let check = |text: &Reading| {
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
        assert!(count == 1 || !text.is_single, "one query expected, got {count}");
        let seen = (0..count).map(|query| text.seen(query, counts));
        seen.collect::<Vec<_>>()
    };
    let ranges: Vec<_> = texts.iter().map(check).collect();
    let single = Single { size, stride: shared * size, scale, soft_cap };
    let (mut jobs, mut work) = (Vec::new(), 0);
    for (text, ranges) in texts.iter_mut().zip(&ranges) {
        let Reading { q, k, v, is_single, y, .. } = text;
        work += ranges.iter().map(|[start, end]| (end - start) as usize).sum::<usize>()
            * queries
            * size;
        if *is_single {
            let group = queries / shared * size;
            let parts = q.chunks_exact(group).zip(y.chunks_exact_mut(group)).enumerate();
            jobs.extend(parts.map(|(head, (q, y))| {
                let [k, v] = [&*k, &*v].map(|it| &it[head * size..]);
                Job::Head { q, k, v, seen: ranges[0], y }
            }));
            continue;
        }
        let of_text =
            Queries { q, k, v, ranges, heads: [queries, shared, size], scale, soft_cap, precision };
        if precision == Precision::Bf16 {
            y.copy_from_slice(&of_text.outputs());
            continue;
        }
        let each = ranges.len().div_ceil(rayon::current_num_threads()).min(QUERIES);
        let parts = y.chunks_mut(each * queries * size).enumerate();
        jobs.extend(parts.map(|(part, y)| {
            let queries = part * each..ranges.len().min((part + 1) * each);
            Job::Queries { of_text, queries, y }
        }));
    }
    share(jobs, work, |job| match job {
        Job::Head { q, k, v, seen: [start, end], y } => {
            single.attend(q, k, v, start as usize..end as usize, y);
        }
        Job::Queries { of_text, queries, y } => of_text.outputs_here(queries, y),
    });
}

/// The queries that a thread takes at once.
const QUERIES: usize = 64;

/// A part of an attention.
enum Job<'a> {
    /// A head of keys of a token of an answer, from its numbers in the first key on.
    Head { q: &'a [f32], k: &'a [f32], v: &'a [f32], seen: [u32; 2], y: &'a mut [f32] },
    /// Some queries of a prompt.
    Queries { of_text: Queries<'a>, queries: Range<usize>, y: &'a mut [f32] },
}
