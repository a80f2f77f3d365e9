//! Windows, and the rules of RoPE, by configurations alone: the weights are a formula.

use std::{collections::BTreeMap, fs};

use burn::{module::Initializer, tensor::Tensor};
use burn_lora_llm::{
    config::LlamaConfig,
    llama::Llama,
    pretrained::{self, python_name},
};
use burn_store::{BurnToPyTorchAdapter, ModuleSnapshot};
use safetensors::{Dtype, tensor::TensorView};
use serde::Deserialize;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{error, fixture, ids};
use crate::{
    backend::Plain,
    oracle::{Matrix, assert_close, device},
};

#[derive(Deserialize)]
struct Scored {
    ids: Vec<Vec<i32>>,
    /// After the last tokens.
    logits: Vec<Vec<f64>>,
}

impl Scored {
    #[track_caller]
    fn check(&self, llama: &Llama<Plain>) {
        let (length, count) = (self.ids[0].len(), self.logits.len());
        let positions = llama.positions(length, &device::<Plain>());
        let scores = llama.logits(llama.hidden(ids(&[&self.ids[0]]), &positions));
        let scores: Tensor<Plain, 2> = scores.squeeze_dim(0);
        let expected =
            Matrix { rows: count, cols: self.logits[0].len(), data: self.logits.concat() };
        assert_close(scores.narrow(0, length - count, count), &expected, 2e-5);
    }
}

fn cases<C: for<'a> Deserialize<'a>>(name: &str) -> BTreeMap<String, C> {
    serde_json::from_slice(&fs::read(fixture(name)).unwrap()).unwrap()
}

/// A model of this configuration. Number i of a tensor is 0.6·sin(i + the length of its name), of norms 1 more.
fn directory(config: &Value) -> TempDir {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let blank: Llama<Plain> = LlamaConfig::from_json(config.clone())
        .unwrap()
        .init(&Initializer::Zeros, &device::<Plain>());
    let tensors = blank.collect(None, Some(Box::new(BurnToPyTorchAdapter)), false).into_iter();
    let tensors = tensors.map(|it| {
        let name = python_name(&it.full_path());
        let added = if name.contains("norm") { 1.0 } else { 0.0 };
        let number = |i: usize| (0.6 * ((i + name.len()) as f64).sin() + added) as f32;
        let numbers = (0..it.shape.num_elements()).flat_map(|i| number(i).to_le_bytes());
        (name.clone(), it.shape.to_vec(), numbers.collect::<Vec<_>>())
    });
    let tensors: Vec<_> = tensors.collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    dir
}

fn model(config: &Value) -> Llama<Plain> {
    pretrained::load(directory(config).path(), None, &device::<Plain>()).unwrap().llama
}

#[test]
fn windows_hide_what_they_hide_in_transformers() {
    #[derive(Deserialize)]
    struct Case {
        config: Value,
        #[serde(flatten)]
        scored: Scored,
    }
    let cases: BTreeMap<String, Case> = cases("windows.json");
    assert_eq!(cases.len(), 3);
    for Case { config, scored } in cases.values() {
        scored.check(&model(config));
    }
}

#[derive(Deserialize)]
struct Rule {
    config: Value,
    texts: Vec<Scored>,
}

#[test]
fn rules_of_rope_are_those_of_transformers() {
    let rules: BTreeMap<String, Rule> = cases("rules.json");
    assert_eq!(rules.len(), 8);
    for Rule { config, texts } in rules.values() {
        let llama = model(config);
        texts.iter().for_each(|it| it.check(&llama));
    }
}

/// The parameters of a rule in their older place, under the older names.
fn older(config: &Value, name: &str) -> Value {
    let mut config = config.clone();
    let mut rule = config["rope_parameters"].take();
    let fields = rule.as_object_mut().unwrap();
    config["rope_theta"] = fields.remove("rope_theta").unwrap();
    let kind = fields.remove("rope_type").unwrap();
    for name in name.split('+') {
        fields.insert(name.to_owned(), kind.clone());
    }
    if let Some(share) = fields.remove("partial_rotary_factor") {
        config["partial_rotary_factor"] = share;
    }
    config["rope_scaling"] = rule;
    config
}

#[test]
fn rules_may_have_older_names_in_older_places() {
    let rules: BTreeMap<String, Rule> = cases("rules.json");
    for Rule { config, texts } in rules.values() {
        for names in ["type", "rope_type", "type+rope_type"] {
            let llama = model(&older(config, names));
            texts[1].check(&llama);
        }
    }
    // What "longrope" was called at first.
    let mut su = rules["longrope"].config.clone();
    su["rope_parameters"]["rope_type"] = json!("su");
    rules["longrope"].texts[1].check(&model(&su));
}

#[test]
fn older_files_of_gemma_3_say_the_same() {
    let dir = super::changed("gemma3", |config| {
        let mut rules = config["rope_parameters"].take();
        let mut full = rules["full_attention"].take();
        config["rope_theta"] = full.as_object_mut().unwrap().remove("rope_theta").unwrap();
        config["rope_scaling"] = full;
        config["rope_local_base_freq"] = rules["sliding_attention"]["rope_theta"].take();
        let fields = config.as_object_mut().unwrap();
        fields.remove("layer_types");
        fields.remove("tie_word_embeddings");
        fields.insert("sliding_window_pattern".to_owned(), json!(6));
    });
    let llama = pretrained::load(dir.path(), None, &device::<Plain>()).unwrap().llama;
    super::assert_computes(&llama, fixture("gemma3/expected.json"));
}

#[test]
fn what_is_wrong_with_a_rule_is_told() {
    let rule = |parameters: Value| json!({"rope_parameters": parameters});
    for (name, change, expected) in [
        (
            "llama3",
            rule(json!({"rope_type": "yarn", "factor": 0})),
            "RoPE's `factor` must be above 0",
        ),
        ("llama3", rule(json!({"rope_type": "dynamic"})), "RoPE's `factor` is missing"),
        ("llama3", rule(json!({"rope_type": "longrope"})), "RoPE's `short_factor` is missing"),
        (
            "llama3",
            rule(json!({"rope_type": "longrope", "short_factor": [1, 2], "long_factor": [1, 2]})),
            "RoPE's `short_factor` must have 4 numbers above 0, and has 2",
        ),
        ("llama3", rule(json!({"rope_type": "xpos"})), "`rope_type` \"xpos\" is not supported"),
        ("phi3", rule(json!({"partial_rotary_factor": 1.5})), "`partial_rotary_factor` must be"),
        ("phi3", rule(json!({"partial_rotary_factor": 0.4})), "must be an even number of them"),
        ("gemma2", json!({"layer_types": ["full_attention"]}), "`layer_types` has 1 types for 2"),
        (
            "gemma2",
            json!({"layer_types": ["full_attention", "linear_attention"]}),
            "linear_attention",
        ),
        ("gemma2", json!({"sliding_window": 0}), "`sliding_window` is 0"),
        ("gemma2", json!({"query_pre_attn_scalar": 0}), "`query_pre_attn_scalar` must be above 0"),
        ("gemma2", json!({"final_logit_softcapping": -1}), "`final_logit_softcapping` must be"),
        ("gemma2", json!({"hidden_activation": "gelu"}), "`hidden_activation` must be"),
        ("gemma2", json!({"use_bidirectional_attention": true}), "`use_bidirectional_attention`"),
        ("granite", json!({"logits_scaling": 0}), "`logits_scaling` must be above 0"),
        (
            "llama2",
            json!({"head_dim": 1_099_511_627_776_u64}),
            "the size of a head is 1099511627776",
        ),
        (
            "llama3",
            rule(json!({"rope_type": "yarn", "factor": 2, "rope_theta": 1})),
            "`rope_theta` is 1",
        ),
        ("smollm3", json!({"no_rope_layers": [1]}), "`no_rope_layers` has 1 numbers for 4 layers"),
        ("smollm3", json!({"no_rope_layers": null, "no_rope_layer_interval": 0}), "is 0"),
        ("llama2", json!({"num_hidden_layers": 1_000_000_000_000_u64}), "`num_hidden_layers` is"),
    ] {
        let dir = super::changed(name, |config| {
            for (key, value) in change.as_object().unwrap() {
                config[key] = value.clone();
            }
        });
        let found = error(dir.path());
        assert!(found.contains(expected) && found.contains("config.json: "), "{found}");
    }
}
