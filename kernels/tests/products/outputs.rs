//! Where numbers are read from, and where results go.

use burn_lora_kernels::{
    Instructions, Left, Matrix, Output, Right, Rows, Term, multiply_by, round_all,
};

use crate::oracle::{Factors, HELD, Held, random, right, there, transposed};

/// Rows that begin `stride` apart, with numbers between them that would be noticed.
fn spread(numbers: &[f32], [rows, columns]: [usize; 2], stride: usize) -> Vec<f32> {
    let mut spread = vec![f32::NAN; rows * stride];
    for row in 0..rows {
        spread[row * stride..][..columns].copy_from_slice(&numbers[row * columns..][..columns]);
    }
    spread
}

const SIZES: [[usize; 3]; 6] =
    [[1, 1, 1], [5, 7, 3], [31, 32, 33], [33, 65, 31], [40, 3, 96], [4, 2100, 34]];

#[test]
fn rows_can_begin_apart() {
    let mut random = random(5);
    for dims @ [rows, inner, columns] in SIZES {
        let factors = Factors::whole(dims, &mut random);
        let (expected, _) = factors.expected();
        for (held, gap) in HELD.into_iter().flat_map(|held| [(held, 0), (held, 1), (held, 40)]) {
            let left = spread(&factors.left, [rows, inner], inner + gap);
            let left = Left::new(&Matrix::strided(&left, [rows, inner], inner + gap));
            assert_eq!(left.dims(), [rows, inner]);
            let (numbers, shape) = match held {
                Held::Plain => (factors.right.clone(), [inner, columns]),
                Held::Transposed => {
                    (transposed(&factors.right, [inner, columns]), [columns, inner])
                }
            };
            let numbers = spread(&numbers, shape, shape[1] + gap);
            let matrix = Matrix::strided(&numbers, shape, shape[1] + gap);
            assert_eq!(right(&matrix, held).dims(), [inner, columns]);
            let term = Term { left: &left, right: right(&matrix, held) };
            for by in there() {
                for adds in [false, true] {
                    let (stride, before) = (columns + gap, gap);
                    let mut found = vec![7.0; before + rows * stride];
                    let output = Output::strided(&mut found[before..], [rows, columns], stride);
                    multiply_by(by, &[term], if adds { output.adding() } else { output });
                    let there = if adds { 7.0 } else { 0.0 };
                    for (place, &found) in found.iter().enumerate() {
                        let place = place.checked_sub(before).map(|it| (it / stride, it % stride));
                        let expected = match place {
                            Some((row, column)) if column < columns => {
                                there + expected[row * columns + column]
                            }
                            _ => 7.0,
                        };
                        assert_eq!(f64::from(found), expected, "{dims:?} by {by}, {place:?}");
                    }
                }
            }
        }
    }
}

/// The last row need not be followed by a gap.
#[test]
fn slices_can_end_with_the_last_number() {
    let mut found = [1.0; 8];
    let numbers = [2.0; 8];
    let matrix = Matrix::strided(&numbers, [2, 3], 5);
    let left = Left::new(&Matrix::new(&[1.0f32; 4], [2, 2]));
    for by in there() {
        let term = Term { left: &left, right: Right::Plain(&matrix) };
        multiply_by(by, &[term], Output::strided(&mut found, [2, 3], 5));
        assert_eq!(found, [4.0, 4.0, 4.0, 1.0, 1.0, 4.0, 4.0, 4.0]);
    }
}

/// What comes before is neither read nor changed where nothing is summed up.
#[test]
fn sums_of_nothing_are_zero_or_change_nothing() {
    let left = Left::new(&Matrix::<f32>::new(&[], [3, 0]));
    let matrix = Matrix::<f32>::new(&[], [0, 4]);
    for by in there() {
        for terms in [&[][..], &[Term { left: &left, right: Right::Plain(&matrix) }]] {
            let mut found = [f32::NAN; 12];
            multiply_by(by, terms, Output::new(&mut found, [3, 4]));
            assert_eq!(found, [0.0; 12]);
            let mut found = [5.0; 12];
            multiply_by(by, terms, Output::new(&mut found, [3, 4]).adding());
            assert_eq!(found, [5.0; 12]);
        }
    }
}

#[test]
fn results_without_numbers_change_nothing() {
    let left = Left::new(&Matrix::<f32>::new(&[1.0; 6], [2, 3]));
    let matrix = Matrix::<f32>::new(&[], [3, 0]);
    for by in there() {
        let term = Term { left: &left, right: Right::Plain(&matrix) };
        let mut found = [5.0; 6];
        multiply_by(by, &[term], Output::strided(&mut found, [2, 0], 3));
        assert_eq!(found, [5.0; 6]);
    }
}

/// For any number of passes over what is summed up, and of panels and threads.
#[test]
fn a_bias_is_added_to_each_row_once() {
    let mut random = random(14);
    for dims @ [rows, inner, columns] in
        [[3, 0, 33], [1, 1, 1], [33, 7, 70], [2, 4200, 34], [2, 2048, 400], [40, 33, 800]]
    {
        let factors = Factors::whole(dims, &mut random);
        let (expected, _) = factors.expected();
        let bias: Vec<_> = (0..columns).map(|it| it as f32).collect();
        let left = Left::new(&Matrix::new(&factors.left, [rows, inner]));
        let matrix = Matrix::new(&factors.right, [inner, columns]);
        let term = Term { left: &left, right: Right::Plain(&matrix) };
        for by in there() {
            for (adds, threads) in [(false, 1), (true, 1), (false, 3), (true, 3)] {
                let mut found = vec![7.0; rows * columns];
                let output = Output::new(&mut found, [rows, columns]).with_bias(&bias);
                let output = if adds { output.adding() } else { output };
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| multiply_by(by, &[term], output));
                let there = if adds { 7.0 } else { 0.0 };
                for (place, (&found, sum)) in found.iter().zip(&expected).enumerate() {
                    let expected = there + sum + f64::from(bias[place % columns]);
                    assert_eq!(f64::from(found), expected, "{dims:?} by {by}, number {place}");
                }
            }
        }
    }
}

#[test]
#[should_panic(expected = "a bias of 3 numbers expected, got 4")]
fn a_bias_of_another_length_is_refused() {
    let _ = Output::new(&mut [0.0; 6], [2, 3]).with_bias(&[0.0; 4]);
}

/// Asks for what `Rows` is promised to be asked for, and nothing else.
struct Strict<'a>(Matrix<'a, f32>);

impl Rows for Strict<'_> {
    fn dims(&self) -> [usize; 2] {
        self.0.dims()
    }

    fn write(&self, row: usize, start: usize, to: &mut [u16]) {
        let ([rows, columns], end) = (self.dims(), start + to.len());
        assert!(row < rows && end <= columns, "row {row}, from {start} to {end}");
        assert!(start.is_multiple_of(32), "from {start}");
        assert!(end.is_multiple_of(32) || end == columns, "to {end} of {columns}");
        self.0.write(row, start, to);
    }
}

#[test]
fn rows_are_asked_for_whole_steps() {
    let mut random = random(6);
    for dims @ [rows, inner, columns] in SIZES {
        let factors = Factors::whole(dims, &mut random);
        let (expected, _) = factors.expected();
        for held in HELD {
            let left = Left::new(&Strict(Matrix::new(&factors.left, [rows, inner])));
            let numbers = factors.right_as(held);
            let matrix = Strict(crate::oracle::matrix(&numbers, [inner, columns], held));
            for by in there() {
                let term = Term { left: &left, right: right(&matrix, held) };
                let mut found = vec![0.0; rows * columns];
                multiply_by(by, &[term, term], Output::new(&mut found, [rows, columns]));
                let same = found.iter().zip(&expected).all(|(&it, sum)| f64::from(it) == 2.0 * sum);
                assert!(same, "{dims:?} by {by}, {held:?}");
            }
        }
    }
}

/// A matrix of which each row is a product itself.
struct Computed<'a> {
    by: Instructions,
    left: &'a Factors,
}

impl Rows for Computed<'_> {
    fn dims(&self) -> [usize; 2] {
        let [rows, _, columns] = self.left.dims;
        [rows, columns]
    }

    fn write(&self, row: usize, start: usize, to: &mut [u16]) {
        let [_, inner, columns] = self.left.dims;
        let left = Left::new(&Matrix::new(&self.left.left[row * inner..], [1, inner]));
        let matrix = Matrix::new(&self.left.right, [inner, columns]);
        let mut numbers = vec![0.0; columns];
        let term = Term { left: &left, right: Right::Plain(&matrix) };
        multiply_by(self.by, &[term], Output::new(&mut numbers, [1, columns]));
        round_all(&numbers[start..][..to.len()], to);
    }
}

#[test]
fn rows_can_be_products_themselves() {
    let mut random = random(13);
    let inside = Factors::whole([40, 3, 70], &mut random);
    let (product, _) = inside.expected();
    let right: Vec<_> = product.iter().map(|&it| it as f32).collect();
    let mut factors = Factors::whole([5, 40, 70], &mut random);
    factors.right = right;
    for by in there() {
        for held in HELD {
            let expected = factors.multiply(by, Held::Plain);
            // The transpose of a product is the product of the transposes, in the other order.
            let of = match held {
                Held::Plain => inside.clone(),
                Held::Transposed => Factors {
                    dims: [70, 3, 40],
                    left: transposed(&inside.right, [3, 70]),
                    right: transposed(&inside.left, [40, 3]),
                },
            };
            let matrix = Computed { by, left: &of };
            let left = Left::new(&Matrix::new(&factors.left, [5, 40]));
            let term = Term { left: &left, right: crate::oracle::right(&matrix, held) };
            let mut found = vec![0.0; 5 * 70];
            multiply_by(by, &[term], Output::new(&mut found, [5, 70]));
            assert_eq!(found, expected, "by {by}, {held:?}");
        }
    }
}
