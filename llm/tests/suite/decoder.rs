//! The decoder computes the same as Hugging Face's `transformers`, for
//! each architecture that it reads, with and without an adapter. `tests/llama/make_fixtures.py` and `make_nf4.py` wrote
//! the models and the reference outputs.

mod families;
mod nf4;
mod packed;
mod rules;

use std::{
    fs,
    path::{Path, PathBuf},
};

use burn::tensor::{Int, Tensor, TensorData, activation::log_softmax};
use burn_lora::{LoraAdapters, LoraConfig, LoraModule};
use serde::Deserialize;
use serde_json::{Value, json};

use burn_lora_llm::{
    llama::{Cache, Llama},
    pretrained,
};
use tempfile::TempDir;

use crate::{
    backend::{Plain, Train},
    oracle::{Matrix, assert_close, device},
};

const MODELS: [&str; 7] = ["llama2", "llama3", "smollm2", "biases", "mistral", "qwen2", "qwen3"];

/// Texts, and the scores from Python: a row per token.
#[derive(Deserialize)]
pub struct Expected {
    pub ids: Vec<Vec<i32>>,
    logits: Vec<Vec<f64>>,
}

impl Expected {
    pub fn read(path: PathBuf) -> Self {
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    }

    /// The rows of some tokens of a text.
    pub fn rows(&self, text: usize, tokens: std::ops::Range<usize>) -> Matrix {
        let length = self.ids[0].len();
        let rows = &self.logits[text * length..][tokens];
        Matrix { rows: rows.len(), cols: rows[0].len(), data: rows.concat() }
    }
}

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/llama/fixtures").join(name)
}

pub fn tiny(name: &str) -> Llama<Plain> {
    pretrained::load(&fixture(name), None, &device::<Plain>()).unwrap().llama
}

pub fn ids(texts: &[&[i32]]) -> Tensor<Plain, 2, Int> {
    let shape = [texts.len(), texts[0].len()];
    Tensor::from_data(TensorData::new(texts.concat(), shape), &device::<Plain>())
}

#[track_caller]
fn assert_computes(llama: &Llama<Plain>, expected: PathBuf) {
    let expected = Expected::read(expected);
    let texts: Vec<_> = expected.ids.iter().map(Vec::as_slice).collect();
    let positions = llama.positions(texts[0].len(), &device::<Plain>());
    let logits = llama.logits(llama.hidden(ids(&texts), &positions));
    let (rows, cols) = (expected.logits.len(), expected.logits[0].len());
    assert_eq!(llama.vocab_size(), cols);
    let expected = Matrix { rows, cols, data: expected.logits.concat() };
    assert_close(logits.reshape([rows, cols]), &expected, 2e-5);
}

#[test]
fn scores_are_those_of_transformers() {
    for name in MODELS {
        let loaded = pretrained::load::<Plain>(&fixture(name), None, &device::<Plain>()).unwrap();
        let stored = if name == "mistral" { Some("BF16") } else { None };
        assert_eq!(loaded.stored.as_deref(), stored, "{name}");
        assert_computes(&loaded.llama, fixture(name).join("expected.json"));
    }
}

/// Texts of several lengths, which come and go, go on together as each would alone.
#[test]
fn texts_in_one_cache_do_not_see_each_other() {
    for name in ["smollm2", "qwen3", "llama3"] {
        let llama = tiny(name);
        let begins: [&[i32]; 3] = [&[3, 1, 4], &[1, 5, 9, 2, 6, 5], &[7]];
        let begun = begins.map(|begin| {
            let mut cache = llama.cache();
            llama.read(ids(&[begin]), &mut cache);
            cache
        });
        let alone = |text: usize, next: &[i32]| {
            let mut cache = begun[text].clone();
            let read = |&id| llama.read(ids(&[&[id]]), &mut cache);
            next.iter().map(read).last().unwrap()
        };
        let assert_near = |actual: Tensor<Plain, 2>, expected: Tensor<Plain, 2>| {
            let difference = (actual - expected).abs().max().into_scalar();
            assert!(difference < 1e-5, "{name}: {difference}");
        };
        let mut cache = Cache::join(&begun);
        let scores = llama.read(ids(&[&[8], &[2], &[3]]), &mut cache);
        for (text, next) in [8, 2, 3].into_iter().enumerate() {
            assert_near(scores.clone().narrow(0, text, 1), alone(text, &[next]));
        }
        // The longest leaves, and a new one comes.
        let mut cache = Cache::join(&[cache.select(&[2, 0]), begun[1].clone()]);
        let scores = llama.read(ids(&[&[6], &[4], &[2]]), &mut cache);
        for (row, (text, next)) in
            [(2, vec![3, 6]), (0, vec![8, 4]), (1, vec![2])].iter().enumerate()
        {
            assert_near(scores.clone().narrow(0, row, 1), alone(*text, next));
        }
    }
}

/// Needs the model: the environment variable `SMOLLM2` is a directory with SmolLM2-135M-Instruct.
#[test]
#[ignore = "needs the weights of SmolLM2-135M-Instruct"]
fn scores_of_smollm2_are_those_of_transformers() {
    #[derive(Deserialize)]
    struct Scored {
        ids: Vec<i32>,
        /// The largest score after the text, and some of them.
        largest: f64,
        scores: Vec<f64>,
        cross_entropy: f64,
    }
    #[derive(Deserialize)]
    struct Expected {
        some: Vec<i32>,
        texts: Vec<Scored>,
    }
    let dir = std::env::var("SMOLLM2").expect("SMOLLM2 says where SmolLM2-135M-Instruct is");
    let device = device::<Plain>();
    let llama = pretrained::load::<Plain>(Path::new(&dir), None, &device).unwrap().llama;
    let expected: Expected =
        serde_json::from_slice(&fs::read(fixture("smollm2.json")).unwrap()).unwrap();
    let ints = |ids: &[i32]| Tensor::<Plain, 1, Int>::from_data(TensorData::from(ids), &device);
    let (mut difference, mut sum, mut expected_sum, mut targets) = (0.0_f64, 0.0, 0.0, 0);
    for text in &expected.texts {
        let length = text.ids.len();
        let hidden = llama.hidden(ids(&[&text.ids]), &llama.positions(length, &device));
        let scores = llama.logits(hidden).squeeze_dim::<2>(0);
        let last = scores.clone().narrow(0, length - 1, 1).squeeze_dim::<1>(0);
        let some: Vec<f64> = last.select(0, ints(&expected.some)).into_data().iter().collect();
        for (found, expected) in some.iter().zip(&text.scores) {
            difference = difference.max((found - expected).abs() / text.largest);
        }
        if length == 1 {
            continue;
        }
        let next = ints(&text.ids[1..]).unsqueeze_dim(1);
        let next = log_softmax(scores.narrow(0, 0, length - 1), 1).gather(1, next).sum().neg();
        sum += next.into_data().iter::<f64>().sum::<f64>();
        expected_sum += text.cross_entropy;
        targets += length - 1;
    }
    let perplexities = [sum, expected_sum].map(|sum| (sum / targets as f64).exp());
    println!("largest difference {difference:.1e}; perplexity {perplexities:?}");
    assert!(difference < 1e-4);
    assert!((perplexities[0] / perplexities[1] - 1.0).abs() < 1e-3);
}

#[test]
fn adapters_of_peft_compute_the_same_and_keep_their_names() {
    let dir = TempDir::new().unwrap();
    for name in MODELS {
        let path = fixture(name).join("adapter");
        let adapters = LoraAdapters::load(&path, &device::<Plain>()).unwrap();
        let adapted = tiny(name).switch(&adapters).unwrap();
        assert_computes(&adapted, path.join("expected.json"));

        adapted.adapters().save(dir.path().join(name)).unwrap();
        let read = |dir: &Path| fs::read(dir.join("adapter_model.safetensors")).unwrap();
        assert_eq!(read(&dir.path().join(name)), read(&path), "{name}");
        assert_computes(&adapted.merge().unwrap(), path.join("expected.json"));
    }
}

#[test]
fn a_target_means_what_it_means_in_peft() {
    let llama =
        pretrained::load::<Train>(&fixture("qwen3"), None, &device::<Train>()).unwrap().llama;
    let config = LoraConfig::new(2, 5.0).with_targets(["q_proj", "v_proj"]);
    let adapted = llama.attach(&config).unwrap();
    let adapters = adapted.adapters();
    let paths: Vec<_> = adapters.iter().map(|(path, _)| path.to_owned()).collect();
    let path = |layer: usize, name: &str| format!("model.layers.{layer}.self_attn.{name}");
    let expected: Vec<_> =
        (0..2).flat_map(|layer| ["q_proj", "v_proj"].map(|name| path(layer, name))).collect();
    assert_eq!(paths, expected);
}

#[test]
fn what_is_read_in_parts_scores_the_same_as_in_one() {
    for name in ["llama3", "qwen3"] {
        let (llama, expected) = (tiny(name), Expected::read(fixture(name).join("expected.json")));
        let text = &expected.ids[1];
        let mut cache = llama.cache();
        // Several tokens at once, first and later.
        for part in [0..4, 4..5, 5..8, 8..9] {
            let logits = llama.read(ids(&[&text[part.clone()]]), &mut cache);
            assert_close(logits, &expected.rows(1, part.end - 1..part.end), 2e-5);
        }
    }
}

#[test]
fn texts_in_one_row_do_not_see_each_other() {
    let llama = tiny("llama3");
    let expected = Expected::read(fixture("llama3/expected.json"));
    let (one, two) = (&expected.ids[0][..5], &expected.ids[1][..4]);
    let row = [one, two].concat();
    let positions = llama.packed(&[vec![5, 4]], &device::<Plain>());
    let scores = llama.logits(llama.hidden(ids(&[&row]), &positions)).squeeze_dim::<2>(0);
    assert_close(scores.clone().narrow(0, 0, 5), &expected.rows(0, 0..5), 2e-5);
    assert_close(scores.narrow(0, 5, 4), &expected.rows(1, 0..4), 2e-5);

    // Rows with other divisions, in one batch.
    let positions = llama.packed(&[vec![9], vec![5, 4]], &device::<Plain>());
    let scores = llama.logits(llama.hidden(ids(&[&expected.ids[0], &row]), &positions));
    let of = |text: usize| scores.clone().narrow(0, text, 1).squeeze_dim::<2>(0);
    assert_close(of(0), &expected.rows(0, 0..9), 2e-5);
    assert_close(of(1).narrow(0, 5, 4), &expected.rows(1, 0..4), 2e-5);
}

/// A copy of a fixture with another configuration, in a directory `dir`.
fn changed(name: &str, change: impl FnOnce(&mut Value)) -> TempDir {
    let dir = TempDir::new().unwrap();
    for file in fs::read_dir(fixture(name)).unwrap() {
        let file = file.unwrap();
        if file.file_type().unwrap().is_file() {
            fs::copy(file.path(), dir.path().join(file.file_name())).unwrap();
        }
    }
    let path = dir.path().join("config.json");
    let mut config = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    fs::write(path, config.to_string()).unwrap();
    dir
}

fn error(dir: &Path) -> String {
    pretrained::load::<Plain>(dir, None, &device::<Plain>()).err().expect("it cannot be loaded")
}

#[test]
fn older_files_say_the_same_in_other_words() {
    let dir = changed("llama3", |config| {
        let mut rope = config["rope_parameters"].take();
        config["rope_theta"] = rope.as_object_mut().unwrap().remove("rope_theta").unwrap();
        rope["type"] = rope.as_object_mut().unwrap().remove("rope_type").unwrap();
        config["rope_scaling"] = rope;
        config.as_object_mut().unwrap().remove("rope_parameters");
    });
    let llama = pretrained::load(dir.path(), None, &device::<Plain>()).unwrap().llama;
    assert_computes(&llama, fixture("llama3/expected.json"));
}

#[test]
fn what_the_decoder_is_not_is_refused_by_name() {
    for (model, key, value, expected) in [
        ("llama2", "model_type", json!("gemma3"), "unknown variant `gemma3`"),
        ("llama2", "hidden_act", json!("gelu"), "`hidden_act` must be \"silu\", and is \"gelu\""),
        ("llama2", "num_key_value_heads", json!(4), "6 query heads cannot share 4"),
        ("llama2", "head_dim", json!(3), "the size of a head must be even, and is 3"),
        (
            "llama2",
            "vocab_size",
            json!(1_000_000_000_000_u64),
            "is [1000000000000, 12], and it is [29, 12]",
        ),
        ("llama2", "num_hidden_layers", json!(3), "it has 3 layers, and it has 2"),
        (
            "llama2",
            "quantization_config",
            json!({"quant_method": "awq"}),
            "(\"awq\") is not supported",
        ),
        (
            "llama2",
            "rope_parameters",
            json!({"rope_type": "proportional"}),
            "`rope_type` \"proportional\" is not supported",
        ),
        ("llama2", "rms_norm_eps", json!(0), "`rms_norm_eps` must be above 0"),
    ] {
        let dir = changed(model, |config| config[key] = value);
        let error = error(dir.path());
        assert!(error.contains(expected), "{error}");
        assert!(error.contains(dir.path().to_str().unwrap()), "{error}");
    }
    // A window that hides nothing.
    for (model, key, value) in [("mistral", "sliding_window", 64), ("qwen2", "sliding_window", 8)] {
        let dir = changed(model, |config| config[key] = json!(value));
        let llama = pretrained::load(dir.path(), None, &device::<Plain>()).unwrap().llama;
        assert_computes(&llama, fixture(model).join("expected.json"));
    }
}

#[test]
fn all_tensors_that_do_not_fit_are_in_one_error() {
    // The head is missing, and no layer has biases.
    let dir = changed("smollm2", |config| {
        config["tie_word_embeddings"] = json!(false);
        config["model_type"] = json!("qwen2");
    });
    let found = error(dir.path());
    for name in ["lm_head", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"] {
        let tensor = if name == "lm_head" { "weight" } else { "bias" };
        assert!(found.contains(&format!("`{name}.{tensor}` is missing")), "{found}");
    }
    let dir = changed("biases", |config| config["mlp_bias"] = json!(false));
    let found = error(dir.path());
    assert!(found.contains("`model.layers.1.mlp.up_proj.bias` belongs to nothing"), "{found}");
    assert_eq!(found.matches("belongs to nothing").count(), 6, "{found}");

    // A part that is missing, one outside, and a tensor that is in no part.
    let part = "model-00002-of-00005.safetensors";
    let dir = changed("qwen2", |_| ());
    fs::remove_file(dir.path().join(part)).unwrap();
    assert!(error(dir.path()).contains(part));
    for (file, expected) in [
        ("../model.safetensors", "is not the name of a file in the directory"),
        ("model-00001-of-00005.safetensors", "is only in the index, or only in the files"),
    ] {
        let dir = changed("qwen2", |_| ());
        let index = dir.path().join("model.safetensors.index.json");
        let mut json: Value = serde_json::from_slice(&fs::read(&index).unwrap()).unwrap();
        json["weight_map"]["model.unknown.weight"] = json!(file);
        fs::write(index, json.to_string()).unwrap();
        let found = error(dir.path());
        assert!(found.contains(expected) && found.contains("index.json"), "{found}");
    }
}
