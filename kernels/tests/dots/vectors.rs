//! Vectors in 8 bits.

use burn_lora_kernels::Vector8;

use crate::oracle::{numbers, random, stands_for};

#[test]
fn each_number_is_off_by_half_a_step_at_most() {
    let mut random = random(9);
    for count in (0..100).chain([255, 256, 257]) {
        for unit in [1.0, 1e-30, 1e30] {
            let numbers: Vec<_> = numbers(count, &mut random).iter().map(|it| it * unit).collect();
            let x = Vector8::new(&numbers);
            assert_eq!((x.len(), x.is_empty()), (count, count == 0));
            assert_eq!(x.codes().len(), x.scales().len());
            for (place, (&number, found)) in numbers.iter().zip(stands_for(&x)).enumerate() {
                let half = f64::from(x.scales()[place / 32]) / 2.0;
                assert!(
                    (f64::from(number) - found).abs() <= half * 1.0001,
                    "{number}, not {found}"
                );
            }
        }
    }
}

#[test]
fn the_largest_magnitude_of_a_block_is_127() {
    let mut numbers = vec![0.5; 64];
    numbers[7] = -3.0;
    let x = Vector8::new(&numbers);
    assert_eq!((x.codes()[0][7], x.codes()[0][8]), (-127, 21));
    assert_eq!(x.codes()[1], [127; 32]);
    assert_eq!(x.scales()[..2], [3.0 / 127.0, 0.5 / 127.0]);
}

#[test]
fn ties_are_rounded_to_even() {
    let numbers: Vec<f32> = [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5].to_vec();
    assert_eq!(Vector8::new(&numbers).codes()[0][..8], [127, 0, 2, 2, 0, -2, -2, 126]);
}

#[test]
fn largest_and_smallest_numbers_stay_in_range() {
    let x = Vector8::new(&[f32::MAX, f32::MIN, 0.0]);
    assert_eq!(x.codes()[0][..3], [127, -127, 0]);
    assert_eq!(x.scales()[0], f32::MAX / 127.0);
    let least = 2f32.powi(-119);
    let x = Vector8::new(&[least, -least]);
    assert_eq!(x.codes()[0][..2], [127, -127]);
    assert!(x.scales()[0].is_normal());
    // Nearer to zero, a block is zero.
    let x = Vector8::new(&[least.next_down(), f32::from_bits(1)]);
    assert_eq!((x.codes()[0], x.scales()[0]), ([0; 32], 0.0));
}

#[test]
fn a_number_that_is_not_finite_makes_its_block_nan_alone() {
    for number in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for place in [32, 63, 70] {
            let mut numbers = vec![1.0; 71];
            numbers[place] = number;
            let x = Vector8::new(&numbers);
            for block in 0..3 {
                assert_eq!(x.scales()[block].is_nan(), block == place / 32, "{number} at {place}");
            }
        }
    }
}

/// Nothing is left of longer numbers.
#[test]
fn set_again_it_is_as_if_it_were_new() {
    let numbers: Vec<f32> = (0..700).map(|it| (it * 37 % 101) as f32 - 50.0).collect();
    let mut x = Vector8::new(&numbers);
    for length in [700, 33, 0, 257, 513] {
        x.set(&numbers[..length]);
        let new = Vector8::new(&numbers[..length]);
        assert_eq!((x.len(), x.codes(), x.scales()), (length, new.codes(), new.scales()));
    }
}
