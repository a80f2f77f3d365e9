//! mlx-lm's directories: factors as they are here, and the scale by itself.

use std::fs;

use burn_lora::{LoraAdapters, LoraModule, Scaling};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};

use super::{TempDir, fixture};
use crate::{
    model::{Plain, device, layer},
    oracle::{Matrix, Problem, assert_close},
};

fn bytes(matrix: &Matrix) -> Vec<u8> {
    matrix.data.iter().flat_map(|it| (*it as f32).to_le_bytes()).collect()
}

fn file(tensors: &[(&str, &Matrix)]) -> Vec<u8> {
    let tensors: Vec<_> = tensors.iter().map(|(key, it)| (*key, *it, bytes(it))).collect();
    let views = tensors.iter().map(|(key, matrix, bytes)| {
        // Of one row, if it is a vector.
        let shape = match key.ends_with(".m") && matrix.rows == 1 {
            true => vec![matrix.cols],
            false => vec![matrix.rows, matrix.cols],
        };
        (*key, TensorView::new(Dtype::F32, shape, bytes).unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

/// As `mlx_lm.lora` writes it.
fn config() -> Value {
    json!({
        "fine_tune_type": "lora",
        "num_layers": 16,
        "lora_parameters": {"rank": 3, "dropout": 0.1, "scale": 1.7},
        "model": "a/model",
        "seed": 0,
    })
}

fn problem() -> Problem {
    Problem {
        x: Matrix::random(4, 6, 1),
        w: Matrix::random(6, 5, 2),
        bias: None,
        a: Matrix::random(6, 3, 3),
        b: Matrix::random(3, 5, 4),
        adapter_bias: None,
        scale: 1.7,
    }
}

fn load(config: &Value, weights: &[u8]) -> Result<LoraAdapters<Plain>, String> {
    let config = serde_json::to_vec(config).unwrap();
    LoraAdapters::from_bytes(&config, weights, &device::<Plain>()).map_err(|it| it.to_string())
}

#[test]
fn a_directory_computes_what_its_formula_says() {
    let dir = TempDir::new("mlx");
    let problem = problem();
    fs::write(dir.0.join("adapter_config.json"), config().to_string()).unwrap();
    let weights = file(&[("fc.lora_a", &problem.a), ("fc.lora_b", &problem.b)]);
    fs::write(dir.0.join("adapters.safetensors"), weights).unwrap();
    let set = LoraAdapters::<Plain>::load(&dir.0, &device::<Plain>()).unwrap();
    let adapter = set.get("fc").unwrap().clone();
    assert_eq!((adapter.alpha, adapter.scaling), (1.7, Scaling::Alpha));
    assert_eq!(adapter.dropout.prob, 0.1);
    let mut base = layer::<Plain>(&problem, 1.7, Scaling::Alpha);
    base.set_adapter(None);
    let set = LoraAdapters::new([("", adapter)]);
    let x = problem.x.tensor::<Plain, 2>([4, 6], &device::<Plain>());
    assert_close(base.switch(&set).unwrap().forward(x), &problem.output(), 1e-5);
}

/// In mlx-lm, `y = m/‖W + s·A·B‖ · x·(W + s·A·B) + b`, column by column, as in this crate.
#[test]
fn magnitudes_are_read() {
    let Problem { a, b, .. } = problem();
    let m = Matrix::random(1, b.cols, 9);
    let mut config = config();
    config["fine_tune_type"] = json!("dora");
    let set = load(&config, &file(&[("fc.lora_a", &a), ("fc.lora_b", &b), ("fc.m", &m)])).unwrap();
    assert_close(set.get("fc").unwrap().magnitude.as_ref().unwrap().val(), &m, 1e-6);
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let Problem { a, b, .. } = problem();
    let good = file(&[("fc.lora_a", &a), ("fc.lora_b", &b)]);
    load(&config(), &good).unwrap();
    let refused = |config: &Value, weights: &[u8], message: &str| {
        let error = load(config, weights).unwrap_err();
        assert!(error.contains(message), "{error}");
    };
    let of_type = |kind: &str| {
        let mut other = config();
        other["fine_tune_type"] = json!(kind);
        other
    };
    refused(&of_type("full"), &good, "`fine_tune_type` is not supported: it is full");
    refused(&of_type("dora"), &good, "missing: fc.m");
    let misshapen = file(&[("fc.lora_a", &a), ("fc.lora_b", &b), ("fc.m", &a)]);
    refused(&of_type("dora"), &misshapen, "fc.m (expected [d_output], found");
    let with = |field: &str, value: Value| {
        let mut config = config();
        config["lora_parameters"][field] = value;
        config
    };
    refused(&with("rank", json!(0)), &good, "`rank` is 0");
    refused(&with("rank", json!(4)), &good, "fc.lora_a (expected [d_input, rank] with rank 4");
    refused(&with("scale", json!(null)), &good, "invalid type: null");
    refused(&with("dropout", json!(1.0)), &good, "`dropout` is 1");
    refused(&config(), &file(&[]), "there is no adapter in it");
    refused(&config(), &file(&[("fc.lora_a", &a)]), "missing: fc.lora_b");
    let more = file(&[("fc.lora_a", &a), ("fc.lora_b", &b), ("fc.m", &a)]);
    refused(&config(), &more, "unexpected: fc.m");
    let swapped = file(&[("fc.lora_a", &b), ("fc.lora_b", &a)]);
    refused(&config(), &swapped, "fc.lora_b (expected [rank, d_output] with rank 3");
    // The configuration of one format and the tensors of the other.
    let peft = fs::read(fixture("plain").join("adapter_config.json")).unwrap();
    refused(&serde_json::from_slice(&peft).unwrap(), &good, "looks like mlx-lm's format");
}
