//! Backends whose numbers are not in `f32` unless something else is said: here in `f64`, on ndarray. Adapters and files
//! stay in `f32`.

use std::{env, process::Command};

use burn::{
    backend::{Autodiff, NdArray},
    module::{AutodiffModule, Module, Param},
    nn::{BatchNormConfig, LinearConfig, conv::Conv2dConfig},
    optim::{AdamConfig, GradientsParams, Optimizer},
    record::{DoublePrecisionSettings, NamedMpkBytesRecorder, Recorder},
    tensor::{DType, FloatDType, Tensor, TensorData, backend::Backend},
};
use burn_lora::{
    Init, Lora, LoraAdapters, LoraConfig, LoraLinear, LoraModule, Scaling,
    nn::{BatchNorm, LoraConv2d},
    quantize::Quantization,
    train::{Backward, ThreadReplica, Workers},
};

use crate::{
    model::layer,
    oracle::{Matrix, Problem, assert_close},
    peft::TempDir,
};

type Plain = NdArray<f64>;
type Train = Autodiff<Plain>;

#[derive(Module, Debug)]
struct Net<B: Backend> {
    conv: LoraConv2d<B>,
    norm: BatchNorm<B>,
    head: LoraLinear<B>,
}

impl<B: Backend> Net<B> {
    fn new() -> Self {
        let device = B::Device::default();
        let net = Self {
            conv: Conv2dConfig::new([2, 3], [2, 3]).init(&device).into(),
            norm: BatchNormConfig::new(3).init(&device).into(),
            head: LinearConfig::new(3 * 4 * 2, 5).init(&device).into(),
        };
        let _ = net.forward(net.input(1));
        net
    }

    fn input(&self, seed: u64) -> Tensor<B, 4> {
        let values = Matrix::random(3, 2 * 5 * 4, seed).data;
        Tensor::from_data(TensorData::new(values, [3, 2, 5, 4]), &B::Device::default())
    }

    fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 2> {
        self.head.forward(self.norm.forward(self.conv.forward(x)).tanh().flatten(1, 3))
    }
}

fn values<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Matrix {
    let data: Vec<f64> = tensor.into_data().convert::<f64>().to_vec().unwrap();
    Matrix { rows: 1, cols: data.len(), data }
}

/// The type that a device uses unless something else is said belongs to the whole process.
#[test]
fn a_backend_in_f64_works() {
    let tests = Command::new(env::current_exe().expect("the tests are a program"))
        .args(["--ignored", "element::"])
        .output()
        .expect("it can be started again");
    let output = String::from_utf8_lossy(&tests.stdout);
    assert!(tests.status.success() && output.contains("3 passed"), "{output}");
}

#[test]
#[ignore = "run by `a_backend_in_f64_works`"]
fn a_base_in_f64_is_computed_in_f64() {
    let problem = Problem {
        x: Matrix::random(4, 7, 1),
        w: Matrix::random(7, 5, 2),
        bias: Some(Matrix::random(1, 5, 3)),
        a: Matrix::random(7, 2, 4),
        b: Matrix::random(2, 5, 5),
        adapter_bias: None,
        scale: 1.5,
    };
    let mut layer: LoraLinear<Train> = layer(&problem, 3.0, Scaling::AlphaOverRank);
    layer.base.weight = layer.base.weight.map(|weight| weight.cast(FloatDType::F64));
    layer.base.bias = layer.base.bias.map(|bias| bias.map(|it| it.cast(FloatDType::F64)));
    let x = Tensor::<Train, 2>::from_data(
        TensorData::new(problem.x.data.clone(), [4, 7]),
        &Default::default(),
    )
    .require_grad();
    let y = layer.forward(x.clone());
    assert_eq!(y.dtype(), DType::F64);
    assert_close(y.clone(), &problem.output(), 1e-6);
    let grads = y.sin().sum().backward();
    let expected = problem.gradients();
    let adapter = layer.adapter().unwrap();
    assert_close(x.grad(&grads).unwrap(), &expected.x, 1e-6);
    assert_close(adapter.a.val().grad(&grads).unwrap(), &expected.a, 1e-6);
    assert_close(adapter.b.val().grad(&grads).unwrap(), &expected.b, 1e-6);
}

#[test]
#[ignore = "run by `a_backend_in_f64_works`"]
fn a_model_in_f64_trains_and_makes_all_trips() {
    let base = Net::<Train>::new();
    let before = values(base.valid().forward(base.valid().input(9)));
    let config = LoraConfig::new(2, 3.0).with_init(Init::RandomBoth).with_modules_to_save(["norm"]);
    let mut model = base.attach(&config).unwrap();
    let mut optimizer = AdamConfig::new().init::<Train, Lora<Train, Net<Train>>>();
    let workers = Workers::new(2);
    for seed in 0..3 {
        let parts = vec![model.input(seed), model.input(seed + 10)];
        let step = workers.backward(&model, parts, |model: &Lora<_, Net<_>>, part| {
            Backward::new(model, model.forward(part).sin().sum())
        });
        model = optimizer.step(0.02, model, step.gradients);
    }
    let y = |model: &Lora<Train, Net<Train>>| {
        let model = model.valid();
        values(model.forward(model.input(9)))
    };
    let expected = y(&model);
    let valid = model.valid();
    assert_eq!(valid.forward(valid.input(0)).dtype(), DType::F64);
    assert_ne!(expected, before);
    let same = |found: Matrix, tolerance: f64| {
        let found = Tensor::<Plain, 1>::from_data(&*found.data, &Default::default());
        assert_close(found, &expected, tolerance);
    };

    let dir = TempDir::new("element");
    model.adapters().save(dir.0.join("set")).unwrap();
    let set = LoraAdapters::load(dir.0.join("set"), &Default::default()).unwrap();
    same(y(&base.switch(&set).unwrap()), 1e-6);
    let recorder = NamedMpkBytesRecorder::<DoublePrecisionSettings>::new();
    let bytes = recorder.record(model.clone().into_record(), ()).unwrap();
    let record = recorder.load(bytes, &Default::default()).unwrap();
    same(y(&Lora::new(base.clone()).load_record(record)), 1e-12);
    let merged = model.merge().unwrap().valid();
    same(values(merged.forward(merged.input(9))), 1e-6);
    let (quantized, _) = model.quantize(Quantization::Int8).unwrap();
    same(y(&quantized), 0.1);
    let detached: Net<Train> = model.detach();
    assert_eq!(values(detached.valid().forward(detached.valid().input(9))), before);
}

#[test]
#[ignore = "run by `a_backend_in_f64_works`"]
fn gradients_in_f64_are_added_up_by_replicas() {
    let base = Net::<Train>::new();
    let model = base.attach(&LoraConfig::new(2, 3.0).with_init(Init::RandomBoth)).unwrap();
    let gradient = |model: &Lora<Train, Net<Train>>, gradients: &GradientsParams| {
        let a: &Param<Tensor<Train, 2>> = &model.head.adapter().unwrap().a;
        values(gradients.get::<Plain, 2>(a.id).unwrap())
    };
    let pass = |model: &Lora<Train, Net<Train>>, seed| {
        Backward::new(model, model.forward(model.input(seed)).sin().sum())
    };
    let parts = (0..2).map(|seed| pass(&model, seed));
    let expected = gradient(&model, &Backward::sum(&model, parts).gradients);
    let sums = ThreadReplica::run(2, |replica| {
        use burn_lora::train::Replicas;
        let model = model.clone().fork(&Default::default());
        let step = pass(&model, replica.index() as u64).all_reduce(&model, &replica);
        gradient(&model, &step.gradients)
    });
    for sum in sums {
        let sum = Tensor::<Plain, 1>::from_data(&*sum.data, &Default::default());
        assert_close(sum, &expected, 1e-6);
    }
}
