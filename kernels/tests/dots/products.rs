//! Products of rows in block formats.

use burn_lora_kernels::{BlockFormat, DotMemory, Vector8};

use crate::oracle::{assert_near, assert_same, largest, numbers, random, row, there};

/// Lengths of which some end within blocks, and some within what is read at once.
fn lengths() -> impl Iterator<Item = usize> {
    (0..130).chain([255, 256, 257, 576, 2047, 2048, 2049, 2304, 4096, 6145])
}

#[test]
fn products_are_those_of_the_unpacked_numbers() {
    for format in BlockFormat::ALL {
        let mut random = random(2);
        for columns in lengths() {
            let bytes = row(format, columns, &mut random);
            let x = Vector8::new(&numbers(columns, &mut random));
            let mut weights = vec![0.0; columns];
            format.unpack(&bytes, &mut weights);
            for by in there() {
                let what = format!("{format:?} by {by}, {columns} columns");
                let found = format.dot(by, &bytes, &x);
                assert_near(found, &weights, &x, largest(format, &bytes), &what);
            }
        }
    }
}

#[test]
fn all_instructions_give_the_same_to_the_bit() {
    for format in BlockFormat::ALL {
        let mut random = random(3);
        for columns in lengths() {
            let bytes = row(format, columns, &mut random);
            let x = Vector8::new(&numbers(columns, &mut random));
            let mut found = there().map(|by| (by, format.dot(by, &bytes, &x)));
            let (_, expected) = found.next().unwrap();
            for (by, found) in found {
                assert_same(found, expected, &format!("{format:?} by {by}, {columns} columns"));
            }
        }
    }
}

#[test]
fn several_vectors_give_what_each_gives() {
    for format in BlockFormat::ALL {
        let mut random = random(4);
        for columns in [0, 1, 33, 512, 4352] {
            let bytes = row(format, columns, &mut random);
            let x = [(); 5].map(|()| Vector8::new(&numbers(columns, &mut random)));
            for by in there() {
                let found = format.dots(by, &bytes, x.each_ref(), &mut DotMemory::new());
                for (found, x) in found.into_iter().zip(&x) {
                    assert_same(found, format.dot(by, &bytes, x), &format!("{format:?} by {by}"));
                }
            }
        }
        assert!(there().all(|by| format.dots(by, &[], [], &mut DotMemory::new()).is_empty()));
    }
}

#[test]
#[should_panic(expected = "vectors differ in length")]
fn vectors_of_several_lengths_are_refused() {
    let (one, other) = (Vector8::new(&[1.0; 32]), Vector8::new(&[1.0; 31]));
    BlockFormat::Q8_0.dots(
        burn_lora_kernels::dots(),
        &[0; 34],
        [&one, &other],
        &mut DotMemory::new(),
    );
}

#[test]
#[should_panic(expected = "bytes of a row of 33 numbers in Q8_0")]
fn a_row_with_too_few_bytes_is_refused() {
    BlockFormat::Q8_0.dot(burn_lora_kernels::dots(), &[0; 34], &Vector8::new(&[1.0; 33]));
}

#[test]
#[should_panic(expected = "bytes of a row of 32 numbers in Q8_0")]
fn a_row_with_too_many_bytes_is_refused() {
    BlockFormat::Q8_0.dot(burn_lora_kernels::dots(), &[0; 35], &Vector8::new(&[1.0; 32]));
}
