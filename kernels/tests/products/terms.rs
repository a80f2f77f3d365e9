//! Sums of several products.

use burn_lora_kernels::{Left, Matrix, Output, Right, Term, multiply_by};

use crate::oracle::{Factors, HELD, Held, assert_near, matrix, random, right, there};

/// The sum of products whose second factors are held in the one and the other way in turn.
fn check(rows: usize, inner: &[usize], columns: usize) {
    let mut random = random(3);
    let factors: Vec<_> = inner
        .iter()
        .map(|&inner| Factors::fractions([rows, inner, columns], &mut random))
        .collect();
    let held = |term: usize| HELD[term % 2];
    let lefts: Vec<_> =
        factors.iter().map(|it| Left::new(&Matrix::new(&it.left, [rows, it.dims[1]]))).collect();
    let numbers: Vec<_> =
        factors.iter().enumerate().map(|(term, it)| it.right_as(held(term))).collect();
    let matrices: Vec<_> = numbers
        .iter()
        .zip(inner)
        .enumerate()
        .map(|(term, (it, &inner))| matrix(it, [inner, columns], held(term)))
        .collect();
    let terms: Vec<_> = lefts
        .iter()
        .zip(&matrices)
        .enumerate()
        .map(|(term, (left, matrix))| Term { left, right: right(matrix, held(term)) })
        .collect();
    let mut expected = (vec![0.0; rows * columns], vec![0.0; rows * columns]);
    for factors in &factors {
        let (sums, magnitudes) = factors.expected();
        expected.0.iter_mut().zip(sums).for_each(|(to, sum)| *to += sum);
        expected.1.iter_mut().zip(magnitudes).for_each(|(to, magnitude)| *to += magnitude);
    }
    for by in there() {
        let mut found = vec![f32::NAN; rows * columns];
        multiply_by(by, &terms, Output::new(&mut found, [rows, columns]));
        let what = format!("{rows} rows, {columns} columns, sums of {inner:?} by {by}");
        assert_near(&found, &expected, inner.iter().sum(), &what);
    }
}

#[test]
fn products_are_added_up() {
    check(5, &[3, 4], 7);
    check(33, &[8, 64, 16], 40);
    check(1, &[1; 9], 1);
    check(40, &[0, 5, 0], 3);
    check(2, &[0], 3);
    check(2, &[0, 0], 3);
}

/// A term that begins or ends anywhere in a pass over what is summed up.
#[test]
fn products_are_added_up_over_several_passes() {
    check(3, &[1000, 1500, 31], 5);
    check(3, &[2048, 1], 5);
    check(3, &[2047, 2], 5);
    check(2, &[2040, 10, 2050], 70);
    check(1, &[5000, 5000], 2);
    check(2, &[16, 2048], 33);
    check(2, &[2016, 31, 17], 33);
}

#[test]
fn no_products_are_zero() {
    check(3, &[], 40);
}

#[test]
fn a_left_factor_can_be_used_again() {
    let factors = Factors::whole([9, 33, 9], &mut random(4));
    let left = Left::new(&Matrix::new(&factors.left, [9, 33]));
    let matrix = matrix(&factors.right, [33, 9], Held::Plain);
    let term = Term { left: &left, right: Right::Plain(&matrix) };
    let (expected, _) = factors.expected();
    for by in there() {
        let mut found = vec![0.0; 81];
        multiply_by(by, &[term, term, term], Output::new(&mut found, [9, 9]));
        assert!(found.iter().zip(&expected).all(|(&it, expected)| f64::from(it) == 3.0 * expected));
    }
}
