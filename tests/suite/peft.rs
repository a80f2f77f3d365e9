//! Adapters as values and as PEFT's files: adapters from Python compute the same here, and a file keeps
//! everything.

mod cases;
mod field;
mod layers;
mod mlx;
mod refused;
mod saving;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::Mutex,
};

use burn::{
    module::{AutodiffModule, Module},
    nn::{LayerNorm, LayerNormConfig, LinearConfig},
    optim::GradientsParams,
    tensor::{Tensor, activation::relu, backend::Backend},
};
use burn_lora::{Init, Lora, LoraAdapters, LoraConfig, LoraLinear, LoraModule, Scaling};
use burn_store::{ModuleSnapshot, PyTorchToBurnAdapter, SafetensorsStore};
use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::{
    model::{Plain, Train, device},
    oracle::{Matrix, assert_close, assert_identical, bits},
};

/// The model of `tests/peft/make_fixtures.py`.
#[derive(Module, Debug)]
pub struct Model<B: Backend> {
    fc1: LoraLinear<B>,
    fc2: LoraLinear<B>,
    norm: LayerNorm<B>,
    head: LoraLinear<B>,
}

impl<B: Backend> Model<B> {
    /// The base that the fixtures were made for.
    pub fn base() -> Self {
        let device = device::<B>();
        let linear = |d_input, d_output, bias| {
            LinearConfig::new(d_input, d_output).with_bias(bias).init(&device).into()
        };
        let mut model = Self {
            fc1: linear(6, 8, true),
            fc2: linear(8, 8, false),
            norm: LayerNormConfig::new(8).init(&device),
            head: linear(8, 3, true),
        };
        let store = SafetensorsStore::from_file(fixture("base.safetensors"));
        model.load_from(&mut store.with_from_adapter(PyTorchToBurnAdapter)).unwrap();
        model
    }

    pub fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let x = relu(self.fc1.forward(x));
        let x = relu(self.fc2.forward(x));
        self.head.forward(self.norm.forward(x))
    }
}

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/peft/fixtures").join(name)
}

pub fn load(name: &str) -> LoraAdapters<Plain> {
    LoraAdapters::load(fixture(name), &device::<Plain>()).unwrap()
}

/// A temporary directory. It is removed when the value is dropped.
pub struct TempDir(pub PathBuf);

impl TempDir {
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("burn-lora-{name}-{}", std::process::id()));
        // Removes what a killed process with the same id left. Two tests must not share a directory.
        static NAMES: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
        assert!(NAMES.lock().unwrap().insert(name.to_owned()), "two tests have a directory {name}");
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn files(name: &str) -> (Vec<u8>, Vec<u8>) {
    let file = |file: &str| fs::read(fixture(name).join(file)).unwrap();
    (file("adapter_config.json"), file("adapter_model.safetensors"))
}

/// The names of everything below a directory's parent, to see what was left behind.
fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> =
        entries.map(|it| it.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

const READABLE: [&str; 20] = [
    "plain",
    "rslora",
    "patterns",
    "lora_bias",
    "bias_lora_only",
    "bias_all",
    "modules_to_save",
    "regex",
    "exclude",
    "f16",
    "bf16",
    "trained",
    "dora",
    "dora_rslora",
    "pissa",
    "pissa_rslora",
    "pissa_niter_8",
    "pissa_niter_8_rslora",
    "olora",
    "olora_rslora",
];

#[track_caller]
fn assert_computes(model: &Model<Plain>, name: &str) {
    let text = fs::read_to_string(fixture(name).join("expected.json")).unwrap();
    let expected: Value = serde_json::from_str(&text).unwrap();
    let values = |of: &str| {
        expected[of].as_array().unwrap().iter().map(|it| it.as_f64().unwrap()).collect::<Vec<_>>()
    };
    let (x, y) = (values("x"), values("y"));
    let x = Matrix { rows: 5, cols: 6, data: x }.tensor([5, 6], &device::<Plain>());
    assert_close(model.forward(x), &Matrix { rows: 5, cols: 3, data: y }, 1e-5);
}

#[test]
fn what_python_wrote_computes_the_same_here() {
    let base = Model::<Plain>::base();
    for name in READABLE {
        let adapted = base.switch(&load(name)).unwrap();
        assert_computes(&adapted, name);
        assert_computes(&adapted.merge().unwrap(), name);
    }
}

/// The part of each weight that an adapter starts as, `s·A·B`.
#[test]
fn adapters_from_the_weight_start_as_those_of_python() {
    let base = Model::<Plain>::base();
    for (name, init) in [
        ("pissa", Init::Pissa),
        // With few iterations, both sides' results depend on what they drew.
        ("pissa", Init::PissaRandomized { iterations: 200 }),
        ("olora", Init::Olora),
    ] {
        for (suffix, scaling) in
            [("", Scaling::AlphaOverRank), ("_rslora", Scaling::AlphaOverSqrtRank)]
        {
            let name = format!("{name}{suffix}");
            let text = fs::read_to_string(fixture(&name).join("expected.json")).unwrap();
            let expected: Value = serde_json::from_str(&text).unwrap();
            let config = LoraConfig::new(2, 5.0).with_scaling(scaling).with_init(init);
            let set = base.attach(&config.with_targets(["fc1", "fc2"])).unwrap().adapters();
            for (path, start) in expected["starts"].as_object().unwrap() {
                let start = start.as_array().unwrap().iter().map(|it| it.as_f64().unwrap());
                let adapter = set.get(path).unwrap();
                let [d_input, d_output] = adapter.shape();
                let start = Matrix { rows: d_output, cols: d_input, data: start.collect() };
                let product = adapter.a.val().matmul(adapter.b.val()).mul_scalar(adapter.scale());
                assert_close(product, &start.transpose(), 1e-5);
            }
        }
    }
}

#[test]
fn rank_alpha_scaling_and_dropout_are_those_of_the_configuration() {
    let of = |set: &LoraAdapters<Plain>, path: &str| {
        let adapter = set.get(path).unwrap();
        (adapter.rank(), adapter.alpha, adapter.scaling)
    };
    let patterns = load("patterns");
    assert_eq!(of(&patterns, "fc1"), (2, 6.0, Scaling::AlphaOverRank));
    assert_eq!(of(&patterns, "fc2"), (3, 6.0, Scaling::AlphaOverRank));
    assert_eq!(of(&patterns, "head"), (4, 9.0, Scaling::AlphaOverRank));
    assert_eq!(of(&load("rslora"), "head"), (4, 6.0, Scaling::AlphaOverSqrtRank));
    assert_eq!(load("trained").get("fc1").unwrap().dropout.prob, 0.1);
}

#[test]
fn s17_bytes_are_those_of_the_files() {
    let dir = TempDir::new("bytes");
    for name in READABLE {
        let set = load(name);
        set.save(dir.0.join(name)).unwrap();
        let file = |file: &str| fs::read(dir.0.join(name).join(file)).unwrap();
        let (config, weights) = set.to_bytes().unwrap();
        assert_eq!(config, file("adapter_config.json"), "{name}");
        assert_eq!(weights, file("adapter_model.safetensors"), "{name}");
        let again = LoraAdapters::<Plain>::from_bytes(&config, &weights, &device::<Plain>());
        assert_eq!(again.unwrap().fingerprint(), load(name).fingerprint(), "{name}");
    }
}

#[test]
fn saved_and_loaded_again_nothing_changed() {
    let dir = TempDir::new("round-trip");
    let base = Model::<Plain>::base();
    for name in READABLE {
        let (original, path) = (load(name), dir.0.join(name));
        original.save(&path).unwrap();
        let again = LoraAdapters::load(&path, &device::<Plain>()).unwrap();
        let paths = |set: &LoraAdapters<Plain>| {
            set.iter().map(|(path, _)| path.to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(paths(&again), paths(&original));
        for (path, adapter) in original.iter() {
            let found = again.get(path).unwrap();
            assert_identical(found.a.val(), adapter.a.val());
            assert_identical(found.b.val(), adapter.b.val());
            assert_eq!(found.bias.is_some(), adapter.bias.is_some());
            assert_eq!(found.scale(), adapter.scale());
        }
        assert_eq!(again.num_params(), original.num_params());
        assert_computes(&base.switch(&again).unwrap(), name);

        // In `f32`, the file holds exactly the tensors that Python wrote.
        if !name.ends_with("f16") {
            let file = |dir: &Path| fs::read(dir.join("adapter_model.safetensors")).unwrap();
            let (written, read) = (file(&path), file(&fixture(name)));
            let tensors = |bytes: &[u8]| {
                let tensors = SafeTensors::deserialize(bytes).unwrap();
                let tensors = tensors.iter();
                tensors
                    .map(|(key, it)| (key.to_owned(), it.shape().to_vec(), it.data().to_vec()))
                    .collect::<std::collections::BTreeSet<_>>()
            };
            assert_eq!(tensors(&written), tensors(&read), "{name}");
        }
    }
}

#[test]
fn what_a_file_says_beyond_our_concern_is_kept() {
    let dir = TempDir::new("kept");
    let (config, weights) = files("plain");
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    config["base_model_name_or_path"] = json!("bert");
    config["a_field_of_the_future"] = json!({"x": 1});
    let text = serde_json::to_vec(&config).unwrap();
    let set = LoraAdapters::<Plain>::from_bytes(&text, &weights, &device::<Plain>()).unwrap();
    // Also by a model, and by one that was restored from a record.
    let model = Model::<Plain>::base().switch(&set).unwrap();
    let restored = Lora::new(Model::<Plain>::base()).load_record(model.clone().into_record());
    for set in [set, model.adapters(), restored.adapters()] {
        set.save(dir.0.join("set")).unwrap();
        let saved = fs::read(dir.0.join("set/adapter_config.json")).unwrap();
        let saved: Value = serde_json::from_slice(&saved).unwrap();
        assert_eq!(saved["base_model_name_or_path"], "bert");
        assert_eq!(saved["a_field_of_the_future"], json!({"x": 1}));
    }
}

#[test]
fn d6_a_set_says_what_base_and_task_it_is_for() {
    let dir = TempDir::new("base");
    let ours = Model::<Plain>::base().attach(&config()).unwrap().adapters();
    let (text, weights) = files("plain");
    let theirs = LoraAdapters::<Plain>::from_bytes(&text, &weights, &device::<Plain>()).unwrap();
    let said = |set: &LoraAdapters<Plain>| {
        set.save(dir.0.join("set")).unwrap();
        let saved = fs::read(dir.0.join("set/adapter_config.json")).unwrap();
        let saved: Value = serde_json::from_slice(&saved).unwrap();
        [saved["base_model_name_or_path"].clone(), saved["task_type"].clone()]
    };
    assert_eq!(said(&ours), [Value::Null, Value::Null]);
    for set in [ours, theirs] {
        assert_eq!(set.base_model(), None);
        let set = set.with_base_model("org/base").with_task_type("CAUSAL_LM");
        assert_eq!(said(&set), [json!("org/base"), json!("CAUSAL_LM")]);
        let loaded = LoraAdapters::<Plain>::load(dir.0.join("set"), &device::<Plain>()).unwrap();
        assert_eq!(loaded.base_model(), Some("org/base"));
        // A model keeps it.
        let model = Model::<Plain>::base().switch(&loaded).unwrap();
        assert_eq!(said(&model.adapters()), [json!("org/base"), json!("CAUSAL_LM")]);
    }
}

fn config() -> LoraConfig {
    LoraConfig::new(3, 2.0).with_init(Init::RandomBoth).with_seed(5)
}

/// Adapters made by this crate, with each scaling rule, and with different ranks and alphas.
fn ours() -> Vec<(&'static str, LoraAdapters<Plain>)> {
    let base = Model::<Plain>::base();
    let set = |config: &LoraConfig| base.attach(config).unwrap().adapters();
    vec![
        ("alpha", set(&config())),
        ("over_rank", set(&config().with_scaling(Scaling::AlphaOverRank))),
        ("over_sqrt_rank", set(&config().with_scaling(Scaling::AlphaOverSqrtRank))),
        (
            "different",
            set(&config()
                .with_rank_pattern([("fc1", 2), ("head", 5)])
                .with_alpha_pattern([("fc2", 0.3)])),
        ),
        ("bias", set(&config().with_bias(true).with_targets(["fc1", "head"]))),
        ("saved", set(&config().with_targets(["fc2"]).with_modules_to_save(["norm", "fc1"]))),
        ("magnitudes", stepped(&config().with_dora(true))),
        ("pissa_here", stepped(&config().with_init(Init::Pissa))),
        (
            "olora_with_magnitudes",
            stepped(
                &config()
                    .with_init(Init::Olora)
                    .with_dora(true)
                    .with_scaling(Scaling::AlphaOverSqrtRank),
            ),
        ),
    ]
}

/// Adapters after a step of training, so that they are no longer what they started as.
fn stepped(config: &LoraConfig) -> LoraAdapters<Plain> {
    use burn::optim::{AdamConfig, Optimizer};

    let model = Model::<Train>::base().attach(config).unwrap();
    let x = Matrix::random(5, 6, 3).tensor([5, 6], &device::<Train>());
    let grads = GradientsParams::from_grads(model.forward(x).sin().sum().backward(), &model);
    AdamConfig::new().init().step(0.1, model, grads).valid().adapters()
}

#[test]
fn every_rule_of_scaling_survives_a_file() {
    let dir = TempDir::new("scaling");
    let base = Model::<Plain>::base();
    let x = || Matrix::random(4, 6, 2).tensor::<Plain, 2>([4, 6], &device::<Plain>());
    for (name, set) in ours() {
        let expected = base.switch(&set).unwrap().forward(x());
        set.save(dir.0.join(name)).unwrap();
        let again = LoraAdapters::load(dir.0.join(name), &device::<Plain>()).unwrap();
        let found = base.switch(&again).unwrap().forward(x());
        let expected = expected.into_data().convert::<f64>().to_vec().unwrap();
        assert_close(found, &Matrix { rows: 4, cols: 3, data: expected }, 1e-6);
    }
}

/// Writes the files that `tests/peft/check_saved.py` reads.
#[test]
#[ignore = "run by tests/peft/check_saved.py"]
fn write_for_python() {
    let out = PathBuf::from(std::env::var("PEFT_OUT").expect("PEFT_OUT names a directory"));
    let base = Model::<Plain>::base();
    let x = Matrix::random(5, 6, 77);
    let fixtures = READABLE.map(|name| (name, load(name)));
    for (name, set) in ours().into_iter().chain(fixtures) {
        let y = base.switch(&set).unwrap().forward(x.tensor([5, 6], &device::<Plain>()));
        let y = y.into_data().convert::<f64>().to_vec::<f64>().unwrap();
        set.save(out.join(name)).unwrap();
        let expected = json!({"x": x.data, "y": y});
        fs::write(out.join(name).join("expected.json"), expected.to_string()).unwrap();
    }
    layers::write_for_python(&out);
    cases::write_for_python(&out);
}

#[test]
fn a_file_is_hardly_larger_than_its_numbers() {
    let dir = TempDir::new("size");
    for (name, set) in ours() {
        set.save(dir.0.join(name)).unwrap();
        let weights = fs::read(dir.0.join(name).join("adapter_model.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&weights).unwrap().len();
        assert!(weights.len() <= set.num_bytes() + 4096 + 120 * tensors, "{name}");
    }
}

#[test]
fn switching_replaces_adapters_and_touches_no_weight() {
    let base = Model::<Train>::base();
    let x = || Matrix::random(4, 6, 2).tensor::<Train, 2>([4, 6], &device::<Train>());
    let set = |config: &LoraConfig| base.attach(config).unwrap().adapters();
    let (one, two) =
        (set(&config().with_targets(["fc1"])), set(&config().with_targets(["fc2"]).with_seed(6)));
    let first = base.switch(&one).unwrap();
    let second = first.switch(&two).unwrap();
    assert!(second.fc1.adapter().is_none() && second.fc2.adapter().is_some());
    assert_identical(second.forward(x()), base.switch(&two).unwrap().forward(x()));
    assert_identical(second.switch(&one).unwrap().forward(x()), first.forward(x()));
    assert_identical(second.detach().forward(x()), base.forward(x()));

    // Only the active adapters train.
    let grads = second.forward(x()).sin().sum().backward();
    assert_eq!(GradientsParams::from_grads(grads, &second).len(), 2);
}

#[test]
fn modules_trained_in_full_come_along() {
    let config = config().with_targets(["fc1"]).with_modules_to_save(["head", "norm"]);
    let base = Model::<Train>::base();
    let adapted = base.attach(&config).unwrap();
    let x = || Matrix::random(4, 6, 2).tensor::<Train, 2>([4, 6], &device::<Train>());

    let mut trained = adapted.clone();
    let grads = trained.forward(x()).sin().sum().backward();
    let grads = GradientsParams::from_grads(grads, &trained);
    use burn::optim::Optimizer;
    let mut optimizer = burn::optim::AdamConfig::new().init();
    trained = optimizer.step(0.1, trained, grads);

    let set = trained.adapters();
    assert_eq!(set.num_params(), 3 * (6 + 8) + (8 * 3 + 3) + 2 * 8);
    let dir = TempDir::new("extras");
    set.save(&dir.0).unwrap();
    let again = LoraAdapters::<Train>::load(&dir.0, &device::<Train>()).unwrap();
    let restored = base.switch(&again).unwrap();
    assert_identical(restored.head.base.weight.val(), trained.head.base.weight.val());
    assert_identical(restored.norm.gamma.val(), trained.norm.gamma.val());
    assert_ne!(bits(restored.norm.gamma.val()), bits(base.norm.gamma.val()));
    // They can be trained further, and the base has not changed.
    assert_eq!(restored.parameters().trainable, set.num_params());
    assert_identical(base.norm.gamma.val(), Model::<Train>::base().norm.gamma.val());

    // Also from a model for inference, whose parameters need no gradients.
    let set = trained.valid().adapters();
    let plain = Model::<Plain>::base().switch(&set).unwrap();
    assert_identical(plain.head.base.weight.val(), trained.head.base.weight.val());
}

#[test]
fn the_display_lists_layers_and_bytes() {
    let text = load("modules_to_save").to_string();
    let expected = "\
layer        weight  rank   scale  parameters
---------------------------------------------
fc1             6x8     4  1.5000          56
head.bias         3  full                   3
head.weight     3x8  full                  24
norm.bias         8  full                   8
norm.weight       8  full                   8
1 adapters, 99 parameters, 396 bytes";
    assert_eq!(text, expected);
}
