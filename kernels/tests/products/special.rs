//! NaN, infinities, and numbers that are nearly zero or nearly infinite.

use rand::RngExt;

use crate::oracle::{Factors, HELD, assert_near, random, there};

fn check(factors: &Factors, what: &str) {
    let expected = factors.expected();
    for by in there() {
        for held in HELD {
            let found = factors.multiply(by, held);
            assert_near(&found, &expected, factors.dims[1], &format!("{what}, by {by}, {held:?}"));
        }
    }
}

/// It reaches its row or its column, and nothing else, though matrices are filled up with zeros inside.
#[test]
fn nan_and_infinities_reach_the_results_that_they_are_in() {
    let mut random = random(8);
    for dims @ [rows, inner, columns] in [[1, 1, 1], [5, 7, 3], [33, 31, 34], [40, 65, 40]] {
        for number in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for _ in 0..4 {
                let mut factors = Factors::fractions(dims, &mut random);
                let place = random.random_range(0..rows * inner);
                factors.left[place] = number;
                check(&factors, &format!("{number} on the left of {dims:?}"));
                let place = random.random_range(0..inner * columns);
                factors.right[place] = -number;
                check(&factors, &format!("{number} on both sides of {dims:?}"));
            }
            // At the ends, next to what is filled up.
            let mut factors = Factors::fractions(dims, &mut random);
            *factors.left.last_mut().unwrap() = number;
            check(&factors, &format!("{number} at the end of the left of {dims:?}"));
            let mut factors = Factors::fractions(dims, &mut random);
            *factors.right.last_mut().unwrap() = number;
            check(&factors, &format!("{number} at the end of the right of {dims:?}"));
        }
    }
}

#[test]
fn infinity_times_zero_is_nan() {
    let mut factors = Factors::fractions([3, 33, 3], &mut random(9));
    factors.left[32] = f32::INFINITY;
    factors.right[32 * 3 + 1] = 0.0;
    check(&factors, "zero");
    for by in there() {
        for held in HELD {
            let found = factors.multiply(by, held);
            let kinds: Vec<_> = found.iter().map(|it| (it.is_nan(), it.is_infinite())).collect();
            assert_eq!(kinds[..3], [(false, true), (true, false), (false, true)], "by {by}");
            assert!(kinds[3..].iter().all(|it| *it == (false, false)), "by {by}");
        }
    }
    // A subnormal number is zero.
    factors.right[32 * 3 + 1] = f32::from_bits(1);
    check(&factors, "a subnormal number");
}

#[test]
fn infinities_of_both_signs_are_nan() {
    let mut factors = Factors::fractions([2, 40, 2], &mut random(10));
    (factors.left[3], factors.left[39]) = (f32::INFINITY, f32::NEG_INFINITY);
    factors.right.fill(1.0);
    check(&factors, "both infinities");
    assert!(there().all(|by| factors.multiply(by, HELD[0])[..2].iter().all(|it| it.is_nan())));
}

#[test]
fn subnormal_numbers_count_as_zeros() {
    let numbers = [f32::from_bits(1), f32::MIN_POSITIVE.next_down(), -f32::MIN_POSITIVE / 2.0];
    let huge = 2f32.powi(120);
    for number in numbers {
        let mut factors = Factors::new([3, 34, 3], || huge);
        factors.left.fill(number);
        assert!(there().all(|by| factors.multiply(by, HELD[0]).iter().all(|it| *it == 0.0)));
        let mut factors = Factors::new([3, 34, 3], || huge);
        factors.right.fill(number);
        for held in HELD {
            assert!(there().all(|by| factors.multiply(by, held).iter().all(|it| *it == 0.0)));
        }
    }
    // The smallest normal number counts.
    let mut factors = Factors::new([3, 34, 3], || huge);
    factors.left.fill(f32::MIN_POSITIVE);
    let expected = 34.0 * 2f32.powi(-6);
    assert!(there().all(|by| factors.multiply(by, HELD[1]).iter().all(|it| *it == expected)));
}

/// A result that is nearer to zero than the smallest normal number may be zero, and is off by no more than that.
#[test]
fn products_that_are_nearly_zero() {
    let mut random = random(11);
    for exponent in [-80, -70, -64, -60] {
        let unit = 2f32.powi(exponent);
        let factors = Factors::new([5, 50, 5], || unit * random.random_range(-1.0..1.0));
        check(&factors, &format!("numbers of 2^{exponent}"));
    }
}

#[test]
fn large_numbers_are_rounded_to_infinity() {
    // Half a step above the largest number in bf16.
    let tie = f32::from_bits(0x7f7f_8000);
    for (number, becomes_infinite) in [(f32::MAX, true), (tie, true), (tie.next_down(), false)] {
        let mut factors = Factors::new([2, 3, 2], || 0.0);
        factors.left[0] = number;
        factors.left[3] = -number;
        factors.right.fill(0.5);
        check(&factors, &format!("{number}"));
        let found = factors.multiply(burn_lora_kernels::instructions(), HELD[0]);
        assert!(found.iter().all(|it| it.is_infinite() == becomes_infinite), "{number}: {found:?}");
    }
}

#[test]
fn sums_beyond_the_largest_number_are_infinite() {
    let factors = Factors::new([2, 40, 2], || 2f32.powi(63));
    for by in there() {
        for held in HELD {
            assert_eq!(factors.multiply(by, held), [f32::INFINITY; 4], "by {by}");
        }
    }
}
