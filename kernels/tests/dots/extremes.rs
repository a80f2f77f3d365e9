//! Numbers at the ends of what can be held.

use burn_lora_kernels::{BlockFormat, Vector8};
use half::f16;

use crate::oracle::{assert_near, assert_same, largest, numbers, random, row, scales, there};

/// Sets all scales of a row.
fn set_scales(format: BlockFormat, bytes: &mut [u8], to: f16) {
    for block in bytes.chunks_exact_mut(format.bytes()) {
        for &start in scales(format) {
            block[start..start + 2].copy_from_slice(&to.to_le_bytes());
        }
    }
}

/// The largest and the smallest codes, with each of them next to each of the numbers at the ends.
#[test]
fn codes_and_numbers_at_their_ends_do_not_overflow() {
    let signs = [[1.0; 2], [-1.0; 2], [1.0, -1.0]];
    for format in BlockFormat::ALL {
        for (byte, signs) in [0x00, 0xff, 0x0f, 0xf0, 0x80, 0x7f, 0x08, 0x88]
            .iter()
            .flat_map(|it| signs.map(|signs| (it, signs)))
        {
            for columns in [32, 512, 4096] {
                let mut bytes = vec![*byte; format.row_bytes(columns)];
                set_scales(format, &mut bytes, f16::ONE);
                let x: Vec<_> = (0..columns).map(|it| 127.0 * signs[it % 2]).collect();
                let x = Vector8::new(&x);
                assert!(x.codes().iter().flatten().take(columns).all(|it| it.abs() == 127));
                let mut weights = vec![0.0; columns];
                format.unpack(&bytes, &mut weights);
                for by in there() {
                    let what = format!("{format:?} of {byte:#x} by {by}");
                    let found = format.dot(by, &bytes, &x);
                    assert_near(found, &weights, &x, largest(format, &bytes), &what);
                }
            }
        }
    }
}

#[test]
fn zeros_give_zero() {
    for format in BlockFormat::ALL {
        let bytes = row(format, 512, &mut random(5));
        for by in there() {
            assert_eq!(format.dot(by, &bytes, &Vector8::new(&[0.0; 512])), 0.0);
            assert_eq!(format.dot(by, &vec![0; bytes.len()], &Vector8::new(&[1.0; 512])), 0.0);
            assert_eq!(format.dot(by, &[], &Vector8::new(&[])), 0.0);
        }
    }
}

/// Wherever it is, since a product that looks right would hide it.
#[test]
fn a_number_that_is_not_finite_makes_the_product_nan() {
    for format in BlockFormat::ALL {
        let mut random = random(6);
        let bytes = row(format, 2305, &mut random);
        let x = numbers(2305, &mut random);
        for (place, number) in [(0, f32::NAN), (40, f32::INFINITY), (2304, f32::NEG_INFINITY)] {
            let mut x = x.clone();
            x[place] = number;
            let x = Vector8::new(&x);
            assert!(there().all(|by| format.dot(by, &bytes, &x).is_nan()), "{format:?}");
        }
    }
}

#[test]
fn a_scale_that_is_not_finite_does_not_give_a_finite_product() {
    for format in BlockFormat::ALL {
        let mut random = random(7);
        let bytes = row(format, 768, &mut random);
        let x = Vector8::new(&numbers(768, &mut random));
        for number in [f16::NAN, f16::INFINITY] {
            for &start in scales(format) {
                let mut bytes = bytes.clone();
                let start = bytes.len() - format.bytes() + start;
                bytes[start..start + 2].copy_from_slice(&number.to_le_bytes());
                for by in there() {
                    assert!(!format.dot(by, &bytes, &x).is_finite(), "{format:?} by {by}");
                }
            }
        }
    }
}

/// 2⁻²⁴ is the smallest number of 16 bits that is not zero.
#[test]
fn subnormal_scales_count() {
    for format in BlockFormat::ALL {
        let mut random = random(8);
        let mut bytes = row(format, 768, &mut random);
        set_scales(format, &mut bytes, f16::from_bits(1));
        // The products are near the smallest normal number of 32 bits, too.
        for unit in [1.0, 2f32.powi(-100)] {
            let x: Vec<_> = numbers(768, &mut random).iter().map(|it| it * unit).collect();
            let x = Vector8::new(&x);
            let mut weights = vec![0.0; 768];
            format.unpack(&bytes, &mut weights);
            let mut found = there().map(|by| format.dot(by, &bytes, &x));
            let expected = found.next().unwrap();
            assert_ne!(expected, 0.0);
            assert_near(expected, &weights, &x, largest(format, &bytes), &format!("{format:?}"));
            found.for_each(|it| assert_same(it, expected, &format!("{format:?}")));
        }
    }
}
