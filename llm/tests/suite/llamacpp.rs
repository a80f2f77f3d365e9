//! Files for llama.cpp: what that said of them (`tests/gguf/make_llamacpp.py`), and what is read in them again.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use burn::tensor::{Tensor, activation::log_softmax};
use burn_lora::{
    LoraAdapters, LoraModule,
    gguf::{Gguf, Packing, WRITER},
    quantize::GgufType,
};
use burn_lora_llm::{
    chat::Chat,
    gguf::{family, open, tokens},
    llama::Llama,
    merged::{self, GgufKind, SavedGguf},
    pretrained,
};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use crate::{
    backend::Plain,
    decoder::{fixture as decoder, ids},
    files::Made,
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

/// What nothing changed keeps its bytes, in whatever type it is, and its fields.
#[test]
fn a_file_that_nothing_changed_is_written_as_it_was() {
    for name in ["q4_k_m", "others", "packed", "gemma3", "phi3", "llama3"] {
        let (dir, base) = (TempDir::new().unwrap(), decoder(&format!("{name}.gguf")));
        let path = dir.path().join("x.gguf");
        let (llama, chat) = (load(&base).dequantize(), chat(dir.path()));
        let saved = merged::save_gguf(&llama, &chat, &base, &path, GgufKind::Keep).unwrap();
        assert!(saved.rounding.is_empty() && saved.replaced.is_empty(), "{name}: {saved:?}");
        let [mut found, expected] = [&path, &base].map(|path| open(path).unwrap());
        found.fields.remove(WRITER);
        assert_eq!(found.fields, expected.fields, "{name}");
        assert_same_tensors(&found, &expected, name);
    }
}

/// The tokens do not matter where the fields are copied.
fn chat(dir: &Path) -> Chat {
    fs::write(dir.join("tokenizer.json"), small_tokenizer()).unwrap();
    fs::write(dir.join("config.json"), "{}").unwrap();
    let chat = Chat::read(dir).unwrap();
    fs::remove_file(dir.join("config.json")).unwrap();
    chat
}

/// Only what an adapter changed gets another type, and that is told.
#[test]
fn what_was_changed_in_a_file_of_k_quants_is_told() {
    let (dir, base) = (TempDir::new().unwrap(), decoder("q4_k_m.gguf"));
    let llama = load(&base);
    let layer = "model.layers.0.mlp.up_proj";
    let config = burn_lora::LoraConfig::new(2, 3.0).with_targets([layer]);
    let set = llama.attach(&config).unwrap().adapters();
    let set = LoraAdapters::new(set.iter().map(|(path, it)| {
        let mut it = it.clone();
        it.b = burn::module::Param::from_tensor(it.b.val() + 0.05);
        (path.to_owned(), it)
    }));
    let merged = llama.switch(&set).unwrap().merge().unwrap().dequantize();
    let (path, chat) = (dir.path().join("x.gguf"), chat(dir.path()));
    let saved = merged::save_gguf(&merged, &chat, &base, &path, GgufKind::Keep).unwrap();
    let name = format!("{layer}.weight");
    let was = open(&base).unwrap().tensors["blk.0.ffn_up.weight"].packing;
    let q8_0 = Packing::Blocks(GgufType::Q8_0);
    assert_eq!(saved.replaced, BTreeMap::from([(name.clone(), [was, q8_0])]));
    assert_eq!(saved.rounding.keys().collect::<Vec<_>>(), [&name]);
    let rounding = saved.rounding[&name];
    assert!(rounding.error > 0.0 && rounding.error < 0.01 * rounding.norm, "{rounding:?}");
    assert_eq!(saved.kept.len() + 1, saved.packings.len());
    let [found, expected] = [&path, &base].map(|path| open(path).unwrap());
    for (name, tensor) in &expected.tensors {
        if name == "blk.0.ffn_up.weight" {
            assert_eq!(found.tensors[name].packing, q8_0);
        } else {
            assert_eq!(found.tensors[name].packing, tensor.packing, "{name}");
            assert_eq!(found.bytes(name).unwrap(), expected.bytes(name).unwrap(), "{name}");
        }
    }
}

/// Matrices are in the type that was asked for where its blocks fit, and what rounding changed is told.
#[test]
fn matrices_have_the_type_that_was_asked_for() {
    let (dir, base) = (TempDir::new().unwrap(), decoder("q4_k_m.gguf"));
    let (llama, chat) = (load(&base).dequantize(), chat(dir.path()));
    let mut errors = Vec::new();
    for (kind, packing) in [
        (GgufKind::F32, Packing::F32),
        (GgufKind::BF16, Packing::BF16),
        (GgufKind::F16, Packing::F16),
        (GgufKind::Q8_0, Packing::Blocks(GgufType::Q8_0)),
        (GgufKind::Q5_1, Packing::Blocks(GgufType::Q5_1)),
        (GgufKind::Q5_0, Packing::Blocks(GgufType::Q5_0)),
        (GgufKind::Q4_1, Packing::Blocks(GgufType::Q4_1)),
        (GgufKind::Q4_0, Packing::Blocks(GgufType::Q4_0)),
    ] {
        let path = dir.path().join(format!("{kind}.gguf"));
        let saved = merged::save_gguf(&llama, &chat, &base, &path, kind).unwrap();
        let file = open(&path).unwrap();
        let head = if llama.is_tied() { "token_embd.weight" } else { "output.weight" };
        for (name, tensor) in &file.tensors {
            let expected = match tensor.shape.len() {
                1 => Packing::F32,
                _ if name == head && matches!(packing, Packing::Blocks(_)) => {
                    Packing::Blocks(GgufType::Q8_0)
                }
                _ => packing,
            };
            assert_eq!(tensor.packing, expected, "{kind}: {name}");
        }
        let name = "model.layers.0.mlp.up_proj.weight";
        errors.push(saved.rounding.get(name).map_or(0.0, |it| it.error / it.norm));
        // What is read again is what was told.
        let matrix = |path: &Path| -> Tensor<Plain, 1> {
            let values = open(path).unwrap().values("blk.0.ffn_up.weight").unwrap();
            Tensor::from_floats(values.as_slice(), &device::<Plain>())
        };
        let [found, was] = [matrix(&path), matrix(&base)];
        let norm = |it: Tensor<Plain, 1>| f64::from(it.square().sum().sqrt().into_scalar());
        let error = norm(found - was.clone()) / norm(was);
        let told = errors.last().unwrap();
        assert!((error - told).abs() < 1e-4 + 1e-3 * error, "{kind}: {error}, and {told} is told");
    }
    let (fine, coarse) = errors.split_at(4);
    assert!(fine.iter().all(|it| *it < 0.01), "{errors:?}");
    assert!(coarse.iter().all(|it| (0.01..0.15).contains(it)), "{errors:?}");
}

/// Rows that are no whole blocks stay in half precision.
#[test]
fn rows_that_are_no_whole_blocks_are_told() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("x.gguf");
    let saved = save(&fixture("llama"), &path, GgufKind::Q8_0);
    assert!(saved.packings.values().all(|it| matches!(it, Packing::F16 | Packing::F32)));
    assert!(saved.rounding.values().all(|it| it.error < 0.001 * it.norm));
}

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
