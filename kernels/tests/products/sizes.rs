//! All sizes around those of tiles.

use rand::RngExt;

use crate::oracle::{Factors, HELD, assert_near, random, there};

/// The largest size: four tiles and a bit more.
const LARGEST: usize = 130;

/// Compares exact products, so that no number can be at another's place.
fn check(dims: [usize; 3]) {
    let factors = Factors::whole(dims, &mut random(dims.iter().sum::<usize>() as u64));
    let (expected, _) = factors.expected();
    for held in HELD {
        for by in there() {
            let found = factors.multiply(by, held);
            let same =
                found.iter().zip(&expected).all(|(&found, &expected)| f64::from(found) == expected);
            assert!(same, "{dims:?} by {by}, {held:?}");
        }
    }
}

#[test]
fn all_numbers_of_rows() {
    for rows in 0..=LARGEST {
        check([rows, 1, 1]);
        check([rows, 33, 31]);
    }
}

#[test]
fn all_numbers_that_are_summed_up() {
    for inner in 0..=LARGEST {
        check([1, inner, 33]);
        check([17, inner, 2]);
        check([33, inner, 65]);
    }
}

#[test]
fn all_numbers_of_columns() {
    for columns in 0..=LARGEST {
        check([1, 1, columns]);
        check([3, 65, columns]);
        check([34, 31, columns]);
    }
}

#[test]
fn random_sizes_with_numbers_that_are_rounded() {
    let mut random = random(1);
    for _ in 0..60 {
        let dims @ [_, inner, _] = [(); 3].map(|()| random.random_range(0..=LARGEST));
        let factors = Factors::fractions(dims, &mut random);
        let expected = factors.expected();
        for held in HELD {
            for by in there() {
                let found = factors.multiply(by, held);
                assert_near(&found, &expected, inner, &format!("{dims:?} by {by}, {held:?}"));
            }
        }
    }
}

/// More than is summed up at once, and more columns than are packed at once.
#[test]
fn sizes_beyond_what_is_done_at_once() {
    let mut random = random(2);
    for dims @ [_, inner, _] in [
        [2, 640, 3],
        [2, 641, 3],
        [3, 2047, 5],
        [3, 2048, 5],
        [3, 2049, 5],
        [1, 4097, 33],
        [2, 2048, 400],
        [33, 700, 640],
        [1, 6200, 1],
    ] {
        let factors = Factors::fractions(dims, &mut random);
        let expected = factors.expected();
        for held in HELD {
            for by in there() {
                let found = factors.multiply(by, held);
                assert_near(&found, &expected, inner, &format!("{dims:?} by {by}, {held:?}"));
            }
        }
    }
}
