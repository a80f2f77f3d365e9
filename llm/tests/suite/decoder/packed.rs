//! Decoders in GGUF files.

use std::{collections::BTreeMap, fs};

use burn_lora::{LoraConfig, LoraModule, nn::Precision, quantize::Quantization};

use burn_lora_llm::{
    gguf::{config::hugging_face_config, open},
    llama::Llama,
    pretrained::{self, Holding},
};
use tempfile::TempDir;

use super::{assert_computes, changed, fixture, tiny};
use crate::{backend::Plain, oracle::device};

#[test]
fn scores_of_gguf_files_are_those_of_transformers() {
    for name in ["llama3", "qwen2", "qwen3", "packed", "q4_k_m", "others"] {
        let loaded =
            pretrained::load::<Plain>(&fixture(&format!("{name}.gguf")), None, &device::<Plain>());
        let loaded = loaded.unwrap();
        let expected = match name {
            "packed" | "q4_k_m" | "others" => fixture(&format!("{name}.json")),
            _ => fixture(name).join("expected.json"),
        };
        assert_computes(&loaded.llama, expected);
        let stored = match name {
            "packed" => Some("F16, BF16, Q8_0, Q4_0, Q4_1"),
            "q4_k_m" => Some("Q8_0, Q5_0, Q4_K, Q6_K"),
            "others" => Some("Q5_1, Q5_K, Q2_K, Q3_K, IQ4_NL, IQ4_XS"),
            _ => None,
        };
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

/// Each matrix takes the bytes that it has in the file, and up to two more in a row: to fill a word, or since the scales
/// of Q8_0 have 32 bits here.
#[test]
fn blocks_take_the_memory_that_they_take_in_the_file() {
    for name in ["q4_k_m", "others"] {
        let path = fixture(&format!("{name}.gguf"));
        let llama = pretrained::load::<Plain>(&path, None, &device::<Plain>()).unwrap().llama;
        let layers = llama.parameters().layers;
        let held: usize = layers.iter().map(|it| it.quantized_bytes).sum();
        let file = open(&path).unwrap();
        let matrices = file.tensors.iter().filter(|(_, it)| it.shape.len() == 2);
        let (mut bytes, mut most) = (0, 0);
        for (name, tensor) in matrices {
            let size = file.bytes(name).unwrap().len();
            bytes += size;
            most += size + 2 * tensor.shape[0];
        }
        assert!((bytes..=most).contains(&held), "{name}: {held} bytes for {bytes}");
    }
}

#[test]
fn matrices_in_bf16_are_kept_if_that_is_wanted() {
    let path = fixture("packed.gguf");
    let load = |quantize, keep_16_bits| {
        let holding = Holding { quantize, keep_16_bits };
        let loaded = pretrained::load_held::<Plain>(&path, holding, &device::<Plain>()).unwrap();
        let layers = loaded.llama.parameters().layers.into_iter();
        let held = layers.filter(|it| it.quantized_bytes > 0).map(|it| (it.path, it.total));
        (loaded.llama, loaded.bytes_in_16_bits, held.collect::<BTreeMap<_, _>>())
    };
    let (_, none, few_bits) = load(None, false);
    let (llama, bytes, all) = load(None, true);
    assert_computes(&llama, fixture("packed.json"));
    let kept = all.iter().filter(|(path, _)| !few_bits.contains_key(*path));
    let kept: BTreeMap<_, _> = kept.collect();
    assert!(!kept.is_empty());
    let numbers: usize = kept.values().copied().sum();
    assert_eq!((none, bytes), (0, 2 * numbers));
    // What is quantized is not kept, and what is not may be.
    let (_, bytes, _) = load(Some(Quantization::Nf4), true);
    let others = kept.iter().filter(|(path, _)| !path.ends_with("_proj"));
    assert_eq!(bytes, 2 * others.map(|(_, numbers)| **numbers).sum::<usize>());
    let (_, bytes, held) = load(Some(Quantization::Bf16), false);
    let is_linear = |path: &str| path.ends_with("_proj") && !few_bits.contains_key(path);
    let rounded = held.iter().filter(|(path, _)| is_linear(path));
    assert_eq!(bytes, 2 * rounded.map(|(_, numbers)| numbers).sum::<usize>());
}

#[test]
fn the_precision_of_products_stays_with_a_model() {
    // Other backends ignore the setting, and reports say so.
    let expected = match cfg!(feature = "wgpu") {
        true => Precision::F32,
        false => Precision::Bf16,
    };
    let check = |llama: &Llama<Plain>| {
        let report = llama.parameters();
        assert!(report.layers.iter().all(|it| it.precision == expected), "{report}");
        let said = report.to_string().ends_with(", products in bf16");
        assert_eq!(said, expected == Precision::Bf16, "{report}");
    };
    let llama = tiny("llama3").with_precision(Precision::Bf16);
    check(&llama);
    let config = LoraConfig::new(2, 5.0).with_targets(["q_proj", "down_proj"]);
    let adapted = llama.attach(&config).unwrap();
    let report = adapted.parameters();
    assert!(report.layers.iter().all(|it| it.precision == expected), "{report}");
    check(&llama.switch(&adapted.adapters()).unwrap());
    check(&adapted.merge().unwrap());
    assert!(!tiny("llama3").parameters().to_string().contains("bf16"));
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
    for name in ["llama3.gguf", "packed.gguf", "others.gguf"] {
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
    for (number, expected) in [
        (16, "is IQ2_XXS; the types that can be read are F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0"),
        (34, "is TQ1_0; "),
        (39, "is MXFP4; "),
        (26, "is I32; "),
        (4, "has the unknown number 4; "),
        (200, "has the unknown number 200; "),
    ] {
        bytes[at] = number;
        let error = problem(&dir, &bytes).unwrap();
        assert!(error.contains(&format!("`token_embd.weight`: its type {expected}")), "{error}");
    }
}
