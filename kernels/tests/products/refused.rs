//! What cannot be multiplied.

use burn_lora_kernels::{Instructions, Left, Matrix, Output, Right, Term, multiply, multiply_by};

fn multiply_shapes(left: [usize; 2], right: [usize; 2], to: [usize; 2]) {
    let numbers = [1.0f32; 100];
    let left = Left::new(&Matrix::new(&numbers, left));
    let matrix = Matrix::new(&numbers, right);
    let term = Term { left: &left, right: Right::Plain(&matrix) };
    multiply(&[term], Output::new(&mut [0.0; 100], to));
}

#[test]
fn shapes_that_fit() {
    multiply_shapes([2, 3], [3, 5], [2, 5]);
}

#[test]
#[should_panic(expected = "a product of 2 x 3 with 4 x 5 numbers cannot be 2 x 5")]
fn sums_of_different_lengths() {
    multiply_shapes([2, 3], [4, 5], [2, 5]);
}

#[test]
#[should_panic(expected = "a product of 2 x 3 with 3 x 5 numbers cannot be 3 x 5")]
fn another_number_of_rows() {
    multiply_shapes([2, 3], [3, 5], [3, 5]);
}

#[test]
#[should_panic(expected = "a product of 2 x 3 with 3 x 5 numbers cannot be 2 x 4")]
fn another_number_of_columns() {
    multiply_shapes([2, 3], [3, 5], [2, 4]);
}

#[test]
#[should_panic(expected = "a product of 2 x 3 with 5 x 3 numbers cannot be 2 x 5")]
fn a_factor_that_is_not_said_to_be_transposed() {
    multiply_shapes([2, 3], [5, 3], [2, 5]);
}

/// Even where nothing is computed.
#[test]
#[should_panic(expected = "a product of 0 x 3 with 4 x 5 numbers cannot be 0 x 5")]
fn wrong_shapes_without_rows() {
    multiply_shapes([0, 3], [4, 5], [0, 5]);
}

#[test]
#[should_panic(expected = "2 x 3 numbers expected, 3 apart, got 5")]
fn a_matrix_with_too_few_numbers() {
    Matrix::new(&[0.0f32; 5], [2, 3]);
}

#[test]
#[should_panic(expected = "rows of 3 numbers cannot begin 2 apart")]
fn a_matrix_whose_rows_overlap() {
    Matrix::strided(&[0.0f32; 9], [2, 3], 2);
}

#[test]
#[should_panic(expected = "2 x 3 numbers expected, 4 apart, got 6")]
fn an_output_with_too_few_numbers() {
    Output::strided(&mut [0.0; 6], [2, 3], 4);
}

#[test]
#[should_panic(expected = "rows of 3 numbers cannot begin 2 apart")]
fn an_output_whose_rows_overlap() {
    Output::strided(&mut [0.0; 9], [2, 3], 2);
}

#[test]
fn instructions_that_are_not_there() {
    let left = Left::new(&Matrix::new(&[1.0f32], [1, 1]));
    let matrix = Matrix::new(&[1.0f32], [1, 1]);
    for by in Instructions::ALL.into_iter().filter(|it| !it.are_there()) {
        let result = std::panic::catch_unwind(|| {
            let term = Term { left: &left, right: Right::Plain(&matrix) };
            multiply_by(by, &[term], Output::new(&mut [0.0], [1, 1]));
        });
        let message = *result.unwrap_err().downcast::<String>().unwrap();
        assert!(message.contains(&format!("this processor has no {by}")), "{message}");
    }
}
