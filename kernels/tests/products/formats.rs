//! Factors of 16 bits.

use burn_lora_kernels::{Left, Matrix, Number, Output, Term, multiply_by};
use half::{bf16, f16};

use crate::oracle::{Factors, HELD, Held, assert_near, random, right, there};

/// Compares the product of numbers of 16 bits with that of the same numbers in `f32`.
fn check<T: Number>(of: fn(f32) -> T, to: fn(T) -> f32, unit: f32) {
    for dims @ [rows, inner, columns] in [[1, 1, 1], [5, 33, 7], [34, 70, 45]] {
        let mut factors = Factors::fractions(dims, &mut random(12));
        for numbers in [&mut factors.left, &mut factors.right] {
            numbers.iter_mut().for_each(|it| *it = to(of(*it * unit)));
        }
        let expected = factors.expected();
        for held in HELD {
            let left: Vec<_> = factors.left.iter().copied().map(of).collect();
            let left = Left::new(&Matrix::new(&left, [rows, inner]));
            let numbers: Vec<_> = factors.right_as(held).into_iter().map(of).collect();
            let shape = if held == Held::Plain { [inner, columns] } else { [columns, inner] };
            let matrix = Matrix::new(&numbers, shape);
            for by in there() {
                let term = Term { left: &left, right: right(&matrix, held) };
                let mut found = vec![f32::NAN; rows * columns];
                multiply_by(by, &[term], Output::new(&mut found, [rows, columns]));
                assert_near(&found, &expected, inner, &format!("{dims:?} by {by}, {held:?}"));
            }
        }
    }
}

#[test]
fn bf16_is_multiplied_as_it_is() {
    check(bf16::from_f32, bf16::to_f32, 1.0);
    check(bf16::from_f32, bf16::to_f32, 1e15);
}

#[test]
fn f16_is_rounded() {
    check(f16::from_f32, f16::to_f32, 1.0);
    // What is subnormal in f16 is not in bf16, and counts.
    check(f16::from_f32, f16::to_f32, 1e-6);
}
