//! Matrices in block formats.

use burn_lora_kernels::{
    BlockFormat, Blocks, Left, Matrix, Output, Right, Rows, Term, Vector8, dots, multiply,
    round_all,
};

use crate::oracle::{numbers, random, row};

fn bytes(format: BlockFormat, [rows, columns]: [usize; 2]) -> Vec<u8> {
    let mut random = random(12);
    (0..rows).flat_map(|_| row(format, columns, &mut random)).collect()
}

#[test]
fn rows_are_unpacked_and_rounded() {
    for format in BlockFormat::ALL {
        let dims @ [rows, columns] = [3, 4608];
        let bytes = bytes(format, dims);
        let matrix = Blocks::new(format, &bytes, dims);
        assert_eq!((matrix.dims(), matrix.format()), (dims, format));
        for row in 0..rows {
            let mut expected = vec![0; columns];
            let mut numbers = vec![0.0; columns];
            format.unpack(matrix.row(row), &mut numbers);
            round_all(&numbers, &mut expected);
            for (start, end) in [(0, columns), (0, 0), (0, 32), (32, 64), (224, 4608), (96, 2144)] {
                let mut found = vec![1; end - start];
                matrix.write(row, start, &mut found);
                assert_eq!(found, expected[start..end], "{format:?}, {start} to {end}");
            }
        }
    }
}

#[test]
fn they_are_factors_of_products_in_bf16() {
    for format in BlockFormat::ALL {
        let dims @ [rows, columns] = [70, 2816];
        let bytes = bytes(format, dims);
        let matrix = Blocks::new(format, &bytes, dims);
        let mut dense = vec![0.0; rows * columns];
        for (row, numbers) in dense.chunks_exact_mut(columns).enumerate() {
            format.unpack(matrix.row(row), numbers);
        }
        let x = numbers(5 * columns, &mut random(13));
        let left = Left::new(&Matrix::new(&x, [5, columns]));
        let product = |right: &dyn Rows| {
            let mut result = vec![0.0; 5 * rows];
            let term = Term { left: &left, right: Right::Transposed(right) };
            multiply(&[term], Output::new(&mut result, [5, rows]));
            result
        };
        assert_eq!(product(&matrix), product(&Matrix::new(&dense, dims)), "{format:?}");
    }
}

#[test]
fn products_with_vectors_are_those_of_rows() {
    for format in BlockFormat::ALL {
        let dims @ [rows, columns] = [9, 768];
        let bytes = bytes(format, dims);
        let matrix = Blocks::new(format, &bytes, dims);
        let x = Vector8::new(&numbers(columns, &mut random(14)));
        let mut found = vec![f32::NAN; rows];
        matrix.times(dots(), &x, &mut found);
        for (row, found) in found.iter().enumerate() {
            assert_eq!(*found, format.dot(dots(), matrix.row(row), &x));
        }
    }
}

#[test]
fn empty_matrices_have_no_rows_or_no_numbers() {
    for format in BlockFormat::ALL {
        Blocks::new(format, &[], [0, 256]).times(dots(), &Vector8::new(&[1.0; 256]), &mut []);
        let mut found = [f32::NAN; 3];
        let empty = Blocks::new(format, &[], [3, 0]);
        empty.times(dots(), &Vector8::new(&[]), &mut found);
        assert_eq!(found, [0.0; 3]);
        empty.write(2, 0, &mut []);
    }
}

#[test]
#[should_panic(expected = "there are 2 rows, and none with the number 2")]
fn a_row_that_is_not_there_is_refused() {
    Blocks::new(BlockFormat::Q8_0, &[0; 68], [2, 32]).row(2);
}

#[test]
#[should_panic(expected = "96 columns are no blocks of 256")]
fn columns_that_are_no_blocks_are_refused() {
    Blocks::new(BlockFormat::Q6_K, &[0; 210], [1, 96]);
}

#[test]
#[should_panic(expected = "bytes of 2 x 32 numbers in Q4_0")]
fn too_few_bytes_are_refused() {
    Blocks::new(BlockFormat::Q4_0, &[0; 35], [2, 32]);
}

#[test]
#[should_panic(expected = "numbers of the result and of the vector")]
fn a_result_of_another_length_is_refused() {
    let matrix = Blocks::new(BlockFormat::Q4_0, &[0; 36], [2, 32]);
    matrix.times(dots(), &Vector8::new(&[1.0; 32]), &mut [0.0]);
}
