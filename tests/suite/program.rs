//! A user's whole program, which implements nothing for its model. It builds, adapts, trains, saves,
//! switches, merges and restores it, with layers in every kind of container.

use burn::{
    module::{AutodiffModule, Module},
    nn::{
        Linear, LinearConfig, PaddingConfig2d, Relu,
        conv::{Conv2d, Conv2dConfig},
    },
    optim::{AdamWConfig, GradientsParams, Optimizer},
    record::{BinBytesRecorder, FullPrecisionSettings, NamedMpkBytesRecorder, Recorder},
    tensor::{Tensor, backend::Backend},
};
use burn_lora::{
    Init, Lora, LoraAdapters, LoraConfig, LoraError, LoraLinear, LoraModule, nn::LoraConv2d,
};

use crate::{
    model::{Plain, Train, device},
    oracle::{Matrix, assert_close, assert_identical, bits},
    peft::TempDir,
};

#[derive(Module, Debug)]
struct Block<B: Backend> {
    mix: LoraLinear<B>,
    activation: Relu,
}

#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "as users write it")]
enum Last<B: Backend> {
    Adapted(LoraLinear<B>),
    Stock(Linear<B>),
}

/// A field of any type of module.
#[derive(Module, Debug)]
struct Twice<B: Backend, M> {
    inner: M,
    scale: LoraLinear<B>,
}

#[derive(Module, Debug)]
struct Net<B: Backend> {
    stem: LoraConv2d<B>,
    stock: Conv2d<B>,
    blocks: Vec<Block<B>>,
    maybe: Option<LoraLinear<B>>,
    never: Option<LoraLinear<B>>,
    array: [LoraLinear<B>; 2],
    pair: (LoraLinear<B>, Linear<B>),
    last: Last<B>,
    generic: Twice<B, LoraLinear<B>>,
    head: Linear<B>,
}

const LAYERS: [&str; 10] = [
    "stem",
    "blocks.0.mix",
    "blocks.1.mix",
    "maybe",
    "array.0",
    "array.1",
    "pair.0",
    "last.Adapted",
    "generic.inner",
    "generic.scale",
];

impl<B: Backend> Net<B> {
    fn new(device: &B::Device) -> Self {
        let linear = || LinearConfig::new(8, 8).init(device);
        let conv = |channels| {
            let conv = Conv2dConfig::new(channels, [3, 3]);
            conv.with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1)).init(device)
        };
        Self {
            stem: conv([1, 2]).into(),
            stock: conv([2, 2]),
            blocks: (0..2).map(|_| Block { mix: linear().into(), activation: Relu }).collect(),
            maybe: Some(linear().into()),
            never: None,
            array: [linear().into(), linear().into()],
            pair: (linear().into(), linear()),
            last: match device == &B::Device::default() {
                true => Last::Adapted(linear().into()),
                false => Last::Stock(linear()),
            },
            generic: Twice { inner: linear().into(), scale: linear().into() },
            head: LinearConfig::new(8, 3).init(device),
        }
    }

    fn forward(&self, images: Tensor<B, 4>) -> Tensor<B, 2> {
        let x = self.stock.forward(self.stem.forward(images)).flatten::<2>(1, 3);
        let x = self.blocks.iter().fold(x, |x, it| it.activation.forward(it.mix.forward(x)));
        let x = self.maybe.iter().chain(&self.never).fold(x, |x, layer| layer.forward(x));
        let x = self.array.iter().fold(x, |x, layer| layer.forward(x).tanh());
        let x = self.pair.1.forward(self.pair.0.forward(x));
        let x = match &self.last {
            Last::Adapted(layer) => layer.forward(x),
            Last::Stock(layer) => layer.forward(x),
        };
        let x = self.generic.scale.forward(self.generic.inner.forward(x)).tanh();
        self.head.forward(x)
    }
}

fn images<B: Backend>() -> Tensor<B, 4> {
    Matrix::random(3, 4, 9).tensor([3, 1, 2, 2], &device::<B>())
}

fn config() -> LoraConfig {
    LoraConfig::new(2, 1.5).with_modules_to_save(["head"]).with_init(Init::RandomBoth)
}

fn train(mut model: Lora<Train, Net<Train>>) -> Lora<Train, Net<Train>> {
    let mut optimizer = AdamWConfig::new().with_weight_decay(0.5).init();
    for _ in 0..5 {
        let loss = model.forward(images()).square().mean();
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        assert_eq!(grads.len(), 2 * LAYERS.len() + 2, "two factors for each layer, and the head");
        model = optimizer.step(0.05, model, grads);
    }
    model
}

fn as_matrix<B: Backend>(tensor: Tensor<B, 2>) -> Matrix {
    let [rows, cols] = tensor.dims();
    Matrix { rows, cols, data: tensor.into_data().convert::<f64>().to_vec().unwrap() }
}

#[test]
fn from_a_base_to_a_merged_model() {
    let base = Net::<Train>::new(&device::<Train>());
    let untouched = base.forward(images());
    let fresh = base.attach(&config().with_init(Init::KaimingUniform)).unwrap();
    assert_identical(fresh.forward(images()), untouched.clone());

    let model = train(base.attach(&config()).unwrap());
    let paths: Vec<_> = model.adapters().iter().map(|(path, _)| path.to_owned()).collect();
    let mut expected = LAYERS;
    expected.sort();
    assert_eq!(paths, expected);
    let y = model.forward(images());
    assert_ne!(bits(y.clone()), bits(untouched.clone()));

    // The file holds all that was trained, including the head.
    let dir = TempDir::new("program");
    model.adapters().save(dir.0.join("set")).unwrap();
    let loaded = LoraAdapters::load(dir.0.join("set"), &device::<Train>()).unwrap();
    let served = base.switch(&loaded).unwrap();
    assert_close(served.forward(images()), &as_matrix(y.clone()), 1e-5);
    assert_identical(served.head.weight.val(), model.head.weight.val());
    assert_eq!(served.adapters().num_params(), model.adapters().num_params());

    let plain: Net<Train> = served.merge().unwrap();
    assert_close(plain.forward(images()), &as_matrix(y), 1e-5);
    assert_eq!(plain.num_params(), base.num_params());
    // Detaching restores every bit of the base, including the head.
    for original in [model.detach(), served.detach(), model.valid().train::<Train>().detach()] {
        assert_identical(original.forward(images()), untouched.clone());
    }
}

#[test]
fn on_a_backend_that_only_infers() {
    let base = Net::<Plain>::new(&device::<Plain>());
    let untouched = base.forward(images());
    let model = base.attach(&config()).unwrap();
    let y = model.forward(images());
    assert_ne!(bits(y.clone()), bits(untouched.clone()));
    let again = base.switch(&model.adapters()).unwrap();
    assert_close(again.forward(images()), &as_matrix(y.clone()), 1e-5);
    assert_close(model.merge().unwrap().forward(images()), &as_matrix(y.clone()), 1e-5);
    assert_identical(model.detach().forward(images()), untouched);
    // The model knows what trains on this backend, too, and it trains on an autodiff backend.
    assert_eq!(model.parameters().trainable, model.adapters().num_params());
    let trained = train(model.train::<Train>());
    assert_ne!(bits(trained.head.weight.val()), bits(base.head.weight.val()));
    assert_identical(trained.stock.weight.val().inner(), base.stock.weight.val());
}

#[test]
fn switching_takes_the_head_of_the_set_before_off() {
    let base = Net::<Train>::new(&device::<Train>());
    let with_head = train(base.attach(&config()).unwrap());
    let without = LoraConfig::new(1, 1.0).with_targets(["maybe"]);
    let without = base.attach(&without).unwrap();
    let switched = with_head.switch(&without.adapters()).unwrap();
    assert_close(switched.forward(images()), &as_matrix(without.forward(images())), 1e-5);
    assert_identical(switched.head.weight.val(), base.head.weight.val());
    assert_eq!(switched.adapters().num_params(), 2 * 8);
    let back = switched.switch(&with_head.adapters()).unwrap();
    assert_close(back.forward(images()), &as_matrix(with_head.forward(images())), 1e-5);
}

#[test]
fn a_record_restores_adapters_and_the_freeze_in_any_base_of_the_same_shape() {
    let base = Net::<Train>::new(&device::<Train>());
    let model = train(base.attach(&config()).unwrap());
    let named = NamedMpkBytesRecorder::<FullPrecisionSettings>::new();
    let bytes = named.record(model.clone().into_record(), ()).unwrap();
    assert!(bytes.len() < 4 * model.adapters().num_params() + 6000, "{} bytes", bytes.len());

    // Like in another process, which has only the base.
    let restored =
        Lora::new(base.clone()).load_record(named.load(bytes.clone(), &device::<Train>()).unwrap());
    assert_identical(restored.forward(images()), model.forward(images()));
    assert_eq!(restored.parameters(), model.parameters());
    let grads = restored.forward(images()).sum().backward();
    assert_eq!(GradientsParams::from_grads(grads, &restored).len(), 2 * LAYERS.len() + 2);
    assert_identical(restored.detach().forward(images()), base.forward(images()));
    assert_eq!(restored.adapters().num_params(), model.adapters().num_params());

    // For inference, and in a format without names.
    let binary = BinBytesRecorder::<FullPrecisionSettings>::new();
    let bytes = binary.record(model.valid().into_record(), ()).unwrap();
    let record = binary.load(bytes, &device::<Plain>()).unwrap();
    let restored = Lora::new(base.valid()).load_record(record);
    assert_identical(restored.forward(images()), model.valid().forward(images()));
    assert_identical(restored.train::<Train>().head.weight.val(), model.head.weight.val());
}

#[test]
fn a_stock_module_as_target_is_refused_with_the_way_out() {
    let base = Net::<Plain>::new(&device::<Plain>());
    let error = base.attach(&LoraConfig::new(2, 1.0).with_targets(["head", "pair.1"])).unwrap_err();
    assert!(matches!(&error, LoraError::StockLayers { paths } if paths == &["pair.1", "head"]));
    assert!(error.to_string().contains("or adapt them as they are by `Lora::overlay`"), "{error}");
    let error = base.head.attach(&LoraConfig::new(2, 1.0)).unwrap_err();
    assert!(matches!(error, LoraError::StockLayers { .. }), "{error}");
    // The overlay accepts both kinds. It forms dense weights only for stock modules.
    let targets = ["head", "pair.1", "pair.0", "stem"];
    let config = config().with_modules_to_save(["stock"]).with_targets(targets);
    let model = Lora::overlay(base.clone()).attach(&config).unwrap();
    assert!(model.model().pair.0.adapter().is_some());
    let set = model.adapters();
    assert_eq!(set.len(), 4);
    let y = model.with_adapters(|net| net.forward(images()));
    assert_identical(model.with_adapters(|net| net.forward(images())), y.clone());
    let merged: Net<Plain> = model.merge().unwrap();
    assert_close(merged.forward(images()), &as_matrix(y), 1e-5);
    let error = base.switch(&set).unwrap_err().to_string();
    assert!(error.contains("unexpected: head (a stock module: see `Lora::overlay`)"), "{error}");
}

#[test]
fn names_of_a_users_own_are_not_mistaken_for_ours() {
    /// Has the name of a layer of this crate, but is none.
    #[derive(Module, Debug)]
    struct LoraLayer<B: Backend> {
        adapter: Linear<B>,
    }
    /// Has the name of Burn's layer, but its weight is a vector.
    mod own {
        #[derive(burn::module::Module, Debug)]
        pub struct Linear<B: burn::tensor::backend::Backend> {
            pub weight: burn::module::Param<burn::tensor::Tensor<B, 1>>,
        }
    }
    #[derive(Module, Debug)]
    struct Confusing<B: Backend> {
        layer: LoraLayer<B>,
        vector: own::Linear<B>,
        adapter: LoraLinear<B>,
    }
    let device = device::<Train>();
    let vector = Matrix::random(1, 4, 2).tensor::<Train, 1>([4], &device);
    let model = Confusing::<Train> {
        layer: LoraLayer { adapter: LinearConfig::new(3, 4).init(&device) },
        vector: own::Linear { weight: burn::module::Param::from_tensor(vector) },
        adapter: LinearConfig::new(4, 2).init(&device).into(),
    };
    let config = LoraConfig::new(1, 1.0).with_modules_to_save(["vector"]);
    let adapted = model.attach(&config).unwrap();
    let set = adapted.adapters();
    assert_eq!(set.iter().map(|(path, _)| path).collect::<Vec<_>>(), ["adapter"]);
    assert_eq!(set.num_params(), 4 + 2 + 4);
    let report = adapted.parameters();
    assert_eq!((report.trainable, report.total), (4 + 2 + 4, 3 * 4 + 4 + 4 + 4 * 2 + 2));
    let switched = model.switch(&set).unwrap();
    assert_identical(switched.vector.weight.val(), model.vector.weight.val());
}

#[test]
fn models_are_shared_between_threads() {
    let base = Net::<Plain>::new(&device::<Plain>());
    let model = std::sync::Arc::new(base.attach(&config()).unwrap());
    let expected = model.forward(images());
    let threads = [0, 1].map(|_| {
        let model = model.clone();
        std::thread::spawn(move || model.forward(images()))
    });
    for thread in threads {
        assert_identical(thread.join().unwrap(), expected.clone());
    }
}
