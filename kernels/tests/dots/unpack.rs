//! Rows are unpacked as GGUF's own package does.

use burn_lora_kernels::BlockFormat;
use half::f16;

use crate::oracle::{random, row, scales};

/// See `fixtures/make.py`.
fn fixture(format: BlockFormat) -> (&'static [u8], Vec<f32>) {
    let file: &[u8] = match format {
        BlockFormat::Q4_0 => include_bytes!("../fixtures/q4_0.bin"),
        BlockFormat::Q4_1 => include_bytes!("../fixtures/q4_1.bin"),
        BlockFormat::Q5_0 => include_bytes!("../fixtures/q5_0.bin"),
        BlockFormat::Q5_1 => include_bytes!("../fixtures/q5_1.bin"),
        BlockFormat::Q8_0 => include_bytes!("../fixtures/q8_0.bin"),
        BlockFormat::Q4_K => include_bytes!("../fixtures/q4_k.bin"),
        BlockFormat::Q5_K => include_bytes!("../fixtures/q5_k.bin"),
        BlockFormat::Q6_K => include_bytes!("../fixtures/q6_k.bin"),
        BlockFormat::Q2_K => include_bytes!("../fixtures/q2_k.bin"),
        BlockFormat::Q3_K => include_bytes!("../fixtures/q3_k.bin"),
        BlockFormat::IQ4_NL => include_bytes!("../fixtures/iq4_nl.bin"),
        BlockFormat::IQ4_XS => include_bytes!("../fixtures/iq4_xs.bin"),
        _ => panic!("{format:?} has no fixture"),
    };
    let count = if format.block() == 256 { 512 } else { 256 };
    let (bytes, numbers) = file.split_at(format.row_bytes(count));
    let (numbers, rest) = numbers.as_chunks();
    assert_eq!((numbers.len(), rest.len()), (count, 0));
    (bytes, numbers.iter().map(|&it| f32::from_le_bytes(it)).collect())
}

#[test]
fn numbers_are_those_of_the_package_gguf_to_the_bit() {
    for format in BlockFormat::ALL {
        let (bytes, expected) = fixture(format);
        let mut found = vec![f32::NAN; expected.len()];
        format.unpack(bytes, &mut found);
        for (place, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_eq!(found.to_bits(), expected.to_bits(), "{format:?}, number {place}");
        }
    }
}

#[test]
fn a_scale_that_is_not_finite_is_found_wherever_it_is() {
    for format in BlockFormat::ALL {
        let bytes = row(format, 768, &mut random(2));
        assert!(format.is_finite(&bytes) && format.is_finite(&[]), "{format:?}");
        for &start in scales(format) {
            for block in 0..bytes.len() / format.bytes() {
                for number in [f16::NAN, f16::INFINITY, f16::NEG_INFINITY, f16::MAX] {
                    let mut bytes = bytes.clone();
                    let at = block * format.bytes() + start;
                    bytes[at..at + 2].copy_from_slice(&number.to_le_bytes());
                    let mut numbers = vec![0.0; 768];
                    format.unpack(&bytes, &mut numbers);
                    let finite = numbers.iter().all(|it| it.is_finite());
                    assert_eq!(format.is_finite(&bytes), number.is_finite(), "{format:?}");
                    assert!(finite || !number.is_finite(), "{format:?}");
                }
            }
        }
    }
}

#[test]
#[should_panic(expected = "19 bytes in IQ4_NL")]
fn scales_of_broken_blocks_are_not_looked_for() {
    BlockFormat::IQ4_NL.is_finite(&[0; 19]);
}

#[test]
fn a_row_can_end_within_a_block() {
    for format in BlockFormat::ALL {
        let bytes = row(format, 4096 + 512, &mut random(1));
        let mut whole = vec![0.0; 4096 + 512];
        format.unpack(&bytes, &mut whole);
        for columns in (0..300).chain(4090..4100).chain([4607]) {
            let mut part = vec![f32::NAN; columns];
            format.unpack(&bytes[..format.row_bytes(columns)], &mut part);
            assert_eq!(part, whole[..columns], "{format:?}, {columns} columns");
        }
    }
}

#[test]
#[should_panic(expected = "bytes of a row of 64 numbers in Q5_1")]
fn a_row_with_too_few_bytes_is_not_unpacked() {
    BlockFormat::Q5_1.unpack(&[0; 47], &mut [0.0; 64]);
}
