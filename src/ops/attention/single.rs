//! Attention of one query for each head: a token of an answer.

use std::ops::Range;

use crate::ops::simd::{exp_of_negative, largest, sum_of, sum_of_pairs, tanh, widest};

/// How scores become weights.
#[derive(Clone, Copy)]
pub(crate) struct Single {
    /// The numbers of a head.
    pub size: usize,
    /// From the numbers of a key to those of the next.
    pub stride: usize,
    pub scale: f32,
    pub soft_cap: Option<f32>,
}

impl Single {
    /// The outputs of the heads that share a head of keys, `[group, size]`, of the keys that are seen. `k` and `v` begin
    /// with the numbers of that head.
    pub fn attend(&self, q: &[f32], k: &[f32], v: &[f32], seen: Range<usize>, y: &mut [f32]) {
        let Self { size, stride, .. } = *self;
        let mut weights = vec![0.0; q.len() / size * seen.len()];
        let of = |key: usize| key * stride..key * stride + size;
        widest(
            #[inline(always)]
            || {
                for (place, key) in seen.clone().enumerate() {
                    let key = &k[of(key)];
                    for (head, q) in q.chunks_exact(size).enumerate() {
                        weights[head * seen.len() + place] = self.score(q, key);
                    }
                }
                y.fill(0.0);
                let heads = weights.chunks_exact_mut(seen.len()).zip(y.chunks_exact_mut(size));
                for (weights, y) in heads {
                    let top = largest(weights);
                    for weight in &mut *weights {
                        *weight = exp_of_negative(*weight - top);
                    }
                    let factor = 1.0 / sum_of(weights, |it| it);
                    for (key, weight) in seen.clone().zip(weights) {
                        let value = &v[of(key)];
                        for (y, value) in y.iter_mut().zip(value) {
                            *y += *weight * value;
                        }
                    }
                    y.iter_mut().for_each(|y| *y *= factor);
                }
            },
        );
    }

    #[inline(always)]
    fn score(&self, q: &[f32], k: &[f32]) -> f32 {
        let score = self.scale * sum_of_pairs(q, k, |q, k| q * k);
        match self.soft_cap {
            Some(cap) => cap * tanh(score / cap),
            None => score,
        }
    }
}
