//! Products of rows whose scales lie apart.

use burn_lora_kernels::{BlockFormat, Codes, DotMemory, Floats, SplitRow, Vector8, dots};
use half::f16;
use rand::Rng;

use crate::oracle::{assert_near, assert_same, numbers, random, row, there};

const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

const ALL: [Codes; 4] = [Codes::Bytes, Codes::Nibbles, Codes::NibblesFromZero, Codes::Nf4];

/// The numbers of a row, as plainly as it can be written.
fn unpacked(row: SplitRow, columns: usize) -> Vec<f32> {
    let nibble =
        |place: usize| row.bytes[place / 32 * 16 + place % 16] >> (place % 32 / 16 * 4) & 15;
    let number = |place: usize| {
        let level = match row.codes {
            Codes::Bytes => f32::from(row.bytes[place]) - 128.0,
            Codes::Nibbles => f32::from(nibble(place)) - 8.0,
            Codes::NibblesFromZero => f32::from(nibble(place)),
            _ => (NF4[usize::from(nibble(place))] * 127.0).round() / 127.0,
        };
        let of_block = |numbers: Floats| match numbers {
            Floats::Full(numbers) => numbers[place / row.block],
            Floats::Halves(numbers) => f16::from_le_bytes(numbers[place / row.block]).to_f32(),
        };
        level * of_block(row.scales) + row.minima.map_or(0.0, of_block)
    };
    (0..columns).map(number).collect()
}

#[test]
fn products_are_those_of_the_unpacked_numbers() {
    let mut random = random(10);
    for codes in ALL {
        for block in [32, 64, 128, 256] {
            for columns in [0_usize, 1, 31, 32, 33, 64, 65, 95, 96, 255, 576, 2049, 4100] {
                for adds in [false, true] {
                    let blocks = columns.div_ceil(block);
                    let bits = if codes == Codes::Bytes { 8 } else { 4 };
                    let mut bytes = vec![0; blocks * block * bits / 8];
                    random.fill_bytes(&mut bytes);
                    let [scales, minima] = [(); 2].map(|()| numbers(blocks, &mut random));
                    let x = Vector8::new(&numbers(columns, &mut random));
                    let what = format!("{codes:?}, blocks of {block}, {columns} columns");
                    let check = |scales, minima| {
                        let minima = adds.then_some(minima);
                        let row = SplitRow { codes, bytes: &bytes, block, scales, minima };
                        let mut found = there().map(|by| row.dot(by, &x));
                        let expected = found.next().unwrap();
                        let largest = if codes == Codes::Nf4 { 2.0 } else { 129.0 };
                        assert_near(expected, &unpacked(row, columns), &x, largest, &what);
                        found.for_each(|it| assert_same(it, expected, &what));
                        for by in there() {
                            let memory = &mut DotMemory::new();
                            let found =
                                row.dots(by, [&x, &Vector8::new(&vec![1.0; columns]), &x], memory);
                            assert_same(found[0], expected, &what);
                            assert_same(found[2], expected, &what);
                        }
                    };
                    check(Floats::Full(&scales), Floats::Full(&minima));
                    let [scales, minima] = [&scales, &minima].map(|it| halves(it));
                    check(Floats::Halves(&scales), Floats::Halves(&minima));
                }
            }
        }
    }
}

/// The nearest numbers in half precision.
fn halves(numbers: &[f32]) -> Vec<[u8; 2]> {
    numbers.iter().map(|&it| f16::from_f32(it).to_le_bytes()).collect()
}

/// The same numbers, as files have them and apart.
#[test]
fn scales_apart_give_what_scales_in_blocks_give() {
    let mut random = random(11);
    for (format, codes, head) in [
        (BlockFormat::Q4_0, Codes::Nibbles, 2),
        (BlockFormat::Q4_1, Codes::NibblesFromZero, 4),
        (BlockFormat::Q8_0, Codes::Bytes, 2),
    ] {
        let packed = row(format, 608, &mut random);
        let flip = if codes == Codes::Bytes { 128 } else { 0 };
        let blocks = || packed.chunks_exact(format.bytes());
        let number =
            |at: usize| move |block: &[u8]| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
        let bytes: Vec<u8> =
            blocks().flat_map(|it| it[head..].iter().map(move |it| it ^ flip)).collect();
        let scales: Vec<f32> = blocks().map(number(0)).collect();
        let minima: Vec<f32> = blocks().map(number(2)).collect();
        let x = Vector8::new(&numbers(608, &mut random));
        let [half_scales, half_minima] = [&scales, &minima].map(|it| halves(it));
        for (scales, minima) in [
            (Floats::Full(&scales), Floats::Full(&minima)),
            (Floats::Halves(&half_scales), Floats::Halves(&half_minima)),
        ] {
            let minima = (head == 4).then_some(minima);
            let row = SplitRow { codes, bytes: &bytes, block: 32, scales, minima };
            for by in there() {
                assert_same(row.dot(by, &x), format.dot(by, &packed, &x), &format!("{format:?}"));
            }
        }
    }
}

/// As it is documented.
#[test]
fn levels_of_nf4_are_moved_little() {
    let errors = NF4.map(|it| f64::from(it - (it * 127.0).round() / 127.0));
    assert!(errors.iter().all(|it| it.abs() < 0.0037));
    assert!((errors.iter().map(|it| it * it).sum::<f64>() / 16.0).sqrt() < 0.0022);
}

#[test]
#[should_panic(expected = "blocks of 48 numbers")]
fn blocks_of_odd_lengths_are_refused() {
    let row = SplitRow {
        codes: Codes::Bytes,
        bytes: &[],
        block: 48,
        scales: Floats::Full(&[]),
        minima: None,
    };
    row.dot(dots(), &Vector8::new(&[]));
}

#[test]
#[should_panic(expected = "bytes, scales and minima of a row of 40 numbers")]
fn too_few_scales_are_refused() {
    let bytes = &[0; 64];
    let scales = Floats::Full(&[1.0]);
    let row = SplitRow { codes: Codes::Bytes, bytes, block: 32, scales, minima: None };
    row.dot(dots(), &Vector8::new(&[1.0; 40]));
}
