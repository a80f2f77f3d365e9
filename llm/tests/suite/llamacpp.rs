//! Files for llama.cpp: what that said of them (`tests/gguf/make_llamacpp.py`), and what is read in them again.

mod refused;
mod tokens;
mod types;

use std::{
    fs,
    path::{Path, PathBuf},
};

use burn::tensor::activation::log_softmax;
use burn_lora::{
    LoraAdapters, LoraModule,
    gguf::{Gguf, WRITER},
};
use burn_lora_llm::{
    chat::Chat,
    gguf::{family, open},
    llama::Llama,
    merged::{self, GgufKind, SavedGguf},
    pretrained,
};
use serde::Deserialize;
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    backend::Plain,
    decoder::{fixture as decoder, ids},
    oracle::device,
};

const FAMILIES: [&str; 6] = ["llama", "qwen2", "qwen3", "gemma3", "phi3", "smollm3"];

/// The log-probabilities of all next tokens after each text, by llama.cpp.
#[derive(Deserialize)]
struct Expected {
    ids: Vec<Vec<i32>>,
    base: Vec<Vec<f64>>,
    adapted: Vec<Vec<f64>>,
    merged: Vec<Vec<f64>>,
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gguf/fixtures/llamacpp").join(name)
}

fn expected(name: &str) -> Expected {
    let text = fs::read(fixture(name).join("expected.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

fn load(path: &Path) -> Llama<Plain> {
    pretrained::load::<Plain>(path, None, &device::<Plain>()).unwrap().llama
}

/// The adapter that PEFT wrote.
fn adapter(name: &str) -> LoraAdapters<Plain> {
    LoraAdapters::load(fixture(name).join("adapter"), &device::<Plain>()).unwrap()
}

/// Writes a model without changes.
fn save(base: &Path, out: &Path, kind: GgufKind) -> SavedGguf {
    merged::save_gguf(&load(base), &Chat::read(base).unwrap(), base, out, kind).unwrap()
}

#[track_caller]
fn assert_near(llama: &Llama<Plain>, ids: &[Vec<i32>], expected: &[Vec<f64>], what: &str) {
    let mut furthest = 0.0_f64;
    for (text, expected) in ids.iter().zip(expected) {
        let positions = llama.positions(text.len(), &device::<Plain>());
        let scores = llama.logits(llama.hidden(self::ids(&[text]), &positions));
        let last = scores.squeeze_dim::<2>(0).narrow(0, text.len() - 1, 1);
        let found = log_softmax(last, 1).into_data();
        for (found, expected) in found.iter::<f64>().zip(expected) {
            furthest = furthest.max((found - expected).abs());
        }
    }
    assert!(furthest < 1e-3, "{what}: {furthest}");
}

#[test]
fn models_say_in_llama_cpp_what_they_say_here() {
    for name in FAMILIES {
        let expected = expected(name);
        assert_eq!(expected.ids.len(), 20);
        assert_near(&load(&fixture(name)), &expected.ids, &expected.base, name);
        // The file that llama.cpp read is the one that is written now.
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("base.gguf");
        save(&fixture(name), &path, GgufKind::F32);
        let [mut now, mut then] =
            [path, fixture(name).join("base.gguf")].map(|path| open(&path).unwrap());
        for file in [&mut now, &mut then] {
            file.fields.remove(WRITER);
        }
        assert_eq!(now.fields, then.fields, "{name}");
        assert_same_tensors(&now, &then, name);
    }
}

#[track_caller]
fn assert_same_tensors(one: &Gguf, other: &Gguf, name: &str) {
    let names = |file: &Gguf| file.tensors.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(one), names(other), "{name}");
    for (tensor, it) in &one.tensors {
        assert_eq!(it.shape, other.tensors[tensor].shape, "{name}: {tensor}");
        assert_eq!(one.bytes(tensor).unwrap(), other.bytes(tensor).unwrap(), "{name}: {tensor}");
    }
}

#[test]
fn adapters_say_in_llama_cpp_what_they_say_here() {
    for name in FAMILIES {
        let (expected, set) = (expected(name), adapter(name));
        let llama = load(&fixture(name));
        let adapted = llama.switch(&set).unwrap();
        assert_near(&adapted, &expected.ids, &expected.adapted, name);
        let merged = adapted.merge().unwrap();
        assert_near(&merged, &expected.ids, &expected.merged, &format!("{name}, merged"));
        // Also what is written, with the adapter in it.
        let (dir, base) = (TempDir::new().unwrap(), fixture(name));
        let path = dir.path().join("merged.gguf");
        let chat = Chat::read(&base).unwrap();
        merged::save_gguf(&merged, &chat, &base, &path, GgufKind::F32).unwrap();
        assert_near(&load(&path), &expected.ids, &expected.merged, &format!("{name}, written"));
    }
}

/// llama.cpp's own converter is right but for the scale of rsLoRA, which is too small by the root of the rank.
#[test]
fn adapters_are_those_of_llama_cpps_converter() {
    for name in FAMILIES {
        let (set, device) = (adapter(name), device::<Plain>());
        let family = family(&pretrained::config(&fixture(name)).unwrap()).unwrap();
        let converted = fixture(name).join("converted.gguf");
        let loaded = LoraAdapters::<Plain>::load_gguf(&converted, &family, &device).unwrap();
        assert_eq!(loaded.len(), set.len(), "{name}");
        for (path, own) in set.iter() {
            let other = loaded.get(path).unwrap();
            for (own, other) in [(&own.a, &other.a), (&own.b, &other.b)] {
                assert_eq!(own.to_data(), other.to_data(), "{name}: {path}");
            }
            let wrong = if name == "qwen2" { f64::sqrt(2.0) } else { 1.0 };
            assert!((own.scale() / other.scale() - wrong).abs() < 1e-6, "{name}: {path}");
        }
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("x.gguf");
        set.save_gguf(&path, &family).unwrap();
        let [own, other] = [&path, &converted].map(|path| open(path).unwrap());
        assert_same_tensors(&own, &other, name);
        for key in ["general.architecture", "general.type", "adapter.type"] {
            assert_eq!(own.fields[key], other.fields[key], "{name}: {key}");
        }
        let again = LoraAdapters::<Plain>::load_gguf(&path, &family, &device).unwrap();
        for (path, own) in set.iter() {
            let difference = own.delta() - again.get(path).unwrap().delta();
            assert!(difference.abs().max().into_scalar() < 1e-6, "{name}: {path}");
        }
    }
}

/// A directory as a file, read again. Phi-3's has other factors for long texts, Granite's multipliers, and so on.
#[test]
fn each_family_is_the_same_in_a_file() {
    let text = [3, 1, 4, 1, 5, 9, 2];
    let scores = |llama: &Llama<Plain>| {
        let positions = llama.positions(text.len(), &device::<Plain>());
        llama.logits(llama.hidden(ids(&[&text]), &positions))
    };
    for name in [
        "llama2", "llama3", "smollm2", "biases", "mistral", "qwen2", "qwen3", "gemma2", "gemma3",
        "phi3", "olmo2", "smollm3", "granite",
    ] {
        let dir = TempDir::new().unwrap();
        let base = dir.path().join(name);
        copy(&decoder(name), &base);
        fs::copy(fixture("llama/tokenizer.json"), base.join("tokenizer.json")).unwrap();
        let path = dir.path().join("x.gguf");
        // These have fewer tokens than the tokenizer.
        let chat = Chat::read(&base).unwrap();
        let llama = load(&base);
        let error = merged::save_gguf(&llama, &chat, &base, &path, GgufKind::F32).unwrap_err();
        assert!(error.contains("and the model knows those below 29"), "{name}: {error}");
        assert!(!path.exists());
        fs::write(base.join("tokenizer.json"), small_tokenizer()).unwrap();
        let chat = Chat::read(&base).unwrap();
        merged::save_gguf(&llama, &chat, &base, &path, GgufKind::F32).unwrap();
        let difference = (scores(&load(&path)) - scores(&llama)).abs().max().into_scalar();
        assert!(difference < 1e-5, "{name}: {difference}");
    }
}

/// Copies the files of a directory.
fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for file in fs::read_dir(from).unwrap().map(|it| it.unwrap().path()) {
        if file.is_file() {
            fs::copy(&file, to.join(file.file_name().unwrap())).unwrap();
        }
    }
}

/// The first tokens of the tokenizer of these fixtures.
fn small_tokenizer() -> String {
    let text = fs::read_to_string(fixture("llama/tokenizer.json")).unwrap();
    let mut json: Value = serde_json::from_str(&text).unwrap();
    let vocabulary = json["model"]["vocab"].as_object_mut().unwrap();
    vocabulary.retain(|_, id| id.as_u64().unwrap() < 28);
    json["model"]["merges"] = Value::Array(Vec::new());
    json["added_tokens"] = Value::Array(Vec::new());
    json.to_string()
}
