//! Records of an overlay, written by the first version of this crate as `tests/golden/make.rs` shows, load to the
//! same bits.

use std::{collections::BTreeMap, path::PathBuf};

use burn::{
    backend::{Autodiff, Flex},
    module::{AutodiffModule, Module, ModuleMapper, ModuleVisitor, Param},
    nn::{Embedding, EmbeddingConfig, Linear, LinearConfig},
    record::{BinFileRecorder, FullPrecisionSettings, NamedMpkFileRecorder, Recorder},
    tensor::{Int, Tensor, TensorData, activation::relu, backend::Backend},
};
use burn_lora::Lora;
use safetensors::SafeTensors;

type Train = Autodiff<Flex>;

#[derive(Module, Debug)]
struct Stock<B: Backend> {
    table: Embedding<B>,
    blocks: Vec<Linear<B>>,
}

impl<B: Backend> Stock<B> {
    fn new(device: &B::Device) -> Self {
        Self {
            table: EmbeddingConfig::new(5, 6).init(device),
            blocks: [(6, 8), (8, 3)].map(|(i, o)| LinearConfig::new(i, o).init(device)).into(),
        }
    }

    fn forward(&self) -> Tensor<B, 1> {
        let device = self.table.weight.device();
        let ids = Tensor::<B, 2, Int>::from_data([[0, 3, 1, 4], [2, 2, 0, 1]], &device);
        let x = self.table.forward(ids);
        self.blocks.iter().fold(x, |x, block| relu(block.forward(x))).flatten(0, 2)
    }
}

/// The model with weights that are the same each time.
fn filled<B: Backend, M: Module<B>>(model: M) -> M {
    struct Fill(u32);
    impl<B: Backend> ModuleMapper<B> for Fill {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
            self.0 += 1;
            let (dims, device, seed) = (param.dims(), param.device(), self.0);
            let count: usize = dims.iter().product();
            let values: Vec<f32> = (0..count as u32)
                .map(|it| {
                    let hash = (it + 1).wrapping_mul(2_654_435_761).wrapping_add(seed * 40_503);
                    (hash >> 8) as f32 / (1 << 24) as f32 * 1.5 - 0.75
                })
                .collect();
            let values = Tensor::from_data(TensorData::new(values, dims), &device);
            param.map(|it| values.set_require_grad(it.is_require_grad()))
        }
    }
    model.map(&mut Fill(0))
}

/// The bytes of every parameter that a visitor sees, by path.
struct Values {
    names: Vec<String>,
    found: BTreeMap<String, Vec<u8>>,
}

impl<B: Backend> ModuleVisitor<B> for Values {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.names.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.names.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let bytes = param.val().into_data().as_bytes().to_vec();
        self.found.insert(self.names.join("."), bytes);
    }
}

fn file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/files").join(name)
}

fn check<R: Recorder<Train, LoadArgs = PathBuf> + Default>() {
    let bytes = std::fs::read(file("overlay.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let expected: BTreeMap<_, _> =
        expected.iter().map(|(name, view)| (name.to_owned(), view.data().to_vec())).collect();
    let device = Default::default();
    let record = R::default().load(file("overlay"), &device).unwrap();
    let model = Lora::overlay(filled::<Train, _>(Stock::new(&device))).load_record(record);
    assert_eq!(model.parameters().trainable, 2 * (5 + 6 + 6 + 8 + 8 + 3));
    let model = model.valid();
    let mut values = Values { names: vec![], found: BTreeMap::new() };
    model.visit(&mut values);
    let output = model.with_adapters(Stock::forward).into_data();
    values.found.insert("output".to_owned(), output.as_bytes().to_vec());
    assert!(values.found.contains_key("blocks.1.adapter.b"), "{:?}", values.found.keys());
    assert_eq!(values.found, expected);
    // The adapters came from the file, and they do something.
    let base: Stock<Flex> = model.detach();
    assert_ne!(base.forward().into_data().as_bytes(), output.as_bytes());
}

#[test]
fn a_record_in_message_pack() {
    check::<NamedMpkFileRecorder<FullPrecisionSettings>>();
}

#[test]
fn a_record_in_binary() {
    check::<BinFileRecorder<FullPrecisionSettings>>();
}
