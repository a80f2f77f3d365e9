//! A decoder in bitsandbytes' 4 bits.

use std::{collections::BTreeMap, fs};

use burn_lora::LoraModule;
use safetensors::{SafeTensors, tensor::TensorView};
use serde_json::Value;

use burn_lora_llm::{chat::Chat, merged, pretrained};
use tempfile::TempDir;
use tokenizers::{Tokenizer, models::bpe::BPE};

use super::{assert_computes, changed, error, fixture};
use crate::{backend::Plain, oracle::device};

/// A matrix whose scales are quantized in turn.
const MATRIX: &str = "model.layers.0.self_attn.q_proj.weight";

#[test]
fn scores_are_those_of_transformers_with_bitsandbytes() {
    let path = fixture("nf4");
    let loaded = pretrained::load::<Plain>(&path, None, &device::<Plain>()).unwrap();
    assert_computes(&loaded.llama, path.join("expected.json"));
    assert_eq!(loaded.stored.as_deref(), Some("NF4"));
    // Rows that are no whole blocks are unpacked.
    for layer in loaded.llama.parameters().layers {
        let packed = layer.path.ends_with("_proj") && !layer.path.ends_with("down_proj");
        assert_eq!(layer.quantized_bytes > 0, packed, "{}", layer.path);
    }
}

#[test]
fn what_is_written_is_not_quantized() {
    let (path, out) = (fixture("nf4"), TempDir::new().unwrap());
    let llama = pretrained::load::<Plain>(&path, None, &device::<Plain>()).unwrap().llama;
    let chat = Chat::new(Tokenizer::new(BPE::default()), "", "").unwrap();
    merged::save(&llama.dequantize(), &chat, &path, out.path(), None).unwrap();
    let config: Value =
        serde_json::from_slice(&fs::read(out.path().join("config.json")).unwrap()).unwrap();
    assert!(config.get("quantization_config").is_none(), "{config}");
    let again = pretrained::load::<Plain>(out.path(), None, &device::<Plain>()).unwrap();
    assert_eq!(again.stored, None);
    assert_computes(&again.llama, path.join("expected.json"));
}

/// What is wrong with the fixture whose tensors were changed.
fn problem(change: impl FnOnce(&mut BTreeMap<String, TensorView<'_>>)) -> String {
    let dir = changed("nf4", |_| ());
    let path = dir.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let mut tensors = SafeTensors::deserialize(&bytes).unwrap().tensors().into_iter().collect();
    change(&mut tensors);
    safetensors::serialize_to_file(tensors, None, &path).unwrap();
    error(dir.path())
}

#[test]
fn other_formats_of_bitsandbytes_are_named() {
    let rename = |from: &str, to: &str| {
        problem(|it| {
            let tensor = it.remove(&format!("{MATRIX}{from}")).unwrap();
            it.insert(format!("{}{to}", MATRIX.trim_end_matches(".weight")), tensor);
        })
    };
    let found = rename(".quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4");
    assert!(found.contains(&format!("`{MATRIX}` is in bitsandbytes' FP4")), "{found}");
    assert!(found.contains("--quantize nf4"), "{found}");
    let found = rename(".absmax", ".SCB");
    assert!(found.contains(&format!("`{MATRIX}` has 8 bits of bitsandbytes")), "{found}");
    assert!(found.contains("--quantize int8"), "{found}");
}

#[test]
fn parts_that_do_not_fit_are_named() {
    for part in [".absmax", ".nested_absmax", ".nested_quant_map", ".quant_map"] {
        let name = format!("{MATRIX}{part}");
        let found = problem(|it| drop(it.remove(&name)));
        assert!(found.contains(&format!("`{name}` is missing")), "{found}");
        let found = problem(|it| drop(it.insert(name.clone(), it["model.norm.weight"].clone())));
        let expected = if part == ".absmax" { "must be of type U8, not F32" } else { "and has 64" };
        assert!(found.contains(&format!("`{name}` must")) && found.contains(expected), "{found}");
    }
    let description = format!("{MATRIX}.quant_state.bitsandbytes__nf4");
    for (from, to, expected) in [
        ("[64, 64]", "[64, 65]", "must have 2080 numbers, and has 2048"),
        ("[64, 64]", "[0, 64]", "its shape is [0, 64]"),
        ("\"blocksize\": 64", "\"blocksize\": 128", "blocks of 128 numbers are not supported"),
        ("nested_offset", "nested_upset", "its scales are described in part"),
        ("float32", "float64", "`dtype` \"float64\" is not supported"),
        ("\"shape\"", "\"sharp\"", "its description: missing field `shape`"),
    ] {
        let dir = changed("nf4", |_| ());
        let path = dir.path().join("model.safetensors");
        let bytes = fs::read(&path).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let text = String::from_utf8(tensors.tensor(&description).unwrap().data().to_vec());
        let text = text.unwrap().replacen(from, to, 1);
        let mut tensors: BTreeMap<_, _> = tensors.tensors().into_iter().collect();
        let view = TensorView::new(safetensors::Dtype::U8, vec![text.len()], text.as_bytes());
        tensors.insert(description.clone(), view.unwrap());
        let changed = dir.path().join("changed");
        safetensors::serialize_to_file(tensors, None, &changed).unwrap();
        fs::rename(changed, path).unwrap();
        let found = error(dir.path());
        assert!(found.contains(expected) && found.contains(MATRIX), "{found}");
    }
}
