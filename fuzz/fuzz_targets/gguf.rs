//! Reads random bytes as a GGUF file, and as two that a model is split into: the headers, the numbers of each matrix, a
//! decoder, and adapters.
//!
//! ```text
//! cargo +nightly fuzz run gguf fuzz/corpus/gguf fuzz/seeds/gguf llm/tests/llama/fixtures tests/gguf/fixtures
//! ```

#![no_main]

use std::{fs, path::Path};

use burn::backend::Flex;
use burn_lora::{LoraAdapters, gguf::Family, peft::Renaming, quantize::QuantizedWeight};
use burn_lora_llm::{gguf, pretrained};
use libfuzzer_sys::fuzz_target;

/// What lies between the two parts of a model.
const BETWEEN: &[u8] = b"<part>";

fuzz_target!(|bytes: &[u8]| {
    let path = |part: &str| {
        std::env::temp_dir().join(format!("burn-lora-{}{part}.gguf", std::process::id()))
    };
    let whole = path("");
    fs::write(&whole, bytes).expect("the directory can be written");
    check(&whole, bytes);
    if let Some(at) = bytes.windows(BETWEEN.len()).position(|it| it == BETWEEN) {
        let parts = [path("-00001-of-00002"), path("-00002-of-00002")];
        for (path, bytes) in parts.iter().zip([&bytes[..at], &bytes[at + BETWEEN.len()..]]) {
            fs::write(path, bytes).expect("the directory can be written");
        }
        parts.iter().for_each(|path| check(path, bytes));
    }
});

/// Reads all numbers of the model of which this is a file. All its files have these bytes.
fn check(path: &Path, bytes: &[u8]) {
    let Ok(file) = gguf::open(path) else { return };
    assert!(file.fields.len() <= bytes.len());
    for (name, tensor) in &file.tensors {
        // What is in the file was checked when it was opened.
        let data = file.bytes(name).expect("the file is as long as it says");
        assert!(data.len() <= bytes.len());
        file.values(name).expect("the bytes could be read");
        let (Some(kind), &[rows, columns]) = (tensor.packing.held(), &tensor.shape[..]) else {
            continue;
        };
        let weight =
            QuantizedWeight::<Flex>::from_gguf(kind, [rows, columns], &data, &Default::default());
        if let Ok(weight) = weight {
            assert_eq!(weight.dense().dims(), [rows, columns]);
        }
    }
    let family = Family {
        architecture: "llama".to_owned(),
        names: Renaming::new([("blk.*.attn_q", "layers.*.query"), ("token_embd", "embed")]),
        pairs: vec![("blk.*.attn_q".to_owned(), 2)],
        is_tied: false,
    };
    if let Ok(set) = LoraAdapters::<Flex>::load_gguf(path, &family, &Default::default()) {
        assert!(set.num_params() <= 2 * bytes.len());
    }
    // What it says of a decoder may be anything.
    let _ = pretrained::load::<Flex>(path, None, &Default::default());
}
