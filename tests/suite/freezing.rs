//! Frozen means frozen: after every structural trip, and every ordered pair of trips, the base gets
//! no gradient and keeps its bits through training, and every adapter learns.

use std::collections::BTreeMap;

use burn::{
    module::{AutodiffModule, Module, ModuleMapper, ModuleVisitor, Param},
    optim::{AdamWConfig, GradientsParams, Optimizer},
    record::{FullPrecisionSettings, NamedMpkBytesRecorder, Recorder},
    tensor::{Tensor, backend::Backend},
};
use burn_lora::{Init, LoraConfig, LoraModule};
use burn_store::{ModuleSnapshot, SafetensorsStore};

use crate::{
    model::{Mlp, Plain, Train, device},
    oracle::{Matrix, bits},
};

/// A model that trains, or one that only infers.
enum Model {
    Train(Mlp<Train>),
    Plain(Mlp<Plain>),
}

const TRIPS: [&str; 9] =
    ["clone", "valid", "train", "to_device", "fork", "map", "load_record", "record", "safetensors"];

impl Model {
    fn through(self, trip: &str) -> Self {
        match (trip, self) {
            ("valid", Self::Train(model)) => Self::Plain(model.valid()),
            ("train", Self::Plain(model)) => Self::Train(model.train::<Train>()),
            ("valid" | "train", model) => model,
            (trip, Self::Train(model)) => Self::Train(within(model, trip)),
            (trip, Self::Plain(model)) => Self::Plain(within(model, trip)),
        }
    }

    fn into_train(self) -> Mlp<Train> {
        match self.through("train") {
            Self::Train(model) => model,
            Self::Plain(_) => unreachable!("the trip ends on the autodiff backend"),
        }
    }
}

struct Identity;

impl<B: Backend> ModuleMapper<B> for Identity {}

fn within<B: Backend>(model: Mlp<B>, trip: &str) -> Mlp<B> {
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
            // Through bytes, into a model that has no adapters yet. Its norm is no LoRA layer: to
            // freeze that is Burn's business, and ours through `freeze`.
            let recorder = NamedMpkBytesRecorder::<FullPrecisionSettings>::new();
            let bytes = recorder.record(model.into_record(), ()).unwrap();
            let model = Mlp::new(&device).freeze(&[]).unwrap();
            model.load_record(recorder.load(bytes, &device).unwrap())
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
fn all_bits<B: Backend>(model: &Mlp<B>) -> BTreeMap<String, Vec<u32>> {
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

fn adapted(used_before: bool) -> Mlp<Train> {
    let model = Mlp::<Train>::new(&device::<Train>());
    if used_before {
        let _ = model.forward(input());
    }
    let config = LoraConfig::new(2, 3.0).with_bias(true).with_init(Init::RandomBoth);
    model.attach(&config).unwrap()
}

fn input() -> Tensor<Train, 2> {
    Matrix::random(10, 6, 5).tensor([10, 6], &device::<Train>())
}

/// Trains for 20 steps and fails unless exactly the adapters changed.
#[track_caller]
fn assert_only_adapters_train(mut model: Mlp<Train>, trip: &str) {
    let before = all_bits(&model);
    let adapters = before.keys().filter(|path| path.contains(".adapter.")).count();
    assert_eq!(adapters, 9, "three adapters of A, B and a bias, after {trip}");

    let mut optimizer = AdamWConfig::new().with_weight_decay(0.5).init::<Train, Mlp<Train>>();
    for _ in 0..20 {
        let grads = model.forward(input()).sin().sum().backward();
        assert!(model.blocks[0].base.weight.grad(&grads).is_none(), "dW after {trip}");
        let grads = GradientsParams::from_grads(grads, &model);
        assert_eq!(grads.len(), adapters, "gradients after {trip}");
        model = optimizer.step(0.01, model, grads);
    }
    assert_eq!(optimizer.to_record().len(), adapters, "optimizer state after {trip}");
    for (path, bits) in all_bits(&model) {
        let changed = bits != before[&path];
        assert_eq!(changed, path.contains(".adapter."), "{path} after {trip}");
    }
}

fn check_pairs(used_before: bool) {
    let model = adapted(used_before);
    let original = all_bits(&model);
    assert_only_adapters_train(model.clone(), "attach");
    for first in TRIPS {
        for second in TRIPS {
            let trip = format!("{first}, {second}");
            let there = Model::Train(model.clone()).through(first).through(second).into_train();
            assert_eq!(all_bits(&there), original, "values after {trip}");
            assert_only_adapters_train(there, &trip);
        }
    }
}

#[test]
fn every_pair_of_trips_before_first_use() {
    check_pairs(false);
}

#[test]
fn every_pair_of_trips_after_first_use() {
    check_pairs(true);
}

#[test]
fn trips_of_an_unused_model_before_it_is_adapted() {
    for trip in TRIPS {
        let model = Model::Train(Mlp::new(&device::<Train>())).through(trip).into_train();
        let config = LoraConfig::new(2, 3.0).with_bias(true).with_init(Init::RandomBoth);
        assert_only_adapters_train(model.attach(&config).unwrap(), trip);
    }
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
    let mut model = adapted(false);
    // Behind the layer's back, and through a mapper.
    model.head.base = model.head.base.map(&mut Unfreeze);
    let grads = model.forward(input()).sin().sum().backward();
    assert!(model.head.base.weight.grad(&grads).is_none());
    let model = Mlp { blocks: model.blocks.map(&mut Unfreeze), ..model };
    assert_only_adapters_train(model, "a mapper that marks everything");
}

#[test]
fn no_grad_stops_adapters_too() {
    let model = adapted(false).no_grad();
    let grads = model.forward(input().require_grad()).sin().sum().backward();
    assert_eq!(GradientsParams::from_grads(grads, &model).len(), 0);
}
