//! Products in `f32` with rows that are unpacked on the way.

use std::ops::Range;

use burn_lora_kernels::{Instructions, Stripes};
use rand::{RngExt, rngs::StdRng};

use crate::oracle::{random, there};

/// Numbers of one seed.
fn numbers(count: usize, rng: &mut StdRng) -> Vec<f32> {
    (0..count).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// The products, `[rows, outputs]`.
fn products(by: Instructions, x: &[f32], weight: &[f32], inner: usize) -> Vec<f32> {
    let mut stripes = Stripes::default();
    // What is in the memory from before does not count.
    stripes.fill(&vec![f32::NAN; 40 * inner], inner);
    stripes.fill(x, inner);
    let (rows, outputs) = (x.len() / inner, weight.len() / inner);
    assert_eq!([stripes.rows(), stripes.inner()], [rows, inner]);
    let mut y = vec![f32::NAN; rows * outputs];
    let mut to: Vec<_> = y.chunks_exact_mut(outputs).collect();
    let unpack = |rows: Range<usize>, stride: usize, to: &mut [f32]| {
        let weight = weight[rows.start * inner..].chunks_exact(inner);
        to.chunks_exact_mut(stride)
            .zip(weight)
            .for_each(|(to, row)| to[..inner].copy_from_slice(row));
    };
    stripes.times(by, outputs, unpack, &mut to);
    y
}

#[test]
fn are_those_of_a_loop_in_f64_by_all_instructions() {
    let mut rng = random(7);
    for rows in [0, 1, 8, 15, 16, 17, 32, 33, 70] {
        for (inner, outputs) in [(1, 1), (31, 5), (64, 12), (65, 13), (200, 40), (5000, 27)] {
            let (x, weight) = (numbers(rows * inner, &mut rng), numbers(outputs * inner, &mut rng));
            for by in there() {
                let found = products(by, &x, &weight, inner);
                for (place, found) in found.into_iter().enumerate() {
                    let (x, weight) =
                        (&x[place / outputs * inner..], &weight[place % outputs * inner..]);
                    let expected: f64 = x
                        .iter()
                        .zip(weight)
                        .take(inner)
                        .map(|(x, w)| f64::from(*x) * f64::from(*w))
                        .sum();
                    let error = (f64::from(found) - expected).abs();
                    assert!(
                        error < 1e-6 * inner as f64,
                        "{by} {rows}x{inner}x{outputs}: {found} {expected}"
                    );
                }
            }
        }
    }
}

/// A row alone, among few and among many has the same results, to the bit, and so has a part of the outputs.
#[test]
fn do_not_depend_on_other_rows_and_outputs() {
    let (mut rng, inner, outputs) = (random(8), 300, 29);
    let (x, weight) = (numbers(70 * inner, &mut rng), numbers(outputs * inner, &mut rng));
    for by in there() {
        let all = products(by, &x, &weight, inner);
        for rows in [0..1, 3..20, 40..70] {
            let part = products(by, &x[rows.start * inner..rows.end * inner], &weight, inner);
            assert_eq!(part, all[rows.start * outputs..rows.end * outputs], "{by}");
        }
        let some = products(by, &x, &weight[7 * inner..18 * inner], inner);
        for (some, all) in some.chunks(11).zip(all.chunks(outputs)) {
            assert_eq!(some, &all[7..18], "{by}");
        }
    }
}

#[test]
#[should_panic(expected = "slices for rows")]
fn need_a_slice_for_each_row() {
    let mut stripes = Stripes::default();
    stripes.fill(&[1.0; 6], 3);
    stripes.times(Instructions::Portable, 1, |_, _, to| to.fill(1.0), &mut [&mut [0.0]]);
}

#[test]
#[should_panic(expected = "7 numbers in rows of 3")]
fn need_whole_rows() {
    Stripes::default().fill(&[1.0; 7], 3);
}
