//! Functions on slices are those of `nn`.

use burn::{
    module::Param,
    nn::RmsNorm,
    tensor::{Tensor, TensorData},
};
use burn_lora::{
    decode::{self, Gate, Heads, Reading},
    nn::{
        AttentionMask, AttentionOptions, Precision, attention, geglu, rms_norm, rotate, soft_cap,
        swiglu,
    },
};

use crate::{
    model::{Plain, device},
    oracle::{Matrix, assert_close},
};

fn random(count: usize, seed: u64) -> Vec<f32> {
    Matrix::random(1, count, seed).data.into_iter().map(|it| 3.0 * it as f32).collect()
}

fn tensor<const D: usize>(numbers: &[f32], shape: [usize; D]) -> Tensor<Plain, D> {
    Tensor::from_data(TensorData::new(numbers.to_vec(), shape), &device::<Plain>())
}

#[track_caller]
fn assert_same<const D: usize>(found: &[f32], expected: Tensor<Plain, D>) {
    let shape = expected.dims();
    let data: Vec<f64> = expected.into_data().iter().collect();
    assert_close(tensor(found, shape), &Matrix { rows: 1, cols: data.len(), data }, 3e-6);
}

#[test]
fn gates_norms_rotations_and_caps() {
    // The last is long enough for several threads.
    for rows in [1, 3, 400] {
        let (x, up) = (random(rows * 48, 1), random(rows * 48, 2));
        let mut y = x.clone();
        decode::gate(&mut y, &up, Gate::Silu);
        assert_same(&y, swiglu(tensor(&x, [rows, 48]), tensor(&up, [rows, 48])));
        y.copy_from_slice(&x);
        decode::gate(&mut y, &up, Gate::GeluTanh);
        assert_same(&y, geglu(tensor(&x, [rows, 48]), tensor(&up, [rows, 48])));

        let weight = random(48, 3);
        let gamma = Param::from_tensor(tensor(&weight, [48]));
        decode::norm(&x, &weight, 1e-2, &mut y);
        assert_same(&y, rms_norm(&RmsNorm { gamma, epsilon: 1e-2 }, tensor(&x, [rows, 48])));

        // Heads of 12 numbers, of which the first ten turn.
        let (cos, sin) = (random(rows * 5, 4), random(rows * 5, 5));
        y.copy_from_slice(&x);
        for (row, heads) in y.chunks_exact_mut(48).enumerate() {
            let of = row * 5..(row + 1) * 5;
            decode::rotate(heads, 12, &cos[of.clone()], &sin[of]);
        }
        let [cos, sin] = [&cos, &sin].map(|it| tensor(it, [1, rows, 5]));
        assert_same(&y, rotate(tensor(&x, [1, rows, 4, 12]), cos, sin));

        y.copy_from_slice(&x);
        decode::cap(&mut y, 0.7);
        assert_same(&y, soft_cap(tensor(&x, [rows, 48]), 0.7));
        y.copy_from_slice(&x);
        decode::add_scaled(&mut y, 0.3, &up);
        assert_same(&y, tensor(&x, [rows, 48]) + tensor(&up, [rows, 48]) * 0.3);
    }
}

#[test]
fn weights_are_proportional_to_probabilities() {
    let scores = random(1000, 1);
    let mut weights = scores.clone();
    let sum = decode::weigh(&mut weights, 0.7);
    let expected = burn::tensor::activation::softmax(tensor(&scores, [1, 1000]) / 0.7, 1);
    let found: Vec<_> = weights.iter().map(|it| 1000.0 * it / sum).collect();
    assert_same(&found, expected * 1000.0);
}

fn heads(soft_cap: Option<f32>) -> Heads {
    let precision = Precision::F32;
    Heads { queries: 6, shared: 2, size: 20, scale: 0.3, soft_cap, precision }
}

fn attend(
    heads: &Heads,
    [q, k, v]: [&[f32]; 3],
    window: Option<usize>,
    is_single: bool,
) -> Vec<f32> {
    let mut y = vec![f32::NAN; q.len()];
    decode::attend(heads, vec![Reading { q, k, v, is_single, window, y: &mut y }]);
    y
}

#[test]
fn attention_is_that_of_tensors() {
    for (total, count) in [(1, 1), (5, 5), (9, 2), (300, 40), (130, 1), (270, 129)] {
        for window in [None, Some(3), Some(150)] {
            for soft_cap in [None, Some(2.0)] {
                let heads = heads(soft_cap);
                let q = random(count * 120, 1);
                let [k, v] = [2, 3].map(|seed| random(total * 40, seed));
                let seen = |_, query: usize| {
                    let end = total - count + query + 1;
                    window.map_or(0, |it| end.saturating_sub(it))..end
                };
                let mask = AttentionMask::<Plain>::new(1, count, total, seen);
                let options = AttentionOptions {
                    scale: Some(0.3),
                    soft_cap: soft_cap.map(f64::from),
                    ..Default::default()
                };
                let [keys, values] = [&k, &v].map(|it| tensor(it, [1, total, 2, 20]));
                let queries = tensor(&q, [1, count, 6, 20]);
                let expected = attention(queries, keys, values, &mask, &options);
                assert_same(&attend(&heads, [&q, &k, &v], window, false), expected.clone());
                if count == 1 {
                    assert_same(&attend(&heads, [&q, &k, &v], window, true), expected);
                }
            }
        }
    }
}

/// To the bit, so that it does not count in which parts a prompt is read.
#[test]
fn attention_of_a_query_does_not_depend_on_other_queries() {
    let total = 400;
    for size in [2, 20, 64] {
        let heads = Heads { size, ..heads(None) };
        let [width, shared] = [6 * size, 2 * size];
        let q = random(total * width, 1);
        let [k, v] = [2, 3].map(|seed| random(total * shared, seed));
        for window in [None, Some(7), Some(130)] {
            let all = attend(&heads, [&q, &k, &v], window, false);
            let mut start = 0;
            for count in [1, 2, 5, 30, 64, 90, 1, 128, 79] {
                let end = start + count;
                let (of_q, of_k) = (start * width..end * width, 0..end * shared);
                let part = [&q[of_q.clone()], &k[of_k.clone()], &v[of_k]];
                let found = attend(&heads, part, window, false);
                assert!(found == all[of_q], "{size}, {window:?}: queries {start} to {end}");
                start = end;
            }
            assert_eq!(start, total);
        }
    }
}

#[test]
fn texts_attend_to_themselves() {
    let heads = heads(None);
    let texts: Vec<_> = [(1, 3, true), (4, 9, false), (1, 200, true), (1, 1, false)]
        .into_iter()
        .enumerate()
        .map(|(seed, (count, total, is_single))| {
            let seed = 10 * seed as u64;
            let q = random(count * 120, seed);
            let [k, v] = [1, 2].map(|it| random(total * 40, seed + it));
            (q, k, v, is_single)
        })
        .collect();
    let mut outputs: Vec<_> = texts.iter().map(|(q, ..)| vec![0.0; q.len()]).collect();
    let readings = texts.iter().zip(&mut outputs).map(|((q, k, v, is_single), y)| Reading {
        q,
        k,
        v,
        is_single: *is_single,
        window: Some(50),
        y,
    });
    decode::attend(&heads, readings.collect());
    for ((q, k, v, is_single), found) in texts.iter().zip(&outputs) {
        assert!(*found == attend(&heads, [q, k, v], Some(50), *is_single));
    }
}
