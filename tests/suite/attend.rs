//! Attention in blocks, and its gradients, are those of the plain formula in double precision.

use std::{env, ops::Range, process::Command};

use burn::tensor::{Tensor, TensorData, backend::Backend};
use burn_lora::nn::{AttentionMask, AttentionOptions, Precision, attention};
use burn_lora_kernels::{Instructions, VARIABLE};
use proptest::prelude::*;

use crate::{
    model::{Plain, Train, device, random_cases},
    oracle::Matrix,
};

/// Whether the crate has blocks of its own for the backend of the tests. Elsewhere the formula is composed, which is
/// the same for all sizes.
const OWN: bool = !cfg!(feature = "wgpu");

const SIZES: &[usize] =
    if OWN { &[8, 16, 24, 32, 40, 64, 80, 96, 128, 256, 1, 7, 33] } else { &[8, 33] };

const LENGTHS: &[usize] =
    if OWN { &[1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 300] } else { &[1, 33] };

/// The sizes: texts, queries, keys, heads of queries, heads of keys, numbers of a head.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    batch: usize,
    length: usize,
    total: usize,
    heads: usize,
    shared: usize,
    size: usize,
}

impl Sizes {
    /// The shape of the queries, and of the keys and values.
    fn shapes(&self) -> [[usize; 4]; 2] {
        let Self { batch, length, total, heads, shared, size } = *self;
        [[batch, length, heads, size], [batch, total, shared, size]]
    }
}

/// Queries, keys and values, and what each query sees.
struct Problem<'a> {
    sizes: Sizes,
    inputs: [Vec<f64>; 3],
    seen: &'a dyn Fn(usize, usize) -> Range<usize>,
    options: AttentionOptions,
}

impl<'a> Problem<'a> {
    fn random(
        sizes: Sizes,
        seen: &'a dyn Fn(usize, usize) -> Range<usize>,
        options: AttentionOptions,
    ) -> Self {
        let [q, k] = sizes.shapes().map(|it| it.iter().product());
        let inputs = [(q, 1), (k, 2), (k, 3)];
        let inputs = inputs.map(|(count, seed)| Matrix::random(1, count, seed).scaled(1.5).data);
        Self { sizes, inputs, seen, options }
    }

    fn mask<B: Backend>(&self) -> AttentionMask<B> {
        AttentionMask::new(self.sizes.batch, self.sizes.length, self.sizes.total, self.seen)
    }

    /// Calls `each` with text, query and head, and where the head's numbers begin in the queries.
    fn each_query(&self, mut each: impl FnMut(usize, usize, usize, usize)) {
        let Sizes { batch, length, heads, size, .. } = self.sizes;
        for index in 0..batch * length * heads {
            let (query, head) = (index / heads, index % heads);
            each(query / length, query % length, head, index * size);
        }
    }

    /// Where the numbers of a key begin that a head of queries reads.
    fn key(&self, text: usize, key: usize, head: usize) -> usize {
        let Sizes { total, heads, shared, size, .. } = self.sizes;
        ((text * total + key) * shared + head * shared / heads) * size
    }

    /// The weights of the seen keys, and the derivatives of their scores by the scaled products.
    fn weights(&self, text: usize, query: usize, head: usize, at: usize) -> Vec<[f64; 2]> {
        let (size, [q, k, _]) = (self.sizes.size, &self.inputs);
        let scale = self.options.scale.unwrap_or(1.0 / (size as f64).sqrt());
        let scores = (self.seen)(text, query).map(|key| {
            let key = self.key(text, key, head);
            let score: f64 = (0..size).map(|i| q[at + i] * k[key + i]).sum::<f64>() * scale;
            match self.options.soft_cap {
                Some(cap) => [cap * (score / cap).tanh(), 1.0 - (score / cap).tanh().powi(2)],
                None => [score, 1.0],
            }
        });
        let scores: Vec<_> = scores.collect();
        let top = scores.iter().map(|it| it[0]).fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|it| (it[0] - top).exp()).sum();
        let sum = sum + if self.options.quiet { (-top).exp() } else { 0.0 };
        scores.iter().map(|[score, inner]| [(score - top).exp() / sum, *inner]).collect()
    }

    fn output(&self) -> Vec<f64> {
        let mut y = vec![0.0; self.inputs[0].len()];
        self.each_query(|text, query, head, at| {
            let weights = self.weights(text, query, head, at);
            for (key, [weight, _]) in (self.seen)(text, query).zip(weights) {
                let key = self.key(text, key, head);
                for i in 0..self.sizes.size {
                    y[at + i] += weight * self.inputs[2][key + i];
                }
            }
        });
        y
    }

    /// The gradients of the sum of `dy · y`.
    fn gradients(&self, dy: &[f64]) -> [Vec<f64>; 3] {
        let size = self.sizes.size;
        let scale = self.options.scale.unwrap_or(1.0 / (size as f64).sqrt());
        let [q, k, v] = &self.inputs;
        let [mut dq, mut dk, mut dv] = self.inputs.each_ref().map(|it| vec![0.0; it.len()]);
        self.each_query(|text, query, head, at| {
            let weights = self.weights(text, query, head, at);
            let seen = || (self.seen)(text, query).map(|key| self.key(text, key, head));
            let d_weight = |key| (0..size).map(|i| dy[at + i] * v[key + i]).sum::<f64>();
            let mean: f64 = seen().zip(&weights).map(|(key, it)| it[0] * d_weight(key)).sum();
            for (key, [weight, inner]) in seen().zip(&weights) {
                let d_score = weight * (d_weight(key) - mean) * inner * scale;
                for i in 0..size {
                    dv[key + i] += weight * dy[at + i];
                    dq[at + i] += d_score * k[key + i];
                    dk[key + i] += d_score * q[at + i];
                }
            }
        });
        [dq, dk, dv]
    }

    /// Compares with the crate's function, in both precisions.
    #[track_caller]
    fn check(&self) {
        self.check_in(Precision::F32);
        if OWN {
            self.check_in(Precision::Bf16);
        }
    }

    #[track_caller]
    fn check_in(&self, precision: Precision) {
        let options = AttentionOptions { precision, ..self.options.clone() };
        let [queries, keys] = self.sizes.shapes();
        let shapes = [queries, keys, keys];
        let data = |index: usize| {
            let numbers: Vec<_> = self.inputs[index].iter().map(|&it| it as f32).collect();
            TensorData::new(numbers, shapes[index])
        };
        let [q, k, v] =
            [0, 1, 2].map(|it| Tensor::<Plain, 4>::from_data(data(it), &device::<Plain>()));
        let plain = attention(q, k, v, &self.mask(), &options);
        let inputs = [0, 1, 2]
            .map(|it| Tensor::<Train, 4>::from_data(data(it), &device::<Train>()).require_grad());
        let [q, k, v] = inputs.clone();
        let y = attention(q, k, v, &self.mask(), &options);
        let dy = Matrix::random(1, self.inputs[0].len(), 4);
        let grads = (y.clone() * dy.tensor(queries, &device::<Train>())).sum().backward();

        let close = |of: &str, found: TensorData, expected: &[f64]| {
            let size = expected.iter().fold(1.0_f64, |size, it| size.max(it.abs()));
            // Numbers in bf16 have 8 bits, and scores of up to 6 are sums of their products.
            let (most, mean) = match precision {
                Precision::Bf16 => (4e-2, 5e-3),
                _ => (1e-5, 1e-5),
            };
            let mut squares = 0.0;
            for (found, expected) in found.iter::<f64>().zip(expected) {
                let error = (found - expected).abs();
                squares += error * error;
                let sizes = self.sizes;
                assert!(error < most * size, "{of}, {precision}, {sizes:?}: {found}, {expected}");
            }
            let error = (squares / expected.len() as f64).sqrt();
            assert!(error < mean * size, "{of}, {precision}, {:?}: {error}", self.sizes);
        };
        let expected = self.output();
        close("y", plain.into_data(), &expected);
        close("y with autodiff", y.into_data(), &expected);
        for ((of, input), expected) in
            ["dq", "dk", "dv"].into_iter().zip(inputs).zip(self.gradients(&dy.data))
        {
            close(of, input.grad(&grads).expect("it has a gradient").into_data(), &expected);
        }
    }
}

fn sizes([batch, length, total]: [usize; 3], [heads, shared, size]: [usize; 3]) -> Sizes {
    Sizes { batch, length, total, heads, shared, size }
}

fn causal(_: usize, query: usize) -> Range<usize> {
    0..query + 1
}

#[test]
fn the_oracle_has_the_slopes_of_its_output() {
    for options in [
        AttentionOptions::default(),
        AttentionOptions {
            scale: Some(0.7),
            soft_cap: Some(2.0),
            quiet: true,
            ..Default::default()
        },
    ] {
        let mut problem =
            Problem::random(sizes([2, 3, 4], [4, 2, 3]), &|_, query| 0..query + 2, options);
        let dy = Matrix::random(1, problem.inputs[0].len(), 5).data;
        let along = |problem: &Problem| -> f64 {
            problem.output().iter().zip(&dy).map(|(y, dy)| y * dy).sum()
        };
        let gradients = problem.gradients(&dy);
        for (which, gradient) in gradients.iter().enumerate() {
            for (index, gradient) in gradient.iter().enumerate() {
                let mut at = |step: f64| {
                    problem.inputs[which][index] += step;
                    let sum = along(&problem);
                    problem.inputs[which][index] -= step;
                    sum
                };
                let slope = (at(1e-5) - at(-1e-5)) / 2e-5;
                assert!((slope - gradient).abs() < 1e-8, "{which} {index}: {slope} {gradient}");
            }
        }
    }
}

#[test]
fn of_all_widths_of_a_head() {
    for &size in SIZES {
        let problem =
            Problem::random(sizes([2, 37, 37], [6, 2, size]), &causal, Default::default());
        problem.check();
    }
}

#[test]
fn of_all_lengths() {
    for &length in LENGTHS {
        for heads in [[1, 1], [2, 2], [3, 1], [12, 1]] {
            let sizes = sizes([1, length, length], [heads[0], heads[1], 8]);
            Problem::random(sizes, &causal, Default::default()).check();
            Problem::random(sizes, &|_, _| 0..length, Default::default()).check();
        }
    }
    if OWN {
        Problem::random(sizes([1, 2000, 2000], [1, 1, 8]), &causal, Default::default()).check();
    }
}

#[test]
fn with_every_mask() {
    let lengths = [70, 3, 129];
    let padded = |text: usize, _: usize| 0..lengths[text];
    Problem::random(sizes([3, 129, 129], [4, 2, 16]), &padded, Default::default()).check();
    let sizes_of_text = sizes([1, 150, 150], [4, 2, 16]);
    let window = |_: usize, query: usize| (query + 1).saturating_sub(20)..query + 1;
    Problem::random(sizes_of_text, &window, Default::default()).check();
    // Texts of 50, 1, 60 and 30 tokens, and 9 that are nothing.
    let packed = |_: usize, query: usize| match query {
        0..50 => 0..query + 1,
        50 => 50..51,
        51..111 => 51..query + 1,
        111..141 => 111..query + 1,
        _ => 0..0,
    };
    Problem::random(sizes_of_text, &packed, Default::default()).check();
    // Texts that go on after others, of several lengths.
    let past = [100, 0, 37];
    let read = |text: usize, query: usize| 100 - past[text]..101 + query;
    Problem::random(sizes([3, 5, 105], [6, 3, 8]), &read, Default::default()).check();
}

#[test]
fn with_every_option() {
    for options in [
        AttentionOptions { scale: Some(0.3), ..Default::default() },
        AttentionOptions { soft_cap: Some(1.5), ..Default::default() },
        AttentionOptions { quiet: true, ..Default::default() },
        AttentionOptions {
            scale: Some(1.1),
            soft_cap: Some(5.0),
            quiet: true,
            ..Default::default()
        },
    ] {
        let seen = |_: usize, query: usize| query / 3..query + 1;
        Problem::random(sizes([2, 70, 70], [4, 2, 16]), &seen, options.clone()).check();
    }
}

/// The other tests use the fastest instructions.
#[test]
fn by_every_set_of_instructions() {
    for by in Instructions::ALL.into_iter().filter(|it| OWN && it.are_there()) {
        let mut tests = Command::new(env::current_exe().unwrap());
        let found = tests.arg("attend::with_every").env(VARIABLE, by.name()).output().unwrap();
        let told = String::from_utf8_lossy(&found.stdout);
        assert!(found.status.success() && told.contains("2 passed"), "{by}: {told}");
    }
}

#[test]
fn the_precision_matters_for_more_than_four_queries() {
    for (length, differs) in [(4, false), (5, OWN)] {
        let sizes = sizes([1, length, length], [2, 1, 16]);
        let problem = Problem::random(sizes, &causal, Default::default());
        let [full, half] = [Precision::F32, Precision::Bf16].map(|precision| {
            let [queries, keys] = sizes.shapes();
            let [q, k, v] = [(0, queries), (1, keys), (2, keys)].map(|(index, shape)| {
                let numbers: Vec<_> = problem.inputs[index].iter().map(|&it| it as f32).collect();
                Tensor::<Plain, 4>::from_data(TensorData::new(numbers, shape), &device::<Plain>())
            });
            let options = AttentionOptions { precision, ..Default::default() };
            attention(q, k, v, &problem.mask(), &options).into_data()
        });
        assert_eq!(full != half, differs, "{length}");
    }
}

/// A group of more heads than are together in most models.
#[test]
fn of_many_heads_of_queries_with_one_of_keys() {
    Problem::random(sizes([2, 20, 20], [71, 1, 16]), &causal, Default::default()).check();
}

#[test]
fn large_scores_do_not_overflow() {
    let mut problem = Problem::random(sizes([1, 140, 140], [2, 1, 8]), &causal, Default::default());
    problem.inputs[0].iter_mut().for_each(|it| *it *= 60.0);
    let y = problem.output();
    let [queries, keys] = problem.sizes.shapes();
    let tensor = |numbers: &[f64], shape| {
        let numbers: Vec<_> = numbers.iter().map(|&it| it as f32).collect();
        Tensor::<Plain, 4>::from_data(TensorData::new(numbers, shape), &device::<Plain>())
    };
    let [q, k, v] =
        [(0, queries), (1, keys), (2, keys)].map(|(i, shape)| tensor(&problem.inputs[i], shape));
    let found = attention(q, k, v, &problem.mask(), &Default::default()).into_data();
    for (found, expected) in found.iter::<f64>().zip(y) {
        // The scores are exact to some 1e-5.
        assert!((found - expected).abs() < 1e-3, "{found} {expected}");
    }
}

proptest! {
    #![proptest_config(random_cases(40))]
    #[test]
    fn of_random_sizes_and_masks(
        batch in 1..4_usize, length in 1..80_usize, more in 0..80_usize,
        shared in 1..4_usize, group in 1..5_usize, size in 1..40_usize, seed in 0..1000_u64,
    ) {
        let total = length + more;
        let numbers = Matrix::random(2, batch * length, seed).map(|it| (it + 1.0) / 2.0 * total as f64);
        let seen = |text: usize, query: usize| {
            let [a, b] = [0, 1].map(|row| numbers.at(row, text * length + query) as usize);
            // Some see nothing.
            if a < b { a..b } else if a == b { a..a + 1 } else { 0..0 }
        };
        Problem::random(sizes([batch, length, total], [shared * group, shared, size]), &seen, Default::default()).check();
    }
}
