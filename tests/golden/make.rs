//! Writes the golden files with the code of commit 7df4b16, the last one before the workspace. In a checkout of
//! that commit:
//!
//!     cp …/tests/golden/make.rs examples/golden.rs
//!     cargo run --release --example golden --no-default-features --features flex -- …/tests/golden/files

use std::{collections::BTreeMap, fs, path::Path};

use burn::{
    backend::{Autodiff, Flex},
    module::{AutodiffModule, Module, ModuleMapper, ModuleVisitor, Param},
    nn::{
        Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig, PaddingConfig2d,
        attention::MultiHeadAttentionConfig, conv::Conv2dConfig,
    },
    optim::{AdamWConfig, GradientsParams, Optimizer},
    record::{
        BinFileRecorder, CompactRecorder, FullPrecisionSettings, NamedMpkFileRecorder, Recorder,
    },
    tensor::{Int, Tensor, TensorData, activation::relu, backend::Backend},
};
use burn_lora::{
    AtomicRecorder, Init, Lora, LoraConfig, LoraConv2d, LoraEmbedding, LoraLinear, LoraMhaInput, LoraModule,
    LoraMultiHeadAttention, LoraPlus, Quantisation, QuantiseConfig,
};
use safetensors::{Dtype, tensor::TensorView};

type Train = Autodiff<Flex>;
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
        Self {
            table: EmbeddingConfig::new(5, 6).init(device).into(),
            attention: MultiHeadAttentionConfig::new(6, 2).with_dropout(0.0).init(device).into(),
            blocks: [(6, 8), (8, 7)].map(|(i, o)| LinearConfig::new(i, o).init(device).into()).into(),
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

/// Every parameter that a visitor sees, and the output.
fn expected<B: Backend, M: Module<B>>(model: &M, output: Tensor<B, 1>, file: &Path) {
    struct Values(Vec<String>, BTreeMap<String, (Vec<usize>, Vec<u8>)>);
    impl<B: Backend> ModuleVisitor<B> for Values {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.0.push(name.to_owned());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.0.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            let (shape, values) = (param.dims().to_vec(), param.val().into_data());
            self.1.insert(self.0.join("."), (shape, values.as_bytes().to_vec()));
        }
    }
    let mut values = Values(vec![], BTreeMap::new());
    model.visit(&mut values);
    let output = output.into_data();
    values.1.insert("output".to_owned(), (vec![output.shape[0]], output.as_bytes().to_vec()));
    let views = values.1.iter().map(|(name, (shape, bytes))| {
        (name, TensorView::new(Dtype::F32, shape.clone(), bytes).expect("bytes of the shape"))
    });
    safetensors::serialize_to_file(views, None, file).expect("a file");
}

fn record<B: Backend>(recorder: &impl Recorder<B, RecordArgs = std::path::PathBuf, RecordOutput = ()>, it: impl burn::record::Record<B>, file: &Path) {
    recorder.record(it, file.to_path_buf()).expect("a file");
}

fn trained<M: AutodiffModule<Train> + Clone>(
    mut model: Lora<Train, M>,
    optimizer: &mut impl Optimizer<Lora<Train, M>, Train>,
    forward: impl Fn(&M) -> Tensor<Train, 1>,
) -> Lora<Train, M> {
    for _ in 0..2 {
        let loss = forward(&model).powi_scalar(2).mean();
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(0.05, model, grads);
    }
    model
}

fn main() {
    let out = std::env::args().nth(1).expect("a directory");
    let out = Path::new(&out);
    fs::create_dir_all(out).expect("a directory");
    let device = Default::default();
    let net: Net<Train> = filled(Net::new(&device));
    let valid = |it: &Net<Train>| it.valid();

    // A model without adapters.
    record::<Flex>(&Mpk::default(), valid(&net).into_record(), &out.join("base"));
    record::<Flex>(&Bin::default(), valid(&net).into_record(), &out.join("base"));
    expected(&valid(&net), valid(&net).forward(), &out.join("base.safetensors"));

    // Adapted models, their optimizers, and their directories.
    let lora = LoraConfig::peft(2, 6.0).with_modules_to_save(["norm"]).with_seed(5);
    let pissa = LoraConfig::new(2, 1.5).with_targets(["blocks.*", "query", "value"]);
    let cases = [
        ("lora", lora.clone().with_dropout(0.25)),
        ("dora", lora.clone().with_dora(true)),
        ("pissa", pissa.clone().with_init(Init::Pissa)),
        ("lora_fa", pissa.clone().with_freeze_a(true).with_bias(true)),
    ];
    for (name, config) in cases {
        let mut optimizer = LoraPlus::new(AdamWConfig::new().init(), 4.0);
        // Without dropout, which is random.
        let model = net.attach(&LoraConfig { dropout: 0.0, ..config }).expect("adapters");
        let model = trained(model, &mut optimizer, Net::forward);
        record::<Train>(&AtomicRecorder::<Mpk>::default(), model.clone().into_record(), &out.join(name));
        record::<Train>(&Bin::default(), model.clone().into_record(), &out.join(name));
        let optimizer_file = out.join(format!("{name}_optimizer"));
        record::<Train>(&Mpk::default(), Optimizer::<Lora<Train, Net<Train>>, Train>::to_record(&optimizer), &optimizer_file);
        expected(&model.valid(), model.valid().forward(), &out.join(format!("{name}.safetensors")));
        let next = trained(model.clone(), &mut optimizer, Net::forward);
        expected(&next.valid(), next.valid().forward(), &out.join(format!("{name}_next.safetensors")));
        // PEFT has no files for DoRA on an embedding.
        if name != "dora" {
            model.adapters().save(out.join(format!("{name}_adapter"))).expect("a directory");
        }
    }

    // A layer that was never part of an adapted model, with its adapter in its record.
    let mut layer = net.blocks[0].clone();
    let model = net.attach(&lora).expect("adapters");
    layer.set_adapter(model.blocks[0].adapter().cloned());
    record::<Flex>(&Mpk::default(), layer.valid().into_record(), &out.join("layer"));
    record::<Flex>(&CompactRecorder::new(), layer.valid().into_record(), &out.join("layer_half"));
    let x = Tensor::<Flex, 2>::ones([2, 6], &device);
    expected(&layer.valid(), layer.valid().forward(x).flatten(0, 1), &out.join("layer.safetensors"));

    // Quantised bases.
    for (name, to) in [("int8", Quantisation::Int8), ("nf4", Quantisation::Nf4)] {
        let config = QuantiseConfig::from(to).with_targets(["table", "blocks.*", "attention.*"]);
        let (base, _) = valid(&net).quantise(config).expect("quantised");
        record::<Flex>(&Mpk::default(), base.clone().into_record(), &out.join(name));
        record::<Flex>(&Bin::default(), base.clone().into_record(), &out.join(name));
        let dense = base.dequantise();
        expected(&dense, base.forward(), &out.join(format!("{name}.safetensors")));
    }

    // The overlay.
    let stock: Stock<Train> = filled(Stock::new(&device));
    let mut optimizer = AdamWConfig::new().init();
    let config = LoraConfig::peft(2, 6.0).with_targets(["table", "blocks.*"]);
    let mut model = Lora::overlay(stock).attach(&config).expect("adapters");
    for _ in 0..2 {
        let loss = model.with_adapters(Stock::forward).powi_scalar(2).mean();
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(0.05, model, grads);
    }
    record::<Train>(&Mpk::default(), model.clone().into_record(), &out.join("overlay"));
    record::<Train>(&Bin::default(), model.clone().into_record(), &out.join("overlay"));
    expected(&model.valid(), model.valid().with_adapters(Stock::forward), &out.join("overlay.safetensors"));
}
