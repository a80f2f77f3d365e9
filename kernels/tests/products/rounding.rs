//! Numbers are rounded to the nearest, ties to even.

use std::{env, process::Command};

use burn_lora_kernels::{VARIABLE, round_all};
use half::{bf16, f16};

use crate::oracle::there;

/// Compares bits, but for those of NaN.
fn assert_same(found: u16, expected: bf16, what: &str) {
    let found = bf16::from_bits(found);
    let same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
    assert!(same, "{what}: {found} instead of {expected}");
}

/// Zero for what is not normal.
fn normal(number: bf16) -> bf16 {
    if number.to_f32().is_subnormal() { bf16::from_bits(number.to_bits() & 0x8000) } else { number }
}

#[test]
fn numbers_of_32_bits() {
    for lower in [0, 1, 0x7fff, 0x8000, 0x8001, 0xabcd, 0xffff] {
        let numbers: Vec<_> =
            (0..=u16::MAX).map(|upper| f32::from_bits(u32::from(upper) << 16 | lower)).collect();
        let mut found = vec![0; numbers.len()];
        round_all(&numbers, &mut found);
        for (number, found) in numbers.into_iter().zip(found) {
            let expected = match number.is_subnormal() {
                // Even those that would be rounded to a normal number.
                true => bf16::from_f32(0.0f32.copysign(number)),
                false => bf16::from_f32(number),
            };
            assert_same(found, expected, &format!("{:#x}", number.to_bits()));
        }
    }
}

#[test]
fn numbers_of_16_bits() {
    let bits: Vec<_> = (0..=u16::MAX).collect();
    let mut found = vec![0; bits.len()];
    let numbers: Vec<_> = bits.iter().copied().map(bf16::from_bits).collect();
    round_all(&numbers, &mut found);
    for (&number, &found) in numbers.iter().zip(&found) {
        assert_same(found, normal(number), &format!("{number}"));
    }
    let numbers: Vec<_> = bits.iter().copied().map(f16::from_bits).collect();
    round_all(&numbers, &mut found);
    for (&number, &found) in numbers.iter().zip(&found) {
        // None of them is subnormal in bf16.
        assert_same(found, bf16::from_f32(number.to_f32()), &format!("{number}"));
    }
}

/// Slices are rounded by the instructions that are chosen, which is done once in a process.
#[test]
fn all_instructions_round_the_same() {
    for by in there() {
        let output = Command::new(env::current_exe().unwrap())
            .args(["rounding::numbers_of", "--nocapture"])
            .env(VARIABLE, by.name())
            .output()
            .unwrap();
        let printed = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        let passed = output.status.success() && printed.contains("2 passed");
        assert!(passed, "by {by}: {printed}");
    }
}

#[test]
#[should_panic(expected = "left == right")]
fn slices_of_different_lengths_are_refused() {
    round_all(&[1.0], &mut [0; 2]);
}
