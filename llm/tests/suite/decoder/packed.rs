//! Decoders in GGUF files.

use std::fs;

use burn_lora::{LoraModule, quantize::Quantization};

use burn_lora_llm::{gguf::model::hugging_face_config, pretrained};
use tempfile::TempDir;

use super::{assert_computes, changed, fixture};
use crate::{backend::Plain, oracle::device};

#[test]
fn scores_of_gguf_files_are_those_of_transformers() {
    for name in ["llama3", "qwen2", "qwen3", "packed"] {
        let loaded =
            pretrained::load::<Plain>(&fixture(&format!("{name}.gguf")), None, &device::<Plain>());
        let loaded = loaded.unwrap();
        let expected = match name {
            "packed" => fixture("packed.json"),
            _ => fixture(name).join("expected.json"),
        };
        assert_computes(&loaded.llama, expected);
        let stored = (name == "packed").then_some("F16, BF16, Q8_0, Q4_0, Q4_1");
        assert_eq!(loaded.stored.as_deref(), stored, "{name}");
    }
}

#[test]
fn linear_layers_are_held_in_few_bits() {
    let quantized = |name: &str, to| {
        let loaded = pretrained::load::<Plain>(&fixture(name), to, &device::<Plain>()).unwrap();
        let layers = loaded.llama.parameters().layers.into_iter();
        let layers = layers.filter(|it| it.quantized_bytes > 0).map(|it| it.path);
        layers.collect::<Vec<_>>()
    };
    // What has few bits in the file keeps them, whatever is asked for; also the table of embeddings.
    let stored = quantized("packed.gguf", None);
    assert!(!stored.is_empty());
    for name in ["packed.gguf", "llama3", "qwen2.gguf"] {
        let nf4 = quantized(name, Some(Quantization::Nf4));
        let count = nf4.iter().filter(|path| path.ends_with("_proj")).count();
        let all = pretrained::load::<Plain>(&fixture(name), None, &device::<Plain>()).unwrap();
        assert_eq!(count, 7 * all.llama.depth(), "{name}");
        assert!(!nf4.iter().any(|it| it == "lm_head"), "{name}: {nf4:?}");
        if name == "packed.gguf" {
            assert!(stored.iter().all(|path| nf4.contains(path)));
        }
    }
}

#[test]
fn a_gguf_file_is_described_as_hugging_face_does_it() {
    for name in ["llama3", "qwen2", "qwen3"] {
        let described = hugging_face_config(&fixture(&format!("{name}.gguf"))).unwrap();
        let dir = changed(name, |config| {
            assert_eq!(described["architectures"], config["architectures"]);
            *config = described;
        });
        let llama = pretrained::load(dir.path(), None, &device::<Plain>()).unwrap().llama;
        assert_computes(&llama, fixture(name).join("expected.json"));
    }
}

/// What is wrong with a file of these bytes.
fn problem(dir: &TempDir, bytes: &[u8]) -> Option<String> {
    let path = dir.path().join("changed.gguf");
    fs::write(&path, bytes).unwrap();
    let error = pretrained::load::<Plain>(&path, None, &device::<Plain>()).err()?;
    assert!(error.contains("changed.gguf: "), "{error}");
    Some(error)
}

#[test]
fn broken_files_are_errors() {
    let dir = TempDir::new().unwrap();
    // A GPU has no part in reading a file, and takes long to hold each model that can be read.
    let steps = if cfg!(feature = "wgpu") { [97, 101] } else { [13, 7] };
    for name in ["llama3.gguf", "packed.gguf"] {
        let whole = fs::read(fixture(name)).unwrap();
        // The last bytes only fill the file up.
        for length in (0..2500).step_by(steps[0]).chain([whole.len() - 64]) {
            assert!(problem(&dir, &whole[..length]).is_some(), "{length} bytes");
        }
        // Whatever a byte of the header is, the file can be read or is an error.
        for at in (0..2500).step_by(steps[1]) {
            for value in [0, 0xff, whole[at] ^ 1] {
                let mut bytes = whole.clone();
                bytes[at] = value;
                problem(&dir, &bytes);
            }
        }
    }
}

#[test]
fn what_is_not_supported_is_named() {
    let dir = TempDir::new().unwrap();
    let whole = fs::read(fixture("qwen2.gguf")).unwrap();
    let with = |from: &[u8], to: &[u8]| {
        let at = whole.windows(from.len()).position(|it| it == from).unwrap();
        let mut bytes = whole.clone();
        bytes[at..at + to.len()].copy_from_slice(to);
        problem(&dir, &bytes).expect("it cannot be loaded")
    };
    let error = with(b"qwen2", b"gemma");
    assert!(error.contains("`general.architecture` \"gemma\" is not supported"), "{error}");
    let error = with(b"GGUF\x03", b"GGUF\x01");
    assert!(error.contains("version 1 of GGUF is not supported"), "{error}");
    let error = with(b"output_norm", b"output_nurm");
    assert!(error.contains("`model.norm.weight` is missing"), "{error}");
    assert!(error.contains("`output_nurm.weight` belongs to nothing"), "{error}");
    // The type follows the name, the number of dimensions, and two sizes.
    let name = b"token_embd.weight";
    let at = whole.windows(name.len()).position(|it| it == name).unwrap() + name.len() + 4 + 16;
    let mut bytes = whole.clone();
    bytes[at] = 12;
    let error = problem(&dir, &bytes).unwrap();
    assert!(error.contains("`token_embd.weight`: its type, number 12 of GGUF's"), "{error}");
}
