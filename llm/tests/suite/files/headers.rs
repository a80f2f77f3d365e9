//! Headers of GGUF files that say what cannot be.

use std::fs;

use burn_lora_llm::gguf::open;
use tempfile::TempDir;

use super::assert_holds;

const U8: u32 = 0;
const U32: u32 = 4;
const F32: u32 = 6;
const BOOL: u32 = 7;
const TEXT: u32 = 8;
const LIST: u32 = 9;

fn text(text: impl AsRef<[u8]>) -> Vec<u8> {
    [&(text.as_ref().len() as u64).to_le_bytes(), text.as_ref()].concat()
}

fn field(name: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [&text(name), &kind.to_le_bytes()[..], value].concat()
}

fn list(kind: u32, count: u64, values: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &count.to_le_bytes(), values].concat()
}

/// A tensor in single precision.
fn tensor(name: &str, sizes: &[u64], offset: u64) -> Vec<u8> {
    let count = (sizes.len() as u32).to_le_bytes();
    [&text(name), &count[..], &numbers(sizes), &0_u32.to_le_bytes(), &offset.to_le_bytes()].concat()
}

fn numbers(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|it| it.to_le_bytes()).collect()
}

/// A file with these fields and tensors, and room for 64 numbers.
fn file(fields: &[Vec<u8>], tensors: &[Vec<u8>]) -> Vec<u8> {
    let counts = numbers(&[tensors.len() as u64, fields.len() as u64]);
    let mut bytes = [b"GGUF\x03\0\0\0", &counts[..], &fields.concat(), &tensors.concat()].concat();
    bytes.resize(bytes.len().next_multiple_of(32) + 4 * 64, 0);
    bytes
}

/// What is wrong with the file.
#[track_caller]
fn problem(bytes: &[u8]) -> String {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("x.gguf");
    fs::write(&path, bytes).unwrap();
    let error = open(&path).expect_err("it cannot be opened");
    assert_holds(&error, "x.gguf: ");
    error.split_once("x.gguf: ").unwrap().1.to_owned()
}

#[test]
fn a_header_that_says_what_can_be_is_read() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("x.gguf");
    let fields = [field("a", U8, &[7]), field("nan", F32, &f32::NAN.to_le_bytes())];
    let tensors = [tensor("b", &[4, 2], 32), tensor("a", &[8], 0), tensor("one", &[], 64)];
    fs::write(&path, file(&fields, &tensors)).unwrap();
    let read = open(&path).unwrap();
    assert_eq!(read.fields["a"], 7);
    // As `null` it would be taken as missing.
    assert_eq!(read.fields["nan"], "NaN");
    assert_eq!(read.tensors["b"].shape, [2, 4]);
    assert_eq!(read.values("one").unwrap(), [0.0]);
}

#[test]
fn fields_are_checked() {
    let none: &[Vec<u8>] = &[];
    let long = (1_u64 << 60).to_le_bytes();
    let nested = list(LIST, 1, &list(LIST, 1, &list(LIST, 1, &list(U8, 1, &[1]))));
    for (value, expected) in [
        (field("k", 13, &[0; 8]), "`k`: a value of the unknown kind 13"),
        (field("k", LIST, &list(13, 1, &[0; 8])), "`k`: a value of the unknown kind 13"),
        (field("k", LIST, &nested), "`k`: a list within more than 2 others"),
        (field("k", BOOL, &[2]), "`k`: 2 where 0 or 1 is needed"),
        (field("k", TEXT, &text(b"\xff\xfe")), "`k`: a text that is not UTF-8"),
        (field("k", LIST, &list(TEXT, 1, &text(b"\xff"))), "`k`: a text that is not UTF-8"),
        (field("k", TEXT, &long), "`k`: it ends too early"),
        (field("k", TEXT, &[0xff; 8]), "`k`: it ends too early"),
        (field("k", LIST, &list(TEXT, 1 << 60, &[])), "`k`: it ends too early"),
        (field("k", LIST, &list(U8, u64::MAX, &[])), "`k`: it ends too early"),
        // There are so many bytes, but not so many values.
        (field("k", LIST, &list(TEXT, 100, &[])), "`k`: it ends too early"),
        (
            [text(b"\xff"), [0; 8].to_vec()].concat(),
            "the name of field 1 of 1: a text that is not UTF-8",
        ),
        (long.to_vec(), "the name of field 1 of 1: it ends too early"),
        (field("general.alignment", U32, &[0; 4]), "`general.alignment` is 0"),
        (field("general.alignment", U32, &[48, 0, 0, 0]), "`general.alignment` is 48"),
        (field("general.alignment", TEXT, &text("32")), "`general.alignment` is \"32\""),
    ] {
        assert_eq!(problem(&file(&[value], none)), expected);
    }
    let twice = [field("k", U8, &[1]), field("k", U8, &[2])];
    assert_eq!(problem(&file(&twice, none)), "`k`: it is there twice");
    for (at, things) in [(8, "tensors"), (16, "fields")] {
        for count in [1 << 30, u64::MAX] {
            let mut bytes = file(none, none);
            bytes[at..at + 8].copy_from_slice(&u64::to_le_bytes(count));
            let expected = format!("it says that it has {count} {things}: it ends too early");
            assert_eq!(problem(&bytes), expected);
        }
    }
    // Each has a byte here, and far more in memory.
    let many = field("k", LIST, &list(U8, (1 << 24) + 1, &vec![0; (1 << 24) + 1]));
    assert_eq!(problem(&file(&[many], none)), "`k`: there are more than 16777216 values in lists");
}

#[test]
fn tensors_are_checked() {
    let mut unnamed = tensor("x", &[4], 0);
    unnamed[8] = 0xff;
    let shape = |sizes: &[u64], told: &str| {
        (vec![tensor("t", sizes, 0)], format!("`t`: {told} cannot be the shape of values in F32"))
    };
    let short = || "it ends before the values of `t` do".to_owned();
    for (tensors, expected) in [
        (vec![tensor("t", &[4; 5], 0)], "`t`: it has 5 dimensions".to_owned()),
        shape(&[0], "[0]"),
        shape(&[3, 0], "[0, 3]"),
        shape(&[1 << 32, 1 << 32], "[4294967296, 4294967296]"),
        shape(&[1 << 63, 1], "[1, 9223372036854775808]"),
        (vec![tensor("t", &[65], 0)], short()),
        (vec![tensor("t", &[64], 32)], short()),
        (vec![tensor("t", &[1], u64::MAX - 31)], short()),
        (vec![tensor("t", &[1 << 40], 0)], short()),
        (
            vec![tensor("t", &[4], 16)],
            "`t`: its values are at 16, which is no multiple of 32".to_owned(),
        ),
        (
            vec![tensor("t", &[4], 0), tensor("t", &[4], 32)],
            "`t`: there are two tensors of this name".to_owned(),
        ),
        (
            vec![tensor("t", &[12], 0), tensor("u", &[4], 32)],
            "`t` and `u`: their values are in the same place".to_owned(),
        ),
        (
            vec![tensor("u", &[4], 64), tensor("t", &[64], 0)],
            "`t` and `u`: their values are in the same place".to_owned(),
        ),
        (vec![unnamed], "the name of tensor 1 of 1: a text that is not UTF-8".to_owned()),
    ] {
        assert_eq!(problem(&file(&[], &tensors)), expected);
    }
}

#[test]
fn every_cut_and_every_large_number_is_an_error_or_nothing() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("x.gguf");
    let fields = [
        field("general.alignment", U32, &[32, 0, 0, 0]),
        field("k", LIST, &list(TEXT, 2, &[text("a"), text("b")].concat())),
        field("n", LIST, &list(LIST, 1, &list(F32, 1, &[0; 4]))),
    ];
    let whole = file(&fields, &[tensor("t", &[4, 2], 0), tensor("u", &[8], 32)]);
    for length in 4..whole.len() - 4 * 48 {
        problem(&whole[..length]);
    }
    for at in 4..whole.len() - 4 * 64 {
        for bytes in [&[0xff_u8; 8][..], &[0; 8], &[0xff], &[0x80], &(1_u64 << 60).to_le_bytes()] {
            let mut changed = whole.clone();
            changed[at..at + bytes.len()].copy_from_slice(bytes);
            fs::write(&path, changed).unwrap();
            if let Ok(file) = open(&path) {
                file.tensors.keys().for_each(|name| drop(file.values(name).unwrap()));
            }
        }
    }
}
