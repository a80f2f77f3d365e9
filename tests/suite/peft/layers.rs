//! PEFT's files of adapters on convolutions and embeddings, read and written.

use std::{fs, path::Path};

use burn::{
    module::Module,
    nn::{
        EmbeddingConfig, PaddingConfig1d, PaddingConfig2d,
        conv::{Conv1dConfig, Conv2dConfig, ConvTranspose2dConfig},
    },
    record::{FullPrecisionSettings, NamedMpkFileRecorder},
    tensor::{Int, Tensor, TensorData, activation::relu, backend::Backend},
};
use burn_lora::{
    Init, Lora, LoraAdapters, LoraConfig, LoraError, LoraLinear, LoraModule,
    nn::{LoraConv1d, LoraConv2d, LoraEmbedding},
};
use burn_store::{ModuleSnapshot, PyTorchToBurnAdapter, SafetensorsStore};
use safetensors::SafeTensors;
use serde_json::{Value, json};

use super::{TempDir, fixture, load};
use crate::{
    model::{Plain, device},
    oracle::{Matrix, assert_close},
};

/// The model of `tests/peft/make_layer_fixtures.py`.
#[derive(Module, Debug)]
struct Layers<B: Backend> {
    table: LoraEmbedding<B>,
    conv1: LoraConv1d<B>,
    conv2: LoraConv2d<B>,
    grouped: LoraConv2d<B>,
}

impl Layers<Plain> {
    fn base() -> Self {
        let device = device::<Plain>();
        let conv1 = Conv1dConfig::new(6, 8, 3).with_padding(PaddingConfig1d::Explicit(1, 1));
        let conv2 = Conv2dConfig::new([2, 5], [3, 2]).with_stride([1, 2]).with_bias(false);
        let conv2 = conv2.with_padding(PaddingConfig2d::Explicit(1, 0, 1, 0));
        let grouped = Conv2dConfig::new([5, 10], [3, 3]).with_groups(5);
        let grouped = grouped.with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1));
        let mut model = Self {
            table: EmbeddingConfig::new(11, 6).init(&device).into(),
            conv1: conv1.init(&device).into(),
            conv2: conv2.init(&device).into(),
            grouped: grouped.init(&device).into(),
        };
        let store = SafetensorsStore::from_file(fixture("layers_base.safetensors"));
        model.load_from(&mut store.with_from_adapter(PyTorchToBurnAdapter)).unwrap();
        model
    }

    fn forward(&self, ids: Tensor<Plain, 2, Int>) -> Tensor<Plain, 2> {
        let batch = ids.dims()[0];
        let x = self.table.forward(ids).swap_dims(1, 2);
        let x = relu(self.conv1.forward(x)).reshape([batch, 2, 4, 8]);
        self.grouped.forward(self.conv2.forward(x)).flatten(1, 3)
    }
}

const READABLE: [&str; 6] = [
    "layers_conv",
    "layers_conv_bias",
    "layers_embedding",
    "layers_all",
    "layers_dora_conv",
    "layers_dora_table",
];

fn ids(values: Vec<i64>) -> Tensor<Plain, 2, Int> {
    Tensor::from_data(TensorData::new(values, [3, 8]), &device::<Plain>())
}

#[track_caller]
fn assert_computes(model: &Layers<Plain>, name: &str) {
    let text = fs::read_to_string(fixture(name).join("expected.json")).unwrap();
    let expected: Value = serde_json::from_str(&text).unwrap();
    let x = expected["x"].as_array().unwrap().iter().map(|it| it.as_i64().unwrap()).collect();
    let y: Vec<_> =
        expected["y"].as_array().unwrap().iter().map(|it| it.as_f64().unwrap()).collect();
    assert_close(model.forward(ids(x)), &Matrix { rows: 3, cols: y.len() / 3, data: y }, 1e-5);
}

#[test]
fn what_python_wrote_computes_the_same_here() {
    let base = Layers::base();
    for name in READABLE {
        let adapted = base.switch(&load(name)).unwrap();
        assert_computes(&adapted, name);
        assert_computes(&adapted.merge().unwrap(), name);
    }
}

#[test]
fn saved_again_the_tensors_are_the_very_same() {
    let dir = TempDir::new("layers-round-trip");
    for name in READABLE {
        let path = dir.0.join(name);
        load(name).save(&path).unwrap();
        let again = LoraAdapters::load(&path, &device::<Plain>()).unwrap();
        assert_computes(&Layers::base().switch(&again).unwrap(), name);
        let file = |dir: &Path| fs::read(dir.join("adapter_model.safetensors")).unwrap();
        let (written, read) = (file(&path), file(&fixture(name)));
        let (written, read) =
            (SafeTensors::deserialize(&written).unwrap(), SafeTensors::deserialize(&read).unwrap());
        assert_eq!(written.len(), read.len(), "{name}");
        for (key, tensor) in read.iter() {
            let found = written.tensor(key).unwrap();
            assert_eq!((found.shape(), found.data()), (tensor.shape(), tensor.data()), "{key}");
        }
    }
}

#[test]
fn groups_and_transposed_convolutions_are_refused_by_name() {
    let refused = |error: LoraError, field: &str, reason: &str| {
        let text = error.to_string();
        assert!(matches!(error, LoraError::Unsupported { .. }), "{text}");
        assert!(text.contains(field) && text.contains(reason), "{text}");
    };
    let error = LoraAdapters::<Plain>::load(fixture("layers_grouped"), &device::<Plain>());
    refused(error.unwrap_err(), "grouped.lora_B.weight", "groups");

    let dir = TempDir::new("layers-refused");
    let config = LoraConfig::new(2, 1.0).with_targets(["grouped"]);
    let set = Layers::base().attach(&config).unwrap().adapters();
    refused(set.save(dir.0.join("set")).unwrap_err(), "grouped", "groups");
    assert!(!dir.0.join("set").exists());

    let up = ConvTranspose2dConfig::new([2, 3], [2, 2]).init::<Plain>(&device::<Plain>());
    let adapter = config.init(up).adapter().unwrap().clone();
    let set = LoraAdapters::new([("up", adapter)]);
    refused(set.save(dir.0.join("set")).unwrap_err(), "up", "transposed");
}

#[test]
fn b4_adapters_that_peft_has_no_files_for_are_told_at_attach_and_kept_in_records() {
    let base = Layers::base();
    let config = LoraConfig::new(2, 1.0).with_init(Init::RandomBoth);
    let model = base.attach(&config).unwrap();
    let report = model.parameters();
    let held: Vec<_> = report.layers.iter().map(|it| (&*it.path, it.in_peft_files)).collect();
    let expected = [("table", true), ("conv1", true), ("conv2", true), ("grouped", false)];
    assert_eq!(held, expected);
    let warning =
        "PEFT's files cannot hold the adapter of `grouped`; save the model by `save_file`";
    assert!(report.to_string().contains(warning), "{report}");
    let dir = TempDir::new("layers-record");
    for error in [
        model.adapters().save(dir.0.join("set")).unwrap_err().to_string(),
        model.adapters().to_bytes().unwrap_err().to_string(),
    ] {
        assert!(error.contains("`save_file`") && error.contains("`excludes`"), "{error}");
    }
    // Both remedies help.
    let kept = base.attach(&config.clone().with_excludes(["grouped"])).unwrap();
    assert!(!kept.parameters().to_string().contains("warning: PEFT's files"));
    kept.adapters().save(dir.0.join("kept")).unwrap();
    let recorder = NamedMpkFileRecorder::<FullPrecisionSettings>::new();
    std::fs::create_dir_all(&dir.0).unwrap();
    model.clone().save_file(dir.0.join("task"), &recorder).unwrap();
    let again = Lora::new(base).load_file(dir.0.join("task"), &recorder, &device::<Plain>());
    let again = again.unwrap().adapters();
    assert_eq!(again.fingerprint(), model.adapters().fingerprint());
}

#[test]
fn an_adapter_of_another_kind_of_layer_does_not_fit() {
    // A matrix of the right shape, but for an embedding.
    #[derive(Module, Debug)]
    struct Other<B: Backend> {
        table: LoraLinear<B>,
    }
    let linear = burn::nn::LinearConfig::new(11, 6).init::<Plain>(&device::<Plain>());
    let error = Other { table: linear.into() }.switch(&load("layers_embedding")).unwrap_err();
    assert!(error.to_string().contains("expected Matrix, found Embedding"), "{error}");
}

#[test]
fn through_the_overlay_too() {
    let plain = Conv1dConfig::new(6, 8, 3).init::<Plain>(&device::<Plain>());
    let set = load("layers_conv");
    let adapter = set.get("conv1").unwrap().clone();
    let set = LoraAdapters::new([("", adapter)]);
    let x = Matrix::random(2, 42, 5).tensor([2, 6, 7], &device::<Plain>());
    // The first use draws the weights. Clones of an unused layer would each draw their own.
    let _ = plain.forward(x.clone());
    let overlay = Lora::overlay(plain.clone()).switch(&set).unwrap();
    let layer = LoraConv1d::from(plain).switch(&set).unwrap();
    let expected = layer.forward(x.clone()).into_data().convert::<f64>().to_vec().unwrap();
    let expected = Matrix { rows: 1, cols: expected.len(), data: expected };
    assert_close(overlay.with_adapters(|it| it.forward(x)), &expected, 1e-5);
}

/// Writes adapters from Python and from this crate for `tests/peft/check_saved.py`.
pub fn write_for_python(out: &Path) {
    let base = Layers::base();
    let config = LoraConfig::new(3, 2.0).with_init(Init::RandomBoth);
    let config = config.with_targets(["table", "conv1", "conv2"]);
    let ours = base.attach(&config).unwrap().adapters();
    let fixtures = READABLE.map(|name| (name, load(name)));
    for (name, set) in fixtures.into_iter().chain([("layers_ours", ours)]) {
        let x: Vec<i64> = (0..24).map(|it| it * 7 % 11).collect();
        let y = base.switch(&set).unwrap().forward(ids(x.clone()));
        let y = y.into_data().convert::<f64>().to_vec::<f64>().unwrap();
        set.save(out.join(name)).unwrap();
        let expected = json!({"x": x, "y": y});
        fs::write(out.join(name).join("expected.json"), expected.to_string()).unwrap();
    }
}
