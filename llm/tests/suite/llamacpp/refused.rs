//! Decoders that llama.cpp does not have, or whose files are not written.

use std::fs;

use burn_lora_llm::{
    chat::Chat,
    merged::{self, GgufKind},
};
use serde_json::{Map, Value};
use tempfile::TempDir;

use super::{copy, decoder, load, small_tokenizer};

#[test]
fn what_llama_cpp_does_not_have_is_refused_by_name() {
    for (name, changes, message) in [
        (
            "llama3",
            r#"{"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}"#,
            "are not written with such a rule of RoPE",
        ),
        (
            "qwen2",
            r#"{"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}"#,
            "`qwen2` models are not written with such a rule of RoPE",
        ),
        (
            "gemma2",
            r#"{"query_pre_attn_scalar": 144}"#,
            "scale the products of queries and keys by the size of a head",
        ),
        ("gemma2", r#"{"final_logit_softcapping": null}"#, "always have caps of scores"),
        (
            "gemma3",
            r#"{"sliding_window_pattern": 3, "layer_types": null}"#,
            "have windows in other layers",
        ),
        ("smollm3", r#"{"no_rope_layers": [1, 0, 1, 1]}"#, "turn queries and keys in other layers"),
    ] {
        let dir = TempDir::new().unwrap();
        let base = dir.path().join(name);
        copy(&decoder(name), &base);
        let config = fs::read(decoder(name).join("config.json")).unwrap();
        let mut config: Map<String, Value> = serde_json::from_slice(&config).unwrap();
        config.extend(serde_json::from_str::<Map<String, Value>>(changes).unwrap());
        fs::write(base.join("config.json"), Value::Object(config).to_string()).unwrap();
        fs::write(base.join("tokenizer.json"), small_tokenizer()).unwrap();
        let (chat, path) = (Chat::read(&base).unwrap(), dir.path().join("x.gguf"));
        let error =
            merged::save_gguf(&load(&base), &chat, &base, &path, GgufKind::F32).unwrap_err();
        assert!(error.contains(message), "{name}: {error}");
        assert!(!path.exists() && fs::read_dir(dir.path()).unwrap().count() == 1, "{name}");
    }
}

/// What the configuration says, before weights are read.
#[test]
fn tensors_that_llama_cpp_does_not_have_are_refused() {
    for (name, changes, message) in [
        ("qwen3", r#"{"attention_bias": true}"#, "have no biases behind attention"),
        ("olmo2", r#"{"tie_word_embeddings": true}"#, "have a head of their own"),
        ("gemma2", r#"{"tie_word_embeddings": false}"#, "have no head of their own"),
        ("olmo2", r#"{"head_dim": 6}"#, "as wide as the model"),
    ] {
        let dir = TempDir::new().unwrap();
        let base = dir.path().join(name);
        copy(&decoder(name), &base);
        fs::write(base.join("tokenizer.json"), small_tokenizer()).unwrap();
        let chat = Chat::read(&base).unwrap();
        merged::check_gguf(&chat, &base).unwrap();
        let config = fs::read(base.join("config.json")).unwrap();
        let mut config: Map<String, Value> = serde_json::from_slice(&config).unwrap();
        config.extend(serde_json::from_str::<Map<String, Value>>(changes).unwrap());
        fs::write(base.join("config.json"), Value::Object(config).to_string()).unwrap();
        let error = merged::check_gguf(&chat, &base).unwrap_err();
        assert!(error.contains(message), "{name}: {error}");
    }
}
