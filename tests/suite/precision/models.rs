//! The precision of a model: which layers it reaches, and what it outlives.

use burn::{
    module::{AutodiffModule, Module},
    nn::{
        EmbeddingConfig, LinearConfig,
        attention::MultiHeadAttentionConfig,
        conv::{Conv1dConfig, Conv2dConfig, ConvTranspose2dConfig},
    },
    record::{FullPrecisionSettings, NamedMpkBytesRecorder, Recorder},
    tensor::{Int, Tensor, backend::Backend},
};
use burn_lora::{
    Init, Lora, LoraAdapters, LoraConfig, LoraLinear, LoraModule, Scaling,
    nn::{
        LoraConv1d, LoraConv2d, LoraConvTranspose2d, LoraEmbedding, LoraMhaInput,
        LoraMultiHeadAttention, Precision,
    },
    quantize::Quantization,
    serve::MultiLora,
};

use super::{Formula, THERE, assert_near, problem, random};
use crate::{
    model::{Plain, Train, device, filled, layer},
    oracle::{Matrix, Problem, assert_identical, bits},
};

const WIDTH: usize = 8;

/// Every layer, nested in every way.
#[derive(Module, Debug)]
struct Net<B: Backend> {
    table: LoraEmbedding<B>,
    blocks: Vec<LoraLinear<B>>,
    inner: Option<Inner<B>>,
    nothing: Option<LoraLinear<B>>,
    pair: (LoraConv1d<B>, [LoraConv2d<B>; 1]),
}

#[derive(Module, Debug)]
struct Inner<B: Backend> {
    attention: LoraMultiHeadAttention<B>,
    back: LoraConvTranspose2d<B>,
}

impl<B: Backend> Net<B> {
    fn new(device: &B::Device) -> Self {
        let linear = |(d_input, d_output)| LinearConfig::new(d_input, d_output).init(device).into();
        let attention = MultiHeadAttentionConfig::new(WIDTH, 2).with_dropout(0.0);
        let net = Self {
            table: EmbeddingConfig::new(11, WIDTH).init(device).into(),
            blocks: [(WIDTH, 5), (5, WIDTH)].map(linear).into(),
            inner: Some(Inner {
                attention: attention.init(device).into(),
                back: ConvTranspose2dConfig::new([3, 2], [1, 1]).init(device).into(),
            }),
            nothing: None,
            pair: (
                Conv1dConfig::new(6, 6, 1).init(device).into(),
                [Conv2dConfig::new([2, 3], [1, 1]).init(device).into()],
            ),
        };
        filled(net)
    }

    /// `[batch, 6]` to `[batch, 6, 11]`.
    fn forward(&self, ids: Tensor<B, 2, Int>) -> Tensor<B, 3> {
        let batch = ids.dims()[0];
        let x = self.pair.0.forward(self.table.forward(ids));
        let image = self.pair.1[0].forward(x.reshape([batch, 2, 6, 4]));
        let inner = self.inner.as_ref().expect("it is there");
        let x = inner.back.forward(image).reshape([batch, 6, WIDTH]);
        let x = inner.attention.forward(LoraMhaInput::self_attn(x)).context;
        self.table.project(self.blocks.iter().fold(x, |x, block| block.forward(x)))
    }

    /// The precisions of all layers.
    fn precisions(&self) -> Vec<Precision> {
        let inner = self.inner.as_ref().expect("it is there");
        let LoraMultiHeadAttention { query, key, value, output, .. } = &inner.attention;
        let linear = self.blocks.iter().chain([query, key, value, output]);
        let mut all: Vec<_> = linear.map(LoraLinear::precision).collect();
        all.extend([self.table.precision(), inner.back.precision()]);
        all.extend([self.pair.0.precision(), self.pair.1[0].precision()]);
        all
    }

    #[track_caller]
    fn is_all(&self, precision: Precision) {
        assert_eq!(self.precisions(), [precision; 10]);
    }
}

fn config() -> LoraConfig {
    LoraConfig::new(2, 3.0).with_init(Init::RandomBoth).with_seed(5)
}

fn ids<B: Backend>(batch: usize) -> Tensor<B, 2, Int> {
    let ids: Vec<_> = (0..batch * 6).map(|it| (it * it + 3 * it) as i32 % 11).collect();
    Tensor::<B, 1, Int>::from_ints(&*ids, &device::<B>()).reshape([batch, 6])
}

fn base() -> Net<Train> {
    Net::new(&device::<Train>())
}

#[test]
fn it_is_f32_until_it_is_set() {
    assert_eq!(Precision::default(), Precision::F32);
    base().is_all(Precision::F32);
    base().attach(&config()).unwrap().is_all(Precision::F32);
    assert_eq!([Precision::F32, Precision::Bf16].map(|it| it.to_string()), ["f32", "bf16"]);
}

#[test]
fn it_reaches_every_layer_and_leaves_the_model_as_it_was() {
    let base = base();
    let set = base.with_precision(Precision::Bf16);
    set.is_all(Precision::Bf16);
    base.is_all(Precision::F32);
    set.with_precision(Precision::F32).is_all(Precision::F32);
    // Also through adapters, and without autodiff.
    let adapted: Lora<Train, Net<Train>> = base.attach(&config()).unwrap();
    let set = adapted.with_precision(Precision::Bf16);
    set.is_all(Precision::Bf16);
    adapted.is_all(Precision::F32);
    let [set_report, report] = [set.parameters(), adapted.parameters()];
    assert_eq!([set_report.trainable, set_report.total], [report.trainable, report.total]);
    set.valid().is_all(Precision::Bf16);
    adapted.valid().with_precision(Precision::Bf16).is_all(Precision::Bf16);
    adapted.into_inner().with_precision(Precision::Bf16).is_all(Precision::Bf16);
}

#[test]
fn weights_that_were_not_drawn_yet_are_shared() {
    let base: LoraLinear<Plain> = LinearConfig::new(9, 6).init(&device::<Plain>()).into();
    let set = base.with_precision(Precision::Bf16);
    assert_identical(set.base.weight.val(), base.base.weight.val());
}

#[test]
fn a_layer_can_have_its_own() {
    let mut net = base().with_precision(Precision::Bf16);
    net.blocks[1].set_precision(Precision::F32);
    net.table.set_precision(Precision::F32);
    let found = net.attach(&config()).unwrap().precisions();
    let full = found.iter().filter(|it| **it == Precision::F32).count();
    assert_eq!((found[1], full), (Precision::F32, 2));
}

const BF16: Precision = Precision::Bf16;

// Several small tests: all these models would be too much for the stack of one, where they are large.

#[test]
fn it_outlives_copies() {
    let (device, base) = (device::<Train>(), base().with_precision(BF16));
    base.clone().is_all(BF16);
    base.valid().is_all(BF16);
    Net::<Train>::from_inner(base.valid()).is_all(BF16);
    base.clone().fork(&device).is_all(BF16);
    base.clone().to_device(&device).is_all(BF16);
}

#[test]
fn it_outlives_freezing_and_mapping() {
    let base = base().with_precision(BF16);
    base.clone().no_grad().is_all(BF16);
    filled(base.clone()).is_all(BF16);
    base.train_only(&["blocks"]).unwrap().is_all(BF16);
}

#[test]
fn it_outlives_copies_of_adapted_models() {
    let device = device::<Train>();
    let model = base().with_precision(BF16).attach(&config()).unwrap();
    model.is_all(BF16);
    model.clone().fork(&device).is_all(BF16);
    model.clone().to_device(&device).is_all(BF16);
    Lora::<Train, Net<Train>>::from_inner(model.valid()).is_all(BF16);
    filled(model.clone()).is_all(BF16);
}

#[test]
fn it_outlives_what_becomes_of_adapters() {
    let base = base().with_precision(BF16);
    let model = base.attach(&config()).unwrap();
    model.detach().is_all(BF16);
    model.merge().unwrap().is_all(BF16);
    base.switch(&model.adapters()).unwrap().is_all(BF16);
    model.switch(&model.adapters()).unwrap().is_all(BF16);
}

const KINDS: [Quantization; 3] = [Quantization::Int8, Quantization::Nf4, Quantization::Bf16];

#[test]
fn it_outlives_quantizing() {
    let device = device::<Train>();
    for to in KINDS {
        let (packed, _) = base().with_precision(BF16).quantize(to).unwrap();
        packed.is_all(BF16);
        packed.valid().is_all(BF16);
        Net::<Train>::from_inner(packed.valid()).is_all(BF16);
        packed.clone().fork(&device).is_all(BF16);
        packed.dequantize().is_all(BF16);
    }
}

#[test]
fn it_outlives_adapting_what_is_quantized() {
    for to in KINDS {
        let (packed, _) = base().with_precision(BF16).quantize(to).unwrap();
        let adapted = packed.attach(&config()).unwrap();
        adapted.is_all(BF16);
        adapted.merge().unwrap().is_all(BF16);
        adapted.detach().is_all(BF16);
    }
}

#[test]
fn it_outlives_quantizing_what_is_adapted() {
    let base = base().with_precision(BF16);
    for to in KINDS {
        base.attach(&config()).unwrap().quantize(to).unwrap().0.is_all(BF16);
        base.attach_loftq(to, &config(), 1).unwrap().is_all(BF16);
    }
}

#[test]
fn it_outlives_eva() {
    let eva = base().with_precision(BF16).attach_eva(&LoraConfig::peft(2, 3.0), 1.0, |model| {
        model.is_all(BF16);
        model.forward(ids(4));
    });
    eva.unwrap().is_all(BF16);
}

#[test]
fn it_reaches_the_layers_of_an_overlay() {
    let model = Lora::overlay(base()).with_precision(Precision::Bf16);
    model.model().is_all(Precision::Bf16);
    let model = model.attach(&config().with_targets([r"blocks\..*"])).unwrap();
    model.with_adapters(|model| model.is_all(Precision::Bf16));
    model.valid().with_adapters(|model| model.is_all(Precision::Bf16));
    model.detach::<Net<Train>>().is_all(Precision::Bf16);
    model.merge::<Net<Train>>().unwrap().is_all(Precision::Bf16);
}

#[test]
fn it_is_no_part_of_records() {
    let recorder = NamedMpkBytesRecorder::<FullPrecisionSettings>::new();
    let base = base();
    let [full, half] = [Precision::F32, Precision::Bf16].map(|it| base.with_precision(it));
    let bytes_of =
        |net: &Net<Train>| recorder.record(net.clone().into_record(), ()).expect("it is written");
    assert_eq!(bytes_of(&full), bytes_of(&half));
    for saved in [&full, &half] {
        for (net, precision) in [(&full, Precision::F32), (&half, Precision::Bf16)] {
            let record = recorder.load(bytes_of(saved), &device::<Train>()).unwrap();
            net.clone().load_record(record).is_all(precision);
            let adapted = saved.attach(&config()).unwrap();
            let loaded = net.attach(&config()).unwrap().load_record(adapted.clone().into_record());
            loaded.is_all(precision);
            let layers = |it: &Net<Train>| bits(it.with_precision(precision).forward(ids(2)));
            assert_eq!(layers(&loaded), layers(&adapted));
        }
    }
}

#[test]
fn every_layer_of_attention_is_in_it() {
    let config = MultiHeadAttentionConfig::new(24, 3).with_dropout(0.0);
    let config_of_adapters = LoraConfig::new(4, 2.0)
        .with_init(Init::RandomBoth)
        .with_seed(3)
        .with_targets(["query", "key", "value", "output"]);
    let attention = config_of_adapters
        .init_attention(filled(config.init::<Train>(&device::<Train>())))
        .with_precision(Precision::Bf16);
    let LoraMultiHeadAttention { query, key, value, output, .. } = &attention;
    for layer in [query, key, value, output] {
        let adapter = layer.adapter().unwrap();
        let of = |it: Tensor<Train, 2>| {
            let [rows, cols] = it.dims();
            Matrix { rows, cols, data: it.into_data().iter::<f64>().collect() }
        };
        let problem = Problem {
            x: Matrix::random(14, 24, 1),
            w: of(layer.base.weight.val()),
            bias: layer.base.bias.as_ref().map(|it| of(it.val().unsqueeze())),
            a: of(adapter.a.val()),
            b: of(adapter.b.val()),
            adapter_bias: None,
            scale: adapter.scale(),
        };
        let x = problem.x.tensor::<Train, 2>([14, 24], &device::<Train>());
        assert_near("y", layer.forward(x), &Formula::of(&problem).output());
    }
    let x = random::<Train, 3>([2, 7, 24], 2);
    let input = || LoraMhaInput::self_attn(x.clone());
    let [ours, full] = [Precision::Bf16, Precision::F32]
        .map(|it| attention.with_precision(it).forward(input()).context.inner());
    assert_eq!(bits(ours.clone()) != bits(full.clone()), THERE);
    let size = full.clone().abs().max().into_scalar();
    let error = (ours - full).abs().max().into_scalar();
    assert!(error <= 0.03 * size, "{error} of {size}");
}

#[test]
fn a_mixed_batch_has_the_base_in_bf16_and_updates_in_f32() {
    let (rows, samples) = (7, 3);
    let problem = problem(rows * samples, [20, 13], 4, 3);
    let mut base = layer::<Plain>(&problem, problem.scale, Scaling::Alpha);
    let adapter = base.adapter().cloned().expect("it was just put on");
    base.set_adapter(None);
    let mut models = MultiLora::new(base.with_precision(Precision::Bf16)).unwrap();
    models.insert("one", &LoraAdapters::new([("", adapter)])).unwrap();
    let batch = models.batch(&[None, Some("one"), Some("one")]).unwrap();
    assert_eq!(batch.model().precision(), Precision::Bf16);
    let x = problem.x.tensor::<Plain, 3>([samples, rows, 20], &device::<Plain>());
    let y = batch.run(x, |model, x| model.forward(x));

    let formula = Formula::of(&problem);
    let mut update = Formula { rounds: false, ..formula }.update(&problem.x);
    update.values.data[..rows * 13].fill(0.0);
    update.errors.data[..rows * 13].fill(0.0);
    assert_near("y", y, &formula.with_bias(formula.base().plus(&update)));
}
