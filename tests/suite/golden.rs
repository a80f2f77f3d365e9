//! Files that the first version wrote are still read, to the same bits. `tests/golden/make.rs` wrote them. The tests
//! of the overlay have its records.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use burn::{
    config::Config,
    module::{AutodiffModule, Module, ModuleVisitor, Param},
    nn::{
        EmbeddingConfig, LayerNorm, LayerNormConfig, LinearConfig, PaddingConfig2d,
        attention::MultiHeadAttentionConfig, conv::Conv2dConfig,
    },
    optim::{AdamWConfig, GradientsParams, Optimizer},
    record::{
        BinFileRecorder, CompactRecorder, FileRecorder, FullPrecisionSettings,
        NamedMpkFileRecorder, Recorder,
    },
    tensor::{Int, Tensor, TensorData, activation::relu, backend::Backend},
};
use burn_lora::{
    Init, Lora, LoraAdapters, LoraConfig, LoraLinear, LoraModule,
    nn::{LoraConv2d, LoraEmbedding, LoraMhaInput, LoraMultiHeadAttention},
    train::{AtomicRecorder, LoraPlus},
};
use safetensors::SafeTensors;

use crate::model::{Plain, Train, device};

type Mpk = NamedMpkFileRecorder<FullPrecisionSettings>;
type Bin = BinFileRecorder<FullPrecisionSettings>;

#[derive(Module, Debug)]
struct Net<B: Backend> {
    table: LoraEmbedding<B>,
    attention: LoraMultiHeadAttention<B>,
    blocks: Vec<LoraLinear<B>>,
    norm: LayerNorm<B>,
    head: LoraLinear<B>,
    conv: LoraConv2d<B>,
}

impl<B: Backend> Net<B> {
    fn new(device: &B::Device) -> Self {
        let conv = Conv2dConfig::new([2, 3], [3, 3]).with_padding(PaddingConfig2d::Same);
        let linear = |(d_input, d_output)| LinearConfig::new(d_input, d_output).init(device).into();
        Self {
            table: EmbeddingConfig::new(5, 6).init(device).into(),
            attention: MultiHeadAttentionConfig::new(6, 2).with_dropout(0.0).init(device).into(),
            blocks: [(6, 8), (8, 7)].map(linear).into(),
            norm: LayerNormConfig::new(7).init(device),
            head: LinearConfig::new(7, 3).with_bias(false).init(device).into(),
            conv: conv.init(device).into(),
        }
    }

    fn forward(&self) -> Tensor<B, 1> {
        let device = self.norm.gamma.device();
        let ids = Tensor::<B, 2, Int>::from_data([[0, 3, 1, 4], [2, 2, 0, 1]], &device);
        let x = self.attention.forward(LoraMhaInput::self_attn(self.table.forward(ids))).context;
        let x = self.blocks.iter().fold(x, |x, block| relu(block.forward(x)));
        let y: Tensor<B, 1> = self.head.forward(self.norm.forward(x)).flatten(0, 2);
        let image: Vec<f32> = (0..32).map(|it| (it as f32 * 0.7).sin()).collect();
        let image = Tensor::<B, 4>::from_data(TensorData::new(image, [1, 2, 4, 4]), &device);
        Tensor::cat(vec![y, self.conv.forward(image).flatten(0, 3)], 0)
    }
}

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/files").join(name)
}

/// What a visitor saw, and the output.
type Values = BTreeMap<String, Vec<f32>>;

fn expected(name: &str) -> Values {
    let bytes = fs::read(file(&format!("{name}.safetensors"))).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let values =
        |data: &[u8]| data.as_chunks().0.iter().map(|it| f32::from_le_bytes(*it)).collect();
    tensors.iter().map(|(name, tensor)| (name.to_owned(), values(tensor.data()))).collect()
}

fn values<B: Backend, M: Module<B>>(model: &M) -> Values {
    struct Visitor(Vec<String>, Values);
    impl<B: Backend> ModuleVisitor<B> for Visitor {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.0.push(name.to_owned());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.0.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            let values = param.val().into_data().iter::<f32>().collect();
            self.1.insert(self.0.join("."), values);
        }
    }
    let mut visitor = Visitor(vec![], Values::new());
    model.visit(&mut visitor);
    visitor.1
}

/// Fails unless all parameters have the expected bits, and the output the expected values.
#[track_caller]
fn assert_is<B: Backend, M: Module<B>>(model: &M, output: Tensor<B, 1>, name: &str) {
    let mut expected = expected(name);
    let expected_output = expected.remove("output").unwrap();
    let found = values(model);
    assert_eq!(Vec::from_iter(found.keys()), Vec::from_iter(expected.keys()), "{name}");
    for (path, values) in &expected {
        let bits = |values: &[f32]| values.iter().map(|it| it.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&found[path]), bits(values), "{name}: {path}");
    }
    assert_near(output, &expected_output, 1e-5);
}

#[track_caller]
fn assert_near<B: Backend>(output: Tensor<B, 1>, expected: &[f32], tolerance: f32) {
    let output: Vec<f32> = output.into_data().iter().collect();
    assert_eq!(output.len(), expected.len());
    for (output, expected) in output.iter().zip(expected) {
        assert!((output - expected).abs() <= tolerance, "{output}, not {expected}");
    }
}

fn loaded<B: Backend, M: Module<B>>(model: M, recorder: &impl FileRecorder<B>, name: &str) -> M {
    let record = recorder.load(file(name), &device::<B>());
    model.load_record(record.unwrap_or_else(|error| panic!("{name}: {error}")))
}

fn base<B: Backend>() -> Net<B> {
    loaded(Net::new(&device::<B>()), &Mpk::default(), "base")
}

#[test]
fn records_of_models_and_layers() {
    let net = base::<Plain>();
    assert_is(&net, net.forward(), "base");
    let net = loaded(Net::<Plain>::new(&device::<Plain>()), &Bin::default(), "base");
    assert_is(&net, net.forward(), "base");

    let layer = || LoraLinear::from(LinearConfig::new(6, 8).init::<Plain>(&device::<Plain>()));
    let x = Tensor::<Plain, 2>::ones([2, 6], &device::<Plain>());
    let full = loaded(layer(), &Mpk::default(), "layer");
    assert_is(&full, full.forward(x.clone()).flatten(0, 1), "layer");
    let half = loaded(layer(), &CompactRecorder::new(), "layer_half");
    assert_near(half.forward(x).flatten(0, 1), &expected("layer")["output"], 1e-2);
}

#[test]
fn records_of_adapted_models_and_their_optimizers() {
    for name in ["lora", "dora", "pissa", "lora_fa"] {
        let into = || Lora::new(base::<Train>());
        let atomic = loaded(into(), &AtomicRecorder::<Mpk>::default(), name).valid();
        assert_is(&atomic, atomic.forward(), name);
        let mut model = loaded(into(), &Bin::default(), name);
        assert_is(&model.valid(), model.valid().forward(), name);

        // The training goes on as it went on then.
        let optimizer =
            LoraPlus::new(AdamWConfig::new().init::<Train, Lora<Train, Net<Train>>>(), 4.0);
        let record = Mpk::default().load(file(&format!("{name}_optimizer")), &device::<Train>());
        let mut optimizer =
            Optimizer::<Lora<Train, Net<Train>>, Train>::load_record(optimizer, record.unwrap());
        for _ in 0..2 {
            let loss = model.forward().powi_scalar(2).mean();
            let grads = GradientsParams::from_grads(loss.backward(), &model);
            model = optimizer.step(0.05, model, grads);
        }
        let expected = &expected(&format!("{name}_next"))["output"];
        assert_near(model.valid().forward(), expected, 2e-3);
    }
}

#[test]
fn directories_of_adapters() {
    for name in ["lora", "pissa", "lora_fa"] {
        let dir = file(&format!("{name}_adapter"));
        let set = LoraAdapters::load(dir, &device::<Plain>()).unwrap();
        let model = base::<Plain>().switch(&set).unwrap();
        let expected = expected(name);
        assert_near(model.forward(), &expected["output"], 1e-5);
        if name != "pissa" {
            for (path, values) in values(&*model) {
                assert_eq!(values, expected[&path], "{name}: {path}");
            }
        }
    }
}

#[test]
fn configurations() {
    let json = br#"{"rank": 4, "alpha": 8, "init": {"pissa_randomised": {"iterations": 16}}}"#;
    let config = LoraConfig::load_binary(json).unwrap();
    assert_eq!(config.init, Init::PissaRandomized { iterations: 16 });
}

#[test]
fn quantized_bases() {
    for name in ["int8", "nf4"] {
        let into = || Net::<Plain>::new(&device::<Plain>());
        for net in [loaded(into(), &Mpk::default(), name), loaded(into(), &Bin::default(), name)] {
            let mut expected = expected(name);
            assert_near(net.forward(), &expected.remove("output").unwrap(), 1e-5);
            for (path, values) in values(&net.dequantize()) {
                for (found, expected) in values.iter().zip(&expected[&path]) {
                    assert!((found - expected).abs() <= 1e-6, "{name}: {path}");
                }
            }
        }
    }
}
