//! Reads random bytes as a GGUF file: its header, and the first numbers of each matrix in it.
//!
//! ```text
//! cargo +nightly fuzz run gguf fuzz/corpus/gguf llm/tests/llama/fixtures
//! ```

#![no_main]

use std::fs;

use burn::backend::Flex;
use burn_lora::quantize::{GgufType, QuantizedWeight};
use burn_lora_llm::gguf::{Gguf, Packing};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let path = std::env::temp_dir().join(format!("burn-lora-{}.gguf", std::process::id()));
    fs::write(&path, bytes).expect("the directory can be written");
    let Ok(file) = Gguf::open(&path) else { return };
    assert!(file.fields.len() <= bytes.len());
    for (name, tensor) in &file.tensors {
        // What is in the file was checked when it was opened.
        let data = file.bytes(name).expect("the file is as long as it says");
        assert!(data.len() <= bytes.len());
        let kind = match tensor.packing {
            Packing::Q8_0 => GgufType::Q8_0,
            Packing::Q4_0 => GgufType::Q4_0,
            Packing::Q4_1 => GgufType::Q4_1,
            _ => {
                file.values(name).expect("the bytes could be read");
                continue;
            }
        };
        let &[rows, columns] = &tensor.shape[..] else { continue };
        let weight =
            QuantizedWeight::<Flex>::from_gguf(kind, [rows, columns], &data, &Default::default());
        if let Ok(weight) = weight {
            assert_eq!(weight.dense().dims(), [rows, columns]);
        }
    }
});
