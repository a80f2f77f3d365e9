//! Frozen parameters stay frozen: after each conversion of a model, and each ordered pair of conversions,
//! training leaves every bit of the base as it was, the base gets no gradient, and every adapter learns.

use std::collections::BTreeMap;

use burn::{
    module::{AutodiffModule, Module, ModuleMapper, ModuleVisitor, Param},
    nn::{
        EmbeddingConfig,
        attention::MultiHeadAttentionConfig,
        conv::{Conv1dConfig, Conv2dConfig, ConvTranspose2dConfig},
        gru::{Gru, GruConfig},
    },
    optim::{AdamWConfig, GradientsParams, Optimizer},
    record::{FullPrecisionSettings, NamedMpkBytesRecorder, Recorder},
    tensor::{Tensor, backend::Backend},
};
use burn_lora::{
    Init, Lora, LoraConfig, LoraModule,
    nn::{
        LoraConv1d, LoraConv2d, LoraConvTranspose2d, LoraEmbedding, LoraMhaInput,
        LoraMultiHeadAttention,
    },
    overlay::Overlay,
    quantize::Quantization,
};
use burn_store::{ModuleSnapshot, SafetensorsStore};

use crate::{
    model::{Mlp, Plain, Train, device, filled},
    oracle::{Matrix, bits},
};

/// A kind of model, on any backend.
trait Family {
    type Model<B: Backend>: Module<B>;

    /// The number of tensors in the adapters of `config`.
    const ADAPTERS: usize;

    /// The same model each time, because records do not hold the base.
    fn new<B: Backend>(device: &B::Device) -> Self::Model<B>;

    fn config() -> LoraConfig;

    fn loss<B: Backend>(model: &Self::Model<B>) -> Tensor<B, 1>;
}

struct Mlps;

impl Family for Mlps {
    type Model<B: Backend> = Mlp<B>;

    // A, B and a bias, for three layers.
    const ADAPTERS: usize = 9;

    fn new<B: Backend>(device: &B::Device) -> Mlp<B> {
        filled(Mlp::new(device))
    }

    fn config() -> LoraConfig {
        LoraConfig::new(2, 3.0).with_bias(true).with_init(Init::RandomBoth)
    }

    fn loss<B: Backend>(model: &Mlp<B>) -> Tensor<B, 1> {
        model.forward(Matrix::random(10, 6, 5).tensor([10, 6], &device::<B>())).sin().sum()
    }
}

/// The same on a base in 4 bits.
struct Quantized;

impl Family for Quantized {
    type Model<B: Backend> = Mlp<B>;

    const ADAPTERS: usize = Mlps::ADAPTERS;

    fn new<B: Backend>(device: &B::Device) -> Mlp<B> {
        Mlps::new::<B>(device).quantize(Quantization::Nf4).unwrap().0
    }

    fn config() -> LoraConfig {
        Mlps::config()
    }

    fn loss<B: Backend>(model: &Mlp<B>) -> Tensor<B, 1> {
        Mlps::loss(model)
    }
}

/// All other kinds of layers, and an overlay.
#[derive(Module, Debug)]
struct Zoo<B: Backend> {
    table: LoraEmbedding<B>,
    attention: LoraMultiHeadAttention<B>,
    line: LoraConv1d<B>,
    square: LoraConv2d<B>,
    up: LoraConvTranspose2d<B>,
    overlay: Lora<B, Overlay<B, Gru<B>>>,
}

struct Zoos;

impl Family for Zoos {
    type Model<B: Backend> = Zoo<B>;

    // A and B of the table, four projections, three convolutions and six matrices in the overlay.
    const ADAPTERS: usize = 2 * (1 + 4 + 3 + 6);

    fn new<B: Backend>(device: &B::Device) -> Zoo<B> {
        let attention = MultiHeadAttentionConfig::new(4, 2).with_dropout(0.0).init(device);
        let zoo = Zoo {
            table: EmbeddingConfig::new(5, 4).init(device).into(),
            attention: attention.into(),
            line: Conv1dConfig::new(4, 4, 2).init(device).into(),
            square: Conv2dConfig::new([1, 2], [2, 2]).init(device).into(),
            up: ConvTranspose2dConfig::new([2, 1], [2, 2]).init(device).into(),
            overlay: Lora::overlay(GruConfig::new(4, 3, true).init(device)),
        };
        filled(zoo)
    }

    fn config() -> LoraConfig {
        LoraConfig::new(2, 0.5).with_init(Init::RandomBoth)
    }

    fn loss<B: Backend>(model: &Zoo<B>) -> Tensor<B, 1> {
        let x = model.table.forward(Tensor::from_data([[3, 1, 4], [1, 0, 2]], &device::<B>()));
        let x = model.attention.forward(LoraMhaInput::self_attn(x)).context;
        let rows = model.overlay.with_adapters(|gru| gru.forward(x.clone(), None));
        let image = model.line.forward(x.swap_dims(1, 2)).unsqueeze_dim::<4>(1);
        let image = model.up.forward(model.square.forward(image));
        rows.sin().sum() + image.sin().sum()
    }
}

/// The same with magnitudes, on adapters that start as a part of the weight.
struct Doras;

impl Family for Doras {
    type Model<B: Backend> = Zoo<B>;

    const ADAPTERS: usize = 3 * (1 + 4 + 3 + 6);

    fn new<B: Backend>(device: &B::Device) -> Zoo<B> {
        Zoos::new::<B>(device)
    }

    fn config() -> LoraConfig {
        LoraConfig::new(1, 0.5).with_init(Init::Olora).with_dora(true)
    }

    fn loss<B: Backend>(model: &Zoo<B>) -> Tensor<B, 1> {
        Zoos::loss(model)
    }
}

/// Linear layers of which only B trains.
struct HalfFrozen;

impl Family for HalfFrozen {
    type Model<B: Backend> = Mlp<B>;

    const ADAPTERS: usize = 3;

    fn new<B: Backend>(device: &B::Device) -> Mlp<B> {
        Mlps::new::<B>(device)
    }

    fn config() -> LoraConfig {
        LoraConfig::new(2, 3.0).with_freeze_a(true)
    }

    fn loss<B: Backend>(model: &Mlp<B>) -> Tensor<B, 1> {
        Mlps::loss(model)
    }
}

/// An adapted model of the family.
type Adapted<F, B> = Lora<B, <F as Family>::Model<B>>;

/// A model for training, or one for inference.
enum Model<F: Family> {
    Train(Adapted<F, Train>),
    Plain(Adapted<F, Plain>),
}

const TRIPS: [&str; 9] =
    ["clone", "valid", "train", "to_device", "fork", "map", "load_record", "record", "safetensors"];

/// A family whose models can be converted between training and inference.
trait Travels: Family<Model<Train>: AutodiffModule<Train, InnerModule = Self::Model<Plain>>> {}

impl<F: Family<Model<Train>: AutodiffModule<Train, InnerModule = F::Model<Plain>>>> Travels for F {}

impl<F: Travels> Model<F> {
    fn through(self, trip: &str) -> Self {
        match (trip, self) {
            ("valid", Self::Train(model)) => Self::Plain(model.valid()),
            ("train", Self::Plain(model)) => Self::Train(AutodiffModule::from_inner(model)),
            ("valid" | "train", model) => model,
            (trip, Self::Train(model)) => Self::Train(within::<F, Train>(model, trip)),
            (trip, Self::Plain(model)) => Self::Plain(within::<F, Plain>(model, trip)),
        }
    }

    fn into_train(self) -> Adapted<F, Train> {
        match self.through("train") {
            Self::Train(model) => model,
            Self::Plain(_) => unreachable!("the trip ends on the autodiff backend"),
        }
    }
}

struct Identity;

impl<B: Backend> ModuleMapper<B> for Identity {}

fn within<F: Family, B: Backend>(model: Adapted<F, B>, trip: &str) -> Adapted<F, B> {
    let device = device::<B>();
    match trip {
        "clone" => model.clone(),
        "to_device" => model.to_device(&device),
        "fork" => model.fork(&device),
        "map" => model.map(&mut Identity),
        "load_record" => {
            let record = model.clone().into_record();
            model.load_record(record)
        }
        "record" => {
            // Saves to bytes, and loads into a base without adapters.
            let recorder = NamedMpkBytesRecorder::<FullPrecisionSettings>::new();
            let bytes = recorder.record(model.into_record(), ()).unwrap();
            let base = Lora::new(F::new::<B>(&device));
            base.load_record(recorder.load(bytes, &device).unwrap())
        }
        "safetensors" => {
            let mut store = SafetensorsStore::from_bytes(None);
            model.save_into(&mut store).unwrap();
            let mut store = SafetensorsStore::from_bytes(Some(store.get_bytes().unwrap()));
            let mut model = model;
            model.load_from(&mut store).unwrap();
            model
        }
        trip => unreachable!("{trip}"),
    }
}

/// The bits of every parameter, by path.
fn all_bits<B: Backend>(model: &impl Module<B>) -> BTreeMap<String, Vec<u32>> {
    struct Reader(Vec<String>, BTreeMap<String, Vec<u32>>);
    impl<B: Backend> ModuleVisitor<B> for Reader {
        fn enter_module(&mut self, name: &str, _container: &str) {
            self.0.push(name.to_owned());
        }
        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.0.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            self.1.insert(self.0.join("."), bits(param.val()));
        }
    }
    let mut reader = Reader(Vec::new(), BTreeMap::new());
    model.visit(&mut reader);
    reader.1
}

fn adapted(used_before: bool) -> Lora<Train, Mlp<Train>> {
    let model = Mlps::new::<Train>(&device::<Train>());
    if used_before {
        let _ = model.forward(input());
    }
    model.attach(&Mlps::config()).unwrap()
}

fn input() -> Tensor<Train, 2> {
    Matrix::random(10, 6, 5).tensor([10, 6], &device::<Train>())
}

/// The steps after each trip. In the second one the optimizer has a state.
const STEPS: usize = 2;

/// Trains for some steps and fails unless exactly the adapters changed.
#[track_caller]
fn assert_only_adapters_train<F: Travels>(mut model: Adapted<F, Train>, steps: usize, trip: &str) {
    let before = all_bits::<Train>(&model);
    let freezes_a = F::config().freeze_a;
    let is_trained =
        |path: &str| path.contains(".adapter.") && !(freezes_a && path.ends_with(".adapter.a"));
    let adapters = before.keys().filter(|path| is_trained(path)).count();
    assert_eq!(adapters, F::ADAPTERS, "adapters after {trip}");

    let mut optimizer =
        AdamWConfig::new().with_weight_decay(0.5).init::<Train, Adapted<F, Train>>();
    for _ in 0..steps {
        let grads = GradientsParams::from_grads(F::loss(&*model).backward(), &model);
        assert_eq!(grads.len(), adapters, "gradients after {trip}");
        model = optimizer.step(0.01, model, grads);
    }
    assert_eq!(optimizer.to_record().len(), adapters, "optimizer state after {trip}");
    for (path, bits) in all_bits::<Train>(&model) {
        let changed = bits != before[&path];
        assert_eq!(changed, is_trained(&path), "{path} after {trip}");
    }
}

/// Checks `all` pairs of trips, or each trip with the next one.
fn check_pairs<F: Travels>(model: Adapted<F, Train>, all: bool) {
    let original = all_bits::<Train>(&model);
    assert_only_adapters_train::<F>(model.clone(), 20, "attach");
    for (place, first) in TRIPS.into_iter().enumerate() {
        for (other, second) in TRIPS.into_iter().enumerate() {
            if !all && other != (place + 1) % TRIPS.len() {
                continue;
            }
            let trip = format!("{first}, {second}");
            let there = Model::<F>::Train(model.clone()).through(first).through(second);
            let there = there.into_train();
            assert_eq!(all_bits::<Train>(&there), original, "values after {trip}");
            assert_only_adapters_train::<F>(there, STEPS, &trip);
        }
    }
}

#[test]
fn every_pair_of_trips_before_first_use() {
    check_pairs::<Mlps>(adapted(false), true);
}

#[test]
fn every_pair_of_trips_after_first_use() {
    check_pairs::<Mlps>(adapted(true), true);
}

#[test]
fn every_pair_of_trips_of_every_layer() {
    let zoo = Zoos::new::<Train>(&device::<Train>()).attach(&Zoos::config()).unwrap();
    // All of them take minutes on a software GPU, and a trip is the same code on each backend.
    check_pairs::<Zoos>(zoo, !cfg!(feature = "wgpu"));
}

#[test]
fn every_trip_on_a_quantized_base() {
    let model = Quantized::new::<Train>(&device::<Train>()).attach(&Quantized::config()).unwrap();
    let base = |model: &Adapted<Quantized, Train>| {
        let layers = model.blocks.iter().map(|it| bits(it.quantized().unwrap().dense().inner()));
        layers.collect::<Vec<_>>()
    };
    for trip in TRIPS {
        let there = Model::<Quantized>::Train(model.clone()).through(trip).into_train();
        assert_eq!(base(&there), base(&model), "{trip}");
        assert_only_adapters_train::<Quantized>(there, 1, trip);
    }
}

#[test]
fn every_trip_of_the_relatives_of_lora() {
    fn check<F: Travels>() {
        let model = F::new::<Train>(&device::<Train>()).attach(&F::config()).unwrap();
        // Other values than the initial ones, so that what the adapters started as matters.
        let grads = GradientsParams::from_grads(F::loss(&*model).backward(), &model);
        let model = AdamWConfig::new().init().step(0.1, model, grads);
        let loss = |model: &Adapted<F, Train>| bits(F::loss(&**model).inner());
        for trip in TRIPS {
            let there = Model::<F>::Train(model.clone()).through(trip).into_train();
            assert_eq!(loss(&there), loss(&model), "{trip}");
            assert_only_adapters_train::<F>(there, 1, trip);
        }
    }
    check::<Doras>();
    check::<HalfFrozen>();
}

#[test]
fn trips_of_an_unused_model_before_it_is_adapted() {
    fn check<F: Travels>() {
        for trip in TRIPS {
            let base = Lora::new(F::new(&device::<Train>()));
            let model = Model::<F>::Train(base).through(trip).into_train();
            let model = model.attach(&F::config()).unwrap();
            assert_only_adapters_train::<F>(model, STEPS, trip);
        }
    }
    check::<Mlps>();
    check::<Zoos>();
}

#[test]
fn without_adapters_everything_trains() {
    let model = Mlp::<Train>::new(&device::<Train>());
    let grads = model.forward(input()).sin().sum().backward();
    assert_eq!(GradientsParams::from_grads(grads, &model).len(), 7);
}

#[test]
fn a_base_marked_as_trainable_still_gets_no_gradient() {
    struct Unfreeze;
    impl<B: Backend> ModuleMapper<B> for Unfreeze {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
            param.map(|tensor| tensor.detach().set_require_grad(true))
        }
    }
    let mut model = adapted(false).into_inner();
    // On the layer's field directly, and with a mapper.
    model.head.base = model.head.base.map(&mut Unfreeze);
    let grads = model.forward(input()).sin().sum().backward();
    assert!(model.head.base.weight.grad(&grads).is_none());
    let model = Mlp { blocks: model.blocks.map(&mut Unfreeze), ..model };
    assert_only_adapters_train::<Mlps>(Lora::new(model), 20, "a mapper that marks everything");
}

#[test]
fn no_grad_stops_adapters_too() {
    let model = adapted(false).no_grad();
    let grads = model.forward(input().require_grad()).sin().sum().backward();
    assert_eq!(GradientsParams::from_grads(grads, &model).len(), 0);
}

#[test]
fn what_a_mapper_marks_trains_and_is_part_of_what_was_trained() {
    struct Mark;
    impl ModuleMapper<Train> for Mark {
        fn map_float<const D: usize>(
            &mut self,
            param: Param<Tensor<Train, D>>,
        ) -> Param<Tensor<Train, D>> {
            let is_norm = param.dims() == [7; D] && param.is_require_grad() == (D == 2);
            param.map(|it| if is_norm { it.detach().set_require_grad(true) } else { it })
        }
    }
    let base = Mlps::new::<Train>(&device::<Train>());
    let model = base.attach(&Mlps::config().with_bias(false)).unwrap().map(&mut Mark);
    let mut model = model.valid().clone().train::<Train>();
    let mut optimizer = AdamWConfig::new().init();
    let grads = model.forward(input()).sin().sum().backward();
    model = optimizer.step(0.1, model.clone(), GradientsParams::from_grads(grads, &model));
    assert_ne!(bits(model.norm.gamma.val()), bits(base.norm.gamma.val()));
    let set = model.adapters();
    assert_eq!(bits(base.switch(&set).unwrap().norm.gamma.val()), bits(model.norm.gamma.val()));
    assert_eq!(bits(model.detach().norm.gamma.val()), bits(base.norm.gamma.val()));
}
