//! Records of `nn::Linear` load into `LoraLinear` without renaming, and every format of records keeps the
//! scaling of an adapter.

use burn::{
    module::{AutodiffModule, Module},
    nn::{EmbeddingConfig, Linear, LinearConfig, conv::Conv1dConfig},
    optim::{AdamConfig, GradientsParams, Optimizer},
    record::{
        BinBytesRecorder, FullPrecisionSettings, NamedMpkBytesRecorder, NamedMpkFileRecorder,
        PrettyJsonFileRecorder, Recorder,
    },
    tensor::{Int, Tensor, TensorData, backend::Backend},
};
use burn_lora::{
    Init, Lora, LoraAdapters, LoraConfig, LoraLinear, LoraModule, Scaling,
    nn::{LoraConv1d, LoraEmbedding},
};
use burn_store::{ModuleSnapshot, PyTorchToBurnAdapter, PytorchStore, SafetensorsStore};

use crate::{
    model::{Mlp, Plain, PlainMlp, Train, device},
    oracle::{Matrix, assert_close, assert_identical},
    peft::TempDir,
};

fn input<B: Backend>() -> Tensor<B, 2> {
    Matrix::random(4, 6, 1).tensor([4, 6], &device::<B>())
}

fn config() -> LoraConfig {
    LoraConfig::new(2, 3.0)
        .with_init(Init::RandomBoth)
        .with_scaling(Scaling::AlphaOverSqrtRank)
        .with_bias(true)
        .with_dropout(0.25)
}

/// The update that an adapter adds, apart from the base.
fn update<B: Backend>(layer: &LoraLinear<B>) -> Tensor<B, 2> {
    layer.adapter().unwrap().delta()
}

#[test]
fn a_record_of_plain_layers() {
    let device = device::<Train>();
    let plain = PlainMlp::<Train>::new(&device);
    let expected = plain.forward(input());

    let recorder = NamedMpkBytesRecorder::<FullPrecisionSettings>::new();
    let bytes = recorder.record(plain.clone().into_record(), ()).unwrap();
    let record = || recorder.load(bytes.clone(), &device).unwrap();
    let loaded = Mlp::<Train>::new(&device).load_record(record());
    assert_identical(loaded.forward(input()), expected.clone());

    // A model with adapters keeps them, on the new base.
    let adapted = Mlp::<Train>::new(&device).attach(&config()).unwrap().into_inner();
    let update_before = update(&adapted.blocks[0]);
    let loaded = adapted.load_record(record());
    assert_identical(update(&loaded.blocks[0]), update_before);
    assert_identical(Lora::new(loaded).detach().forward(input()), expected.clone());

    let path = std::env::temp_dir().join(format!("burn-lora-{}.json", std::process::id()));
    let recorder = PrettyJsonFileRecorder::<FullPrecisionSettings>::new();
    plain.save_file(&path, &recorder).unwrap();
    let loaded = Mlp::<Train>::new(&device).load_file(&path, &recorder, &device);
    std::fs::remove_file(&path).unwrap();
    assert_identical(loaded.unwrap().forward(input()), expected);
}

#[test]
fn a_safetensors_file_of_plain_layers() {
    let device = device::<Plain>();
    let plain = PlainMlp::<Plain>::new(&device);
    let expected = plain.forward(input());
    let mut store = SafetensorsStore::from_bytes(None);
    plain.save_into(&mut store).unwrap();
    let bytes = store.get_bytes().unwrap();
    let store = || SafetensorsStore::from_bytes(Some(bytes.clone()));

    let mut loaded = Mlp::<Plain>::new(&device);
    let result = loaded.load_from(&mut store()).unwrap();
    assert!(result.missing.is_empty() && result.unused.is_empty());
    assert_identical(loaded.forward(input()), expected.clone());

    let mut adapted = Mlp::<Plain>::new(&device).attach(&config()).unwrap();
    let result = adapted.load_from(&mut store().allow_partial(true)).unwrap();
    assert!(result.missing.iter().all(|(path, _)| path.contains(".adapter.")));
    assert!(result.unused.is_empty());
    assert_identical(adapted.detach().forward(input()), expected);
}

/// The model in `fixtures/pytorch`. Its square weight would load without an error if not transposed.
#[derive(Module, Debug)]
struct Torch<B: Backend> {
    square: LoraLinear<B>,
    wide: LoraLinear<B>,
}

impl<B: Backend> Torch<B> {
    fn new() -> Self {
        let linear = |bias, d_output| {
            burn::nn::LinearConfig::new(5, d_output).with_bias(bias).init(&device::<B>()).into()
        };
        Self { square: linear(true, 5), wide: linear(false, 3) }
    }

    #[track_caller]
    fn assert_computes_the_same(&self) {
        let file = include_str!("../fixtures/pytorch/expected.json");
        let expected: serde_json::Value = serde_json::from_str(file).unwrap();
        let values = |name: &str| {
            let values = expected[name].as_array().unwrap().iter();
            values.map(|value| value.as_f64().unwrap()).collect::<Vec<_>>()
        };
        let x = TensorData::new(values("x"), [4, 5]);
        let x = Tensor::<B, 2>::from_data(x, &device::<B>());
        let y = Matrix { rows: 4, cols: 3, data: values("y") };
        assert_close(self.wide.forward(self.square.forward(x)), &y, 1e-5);
    }
}

fn fixture(name: &str) -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pytorch").join(name)
}

#[test]
fn pytorch_files_are_transposed_square_or_not() {
    let mut model = Torch::<Plain>::new();
    model.load_from(&mut PytorchStore::from_file(fixture("model.pt"))).unwrap();
    model.assert_computes_the_same();

    let mut model = Torch::<Plain>::new();
    let store = SafetensorsStore::from_file(fixture("model.safetensors"));
    model.load_from(&mut store.with_from_adapter(PyTorchToBurnAdapter)).unwrap();
    model.assert_computes_the_same();

    // Also into a model with adapters, which the file does not contain.
    let mut model = Torch::<Plain>::new().attach(&config()).unwrap();
    let store = PytorchStore::from_file(fixture("model.pt"));
    model.load_from(&mut store.allow_partial(true)).unwrap();
    model.detach().assert_computes_the_same();
}

#[test]
fn records_keep_scaling_bias_and_dropout() {
    let device = device::<Train>();
    let adapted = Mlp::<Train>::new(&device).attach(&config()).unwrap().into_inner();
    let named = NamedMpkBytesRecorder::<FullPrecisionSettings>::new();
    let binary = BinBytesRecorder::<FullPrecisionSettings>::new();
    let named_bytes = named.record(adapted.clone().into_record(), ()).unwrap();
    let binary_bytes = binary.record(adapted.clone().into_record(), ()).unwrap();

    // Into a model without adapters, and into one with different adapters.
    let other = LoraConfig::new(5, 100.0);
    for model in [Mlp::new(&device), Mlp::new(&device).attach(&other).unwrap().into_inner()] {
        let named: Mlp<Train> =
            model.clone().load_record(named.load(named_bytes.clone(), &device).unwrap());
        let binary = model.load_record(binary.load(binary_bytes.clone(), &device).unwrap());
        for loaded in [named, binary] {
            let (adapter, expected) = (loaded.head.adapter().unwrap(), adapted.head.adapter());
            let expected = expected.unwrap();
            assert_eq!(adapter.scale(), expected.scale());
            assert_eq!(adapter.alpha, 3.0);
            assert_eq!(adapter.scaling, Scaling::AlphaOverSqrtRank);
            assert_eq!(adapter.dropout.prob, 0.25);
            assert_eq!(adapter.rank(), 2);
            assert_identical(update(&loaded.head), update(&adapted.head));
            assert!(adapter.bias.is_some());
        }
    }
}

#[test]
#[should_panic = "expected [4, 3] = [d_input, d_output], got [4, 5]"]
fn a_record_with_an_adapter_that_does_not_fit_is_refused() {
    let layer = |d_output| {
        let base = burn::nn::LinearConfig::new(4, d_output).init::<Plain>(&device::<Plain>());
        LoraConfig::new(2, 3.0).init(base)
    };
    let mut record = layer(3).into_record();
    record.adapter = layer(5).into_record().adapter;
    let _ = layer(3).load_record(record);
}

#[test]
fn a_saved_adapted_model_is_readable_by_name() {
    let device = device::<Plain>();
    let adapted = Mlp::<Plain>::new(&device).attach(&config()).unwrap().into_inner();
    let path = std::env::temp_dir().join(format!("burn-lora-{}.mpk", std::process::id()));
    let recorder = NamedMpkFileRecorder::<FullPrecisionSettings>::new();
    adapted.clone().save_file(&path, &recorder).unwrap();
    // A model without LoRA layers reads the base, and ignores the adapters.
    let plain = PlainMlp::<Plain>::new(&device).load_file(&path, &recorder, &device);
    std::fs::remove_file(&path).unwrap();
    assert_identical(plain.unwrap().forward(input()), Lora::new(adapted).detach().forward(input()));
}

/// What trained in memory and what a file gave have their numbers in other places, in which products add them in
/// another order.
#[test]
fn s8_a_trained_set_and_its_file_give_the_same_bits() {
    let device = device::<Train>();
    for (d_input, d_output, rank) in [(7, 5, 2), (96, 64, 8), (300, 129, 6), (784, 256, 16)] {
        let base = Wide::<Train> {
            linear: LinearConfig::new(d_input, d_output).init(&device).into(),
            table: EmbeddingConfig::new(50, d_input).init(&device).into(),
            conv: Conv1dConfig::new(d_output, 24, 3).init(&device).into(),
            head: LinearConfig::new(24, 70).init(&device),
        };
        let ids = |batch: usize| {
            let ids = Tensor::<Train, 1, Int>::arange(0..7 * batch as i64, &device);
            ids.reshape([batch, 7])
        };
        let config = LoraConfig::new(rank, 1.5 * rank as f64).with_modules_to_save(["head"]);
        let dora = config.clone().with_dora(true).with_excludes(["table"]);
        for config in [config, dora] {
            let mut model = base.attach(&config).unwrap();
            let mut optimizer = AdamConfig::new().init::<Train, Lora<Train, Wide<Train>>>();
            for _ in 0..3 {
                let grads = model.forward(ids(7)).sin().sum().backward();
                let grads = GradientsParams::from_grads(grads, &model);
                model = optimizer.step(0.02, model, grads);
            }
            let dir = TempDir::new(&format!("same-bits-{d_input}-{}", config.dora));
            model.adapters().save(dir.0.join("set")).unwrap();
            let set = LoraAdapters::load(dir.0.join("set"), &device).unwrap();
            let loaded = base.switch(&set).unwrap();
            let merged = |model: &Lora<Train, Wide<Train>>| model.merge().unwrap().valid();
            for batch in [1, 7] {
                let ids = || ids(batch);
                let inner = || ids().inner();
                assert_identical(loaded.forward(ids()), model.forward(ids()));
                assert_identical(loaded.valid().forward(inner()), model.valid().forward(inner()));
                assert_identical(merged(&loaded).forward(inner()), merged(&model).forward(inner()));
            }
        }
    }
}

/// Layers of several kinds.
#[derive(Module, Debug)]
struct Wide<B: Backend> {
    table: LoraEmbedding<B>,
    linear: LoraLinear<B>,
    conv: LoraConv1d<B>,
    /// It trains in full.
    head: Linear<B>,
}

impl<B: Backend> Wide<B> {
    fn forward(&self, ids: Tensor<B, 2, Int>) -> Tensor<B, 3> {
        let x = self.linear.forward(self.table.forward(ids)).tanh();
        self.head.forward(self.conv.forward(x.swap_dims(1, 2)).swap_dims(1, 2))
    }
}
