//! Tokenizers as fields of a file.

use std::{fs, path::Path};

use burn_lora_llm::{
    chat::Chat,
    gguf::{open, tokens},
    merged::{self, GgufKind},
};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{fixture, load, small_tokenizer};
use crate::files::Made;

/// Tokenizers as fields, and tokenizers of these fields.
#[test]
fn tokens_are_the_same_in_a_file() {
    let texts = fs::read(fixture("../texts.json")).unwrap();
    let texts: Vec<String> = serde_json::from_slice(&texts).unwrap();
    for name in ["llama.json", "gemma.json"] {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gguf/fixtures").join(name);
        let fixture: Value = serde_json::from_slice(&fs::read(fixture).unwrap()).unwrap();
        let fields = fixture["fields"].as_object().unwrap();
        let tokenizer = tokens::tokenizer(fields, Path::new("x.gguf")).unwrap();
        let again = again(tokenizer.clone());
        for text in &texts {
            let [own, other] =
                [&tokenizer, &again].map(|it| it.encode(text.as_str(), true).unwrap());
            assert_eq!(own.get_ids(), other.get_ids(), "{name}: {text:?}");
            let [own, other] =
                [&tokenizer, &again].map(|it| it.decode(own.get_ids(), false).unwrap());
            assert_eq!(own, other, "{name}");
        }
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gguf/fixtures/divisions.json");
    let fixture: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let kinds = vec![1; fixture["tokens"].as_array().unwrap().len()];
    for name in [
        "llama-bpe",
        "dbrx",
        "qwen2",
        "qwen35",
        "tekken",
        "gpt-4o",
        "deepseek-v3",
        "gpt-2",
        "smollm",
        "falcon",
        "default",
    ] {
        let fields = json!({
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.tokens": fixture["tokens"],
            "tokenizer.ggml.merges": fixture["merges"], "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.bos_token_id": 0,
        });
        let tokenizer =
            tokens::tokenizer(fields.as_object().unwrap(), Path::new("x.gguf")).unwrap();
        let again = again(tokenizer.clone());
        for text in &texts[..200] {
            let [own, other] =
                [&tokenizer, &again].map(|it| it.encode(text.as_str(), false).unwrap());
            assert_eq!(own.get_ids(), other.get_ids(), "{name}: {text:?}");
        }
    }
}

/// The tokenizer of the fields of a tokenizer.
fn again(tokenizer: tokenizers::Tokenizer) -> tokenizers::Tokenizer {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("x.gguf");
    let begin = tokenizer.encode("", true).unwrap().get_ids().first().copied();
    let begin = begin.and_then(|id| tokenizer.id_to_token(id));
    let known = tokenizer.get_vocab_size(true);
    fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string(false).unwrap()).unwrap();
    let settings = json!({ "bos_token": begin, "eos_token": tokenizer.id_to_token(2) });
    fs::write(dir.path().join("tokenizer_config.json"), settings.to_string()).unwrap();
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    let fields = Chat::read(dir.path()).unwrap().gguf_fields(known).unwrap();
    burn_lora::gguf::write(&path, fields, Vec::new()).unwrap();
    tokens::tokenizer(&open(&path).unwrap().fields, &path).unwrap()
}

#[test]
fn other_tokenizers_are_refused() {
    let base = Made::new().write();
    // Words, which llama.cpp does not know.
    let chat = Chat::read(base.path()).unwrap();
    let path = base.path().join("x.gguf");
    let llama = load(base.path());
    let error = merged::save_gguf(&llama, &chat, base.path(), &path, GgufKind::F32).unwrap_err();
    assert!(error.contains("the tokenizer is of the kind"), "{error}");
    assert!(!path.exists());
}

#[test]
fn tokenizers_that_llama_cpp_does_not_have_are_refused() {
    let fields = |change: &dyn Fn(&mut Value), config: &str| {
        let dir = TempDir::new().unwrap();
        let mut json: Value = serde_json::from_str(&small_tokenizer()).unwrap();
        change(&mut json);
        fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
        fs::write(dir.path().join("config.json"), config).unwrap();
        let fields = Chat::read(dir.path()).unwrap().gguf_fields(29)?;
        let path = dir.path().join("x.gguf");
        burn_lora::gguf::write(&path, fields, Vec::new()).unwrap();
        Ok::<_, String>(open(&path).unwrap().fields)
    };
    let ends = r#"{"eos_token_id": [3, 4, 29]}"#;
    let refused = |change: &dyn Fn(&mut Value), config: &str, message: &str| {
        let error = fields(change, config).unwrap_err();
        assert!(error.contains(message), "{error}");
    };
    refused(
        &|json| json["normalizer"] = json!({"type": "Lowercase"}),
        ends,
        "has the step \"Lowercase\"",
    );
    refused(
        &|json| json["model"]["end_of_word_suffix"] = json!("</w>"),
        ends,
        "has a `end_of_word_suffix`",
    );
    refused(&|_| (), "{}", "no token ends texts");
    refused(
        &|json| json["pre_tokenizer"] = json!({"type": "Whitespace"}),
        ends,
        "divides texts in a way",
    );
    // SentencePiece makes `an` of `a` and `n`, and this does not.
    let pieces = |json: &mut Value| {
        json["model"]["byte_fallback"] = json!(true);
        json["pre_tokenizer"] = Value::Null;
        json["model"]["vocab"]["an"] = json!(28);
    };
    refused(&pieces, ends, "merges are not those of SentencePiece");
    let whole = |json: &mut Value| {
        pieces(json);
        json["model"]["merges"] = json!([["a", "n"]]);
    };
    assert_eq!(fields(&whole, ends).unwrap()["tokenizer.ggml.model"], "llama");
    // Tokens that were added without training are left out, and so are ends that the model does not know.
    let added = |json: &mut Value| {
        let token = |id: u32, content: &str| {
            json!({
                "id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false,
            })
        };
        json["added_tokens"] = json!([token(28, "<|im_end|>"), token(29, "<image>")]);
    };
    let found = fields(&added, r#"{"eos_token_id": [29, 3, 28]}"#).unwrap();
    assert_eq!(found["tokenizer.ggml.tokens"].as_array().unwrap().len(), 29);
    assert_eq!(found["tokenizer.ggml.eos_token_id"], 3);
    assert_eq!(found["tokenizer.ggml.eot_token_id"], 28);
}
