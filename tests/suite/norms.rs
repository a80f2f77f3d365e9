//! Batch norms next to adapters: a base stays what it is, and what moved is saved.

use std::{fs, path::Path};

use burn::{
    module::{AutodiffModule, Module, Param, RunningState},
    nn::{self, BatchNormConfig, LinearConfig},
    optim::{GradientsParams, Optimizer, SgdConfig},
    record::{FullPrecisionSettings, NamedMpkBytesRecorder, Recorder},
    tensor::{Tensor, backend::Backend},
};
use burn_lora::{
    Init, Lora, LoraAdapters, LoraConfig, LoraError, LoraLinear, LoraModule,
    nn::BatchNorm,
    overlay::Overlay,
    quantize::Quantization,
    train::{Backward, Blocks, Workers, fingerprint, segments},
};
use safetensors::SafeTensors;

use crate::{
    model::{Plain, Train, device},
    oracle::{Matrix, assert_close, assert_identical, bits},
    peft::TempDir,
};

/// A model with one kind of norm.
macro_rules! net {
    ($Net:ident, $BatchNorm:path) => {
        #[derive(Module, Debug)]
        struct $Net<B: Backend> {
            fc: LoraLinear<B>,
            norm: $BatchNorm,
            head: LoraLinear<B>,
        }

        impl<B: Backend> $Net<B> {
            fn new() -> Self {
                let device = device::<B>();
                let linear = |inputs, outputs, seed| {
                    let mut linear = LinearConfig::new(inputs, outputs).init(&device);
                    let weight = Matrix::random(inputs, outputs, seed);
                    let bias = Matrix::random(1, outputs, seed + 2);
                    linear.weight = Param::from_tensor(weight.tensor([inputs, outputs], &device));
                    linear.bias = Some(Param::from_tensor(bias.tensor([outputs], &device)));
                    linear.into()
                };
                Self {
                    fc: linear(3, 4, 1),
                    norm: BatchNormConfig::new(4).init(&device).into(),
                    head: linear(4, 2, 2),
                }
            }

            fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
                self.head.forward(self.norm.forward(self.fc.forward(x)).tanh())
            }
        }
    };
}

net!(Stock, nn::BatchNorm<B>);
net!(Own, BatchNorm<B>);

fn input<B: Backend>(seed: u64) -> Tensor<B, 2> {
    // Far from the mean and the variance of a new norm.
    Matrix::random(6, 3, seed).scaled(3.0).tensor([6, 3], &device::<B>()) + 2.0
}

fn config() -> LoraConfig {
    LoraConfig::new(2, 3.0).with_init(Init::RandomBoth).with_seed(3)
}

/// Some steps of SGD.
fn train<M: AutodiffModule<Train>>(
    mut model: M,
    pass: impl Fn(&M, Tensor<Train, 2>) -> Tensor<Train, 2>,
) -> M {
    let mut optimizer = SgdConfig::new().init::<Train, M>();
    for seed in 0..5 {
        let grads = pass(&model, input(seed)).sin().sum().backward();
        let grads = GradientsParams::from_grads(grads, &model);
        model = optimizer.step(0.05, model, grads);
    }
    model
}

fn moments(norm: &BatchNorm<Train>) -> Vec<u32> {
    [norm.running_mean(), norm.running_var()].map(bits).concat()
}

/// What a model for inference gives.
fn evaluated(model: &Stock<Train>) -> Vec<u32> {
    bits(model.valid().forward(input(9)))
}

#[test]
fn b1_a_base_with_this_crates_norm_stays_to_the_bit() {
    let base = Own::<Train>::new();
    let output = || bits(base.valid().forward(input(9)));
    let before = output();
    let both = config().with_modules_to_save(["norm"]);

    for config in [config(), both] {
        let model = base.attach(&config).unwrap();
        let _ = model.forward(input(0));
        assert_eq!(output(), before, "a pass");
        let _ = model.clone().fork(&device::<Train>()).forward(input(0));
        assert_eq!(output(), before, "a fork");
        let config = LoraConfig { init: Init::Gaussian, ..config };
        let _ = base.attach_eva(&config, 1.0, |it| drop(it.forward(input(1)))).unwrap();
        assert_eq!(output(), before, "EVA");

        let one = train(model, |model, x| model.forward(x));
        let other = base.attach(&config.with_seed(5)).unwrap();
        let other_before = bits(other.valid().forward(input(9)));
        let one = one.switch(&one.adapters()).unwrap();
        let _ = one.forward(input(2));
        assert_eq!(output(), before, "the base");
        assert_eq!(bits(one.detach::<Own<Train>>().valid().forward(input(9))), before, "detach");
        assert_eq!(bits(other.valid().forward(input(9))), other_before, "another set");
        assert_eq!(output(), before, "the base");
    }
}

#[test]
fn b1_norms_of_burns_are_refused_by_name() {
    let base = Stock::<Train>::new();
    let set = base.with_own_statistics().attach(&config()).unwrap().adapters();
    let record = base.with_own_statistics().attach(&config()).unwrap().into_record();
    let before = evaluated(&base);
    let refused = |result: Result<(), LoraError>| {
        let error = result.unwrap_err();
        let LoraError::SharedStatistics { paths } = &error else { panic!("{error}") };
        assert_eq!(paths, &["norm"]);
        for remedy in ["nn::BatchNorm", "with_own_statistics"] {
            assert!(error.to_string().contains(remedy), "{error}");
        }
    };
    let drawn = LoraConfig::new(2, 3.0);
    refused(base.attach(&config()).map(drop));
    refused(base.attach_eva(&drawn, 1.0, |it| drop(it.forward(input(0)))).map(drop));
    refused(base.attach_loftq(Quantization::Int8, &drawn, 1).map(drop));
    refused(base.switch(&set).map(drop));
    refused(base.train_only(&["head"]).map(drop));
    refused(Lora::new(base.clone()).try_load_record(record).map(drop));
    refused(Lora::overlay(base.clone()).attach(&config()).map(drop));
    assert_eq!(evaluated(&base), before);

    // Without autodiff nothing moves; but statistics that moved would be those of all clones.
    let plain = Stock::<Plain>::new();
    assert!(plain.attach(&config()).is_ok());
    assert!(plain.switch(&set_of_plain(&set)).is_ok());
    let moved = train(base.with_own_statistics().attach(&config()).unwrap(), |it, x| it.forward(x));
    refused(plain.switch(&set_of_plain(&moved.adapters())).map(drop));
}

/// The same set without autodiff, by way of its file.
fn set_of_plain(set: &LoraAdapters<Train>) -> LoraAdapters<Plain> {
    let (config, weights) = set.to_bytes().unwrap();
    LoraAdapters::from_bytes(&config, &weights, &device::<Plain>()).unwrap()
}

#[test]
fn b1_statistics_of_its_own_leave_the_base_as_it_was() {
    let base = Stock::<Train>::new();
    let before = evaluated(&base);
    let blank = base.with_own_statistics();
    let one = train(blank.attach(&config()).unwrap(), |model, x| model.forward(x));
    let moved = bits(one.valid().forward(input(9)));
    assert_ne!(bits(one.norm.running_mean.value_sync()), bits(base.norm.running_mean.value()));

    // Whatever becomes of the other, each keeps its own.
    let two = train(blank.attach(&config().with_seed(5)).unwrap(), |model, x| model.forward(x));
    let _ = one.attach_eva(&LoraConfig::new(1, 1.0).with_targets(["none"]), 1.0, |_| ());
    let detached: Stock<Train> = two.detach();
    assert_eq!(evaluated(&detached), before);
    let _ = detached.forward(input(3));
    let switched = two.switch(&one.adapters()).unwrap();
    assert_eq!(bits(switched.valid().forward(input(9))), moved);
    let _ = switched.forward(input(4));
    let merged: Stock<Train> = one.merge().unwrap();
    let _ = merged.forward(input(5));
    let none = switched.train_only(&["head"]).unwrap();
    let _ = none.forward(input(6));

    assert_eq!(evaluated(&base), before);
    assert_eq!(bits(one.valid().forward(input(9))), moved);
    // Without autodiff, too.
    let valid = one.valid();
    assert_eq!(bits(valid.detach::<Stock<Plain>>().forward(input(9))), before);
    assert_eq!(bits(valid.forward(input(9))), moved);
}

/// The model's file of adapters.
fn saved(set: &LoraAdapters<Train>, dir: &Path) -> LoraAdapters<Train> {
    set.save(dir).unwrap();
    LoraAdapters::load(dir, &device::<Train>()).unwrap()
}

/// Saves and restores a model in all ways, and compares what the results give.
macro_rules! assert_kept {
    ($Net:ident, $name:expr, $model:expr, $blank:expr) => {{
        let (model, blank) = ($model, $blank);
        let y = bits(model.valid().forward(input(9)));
        let dir = TempDir::new(&format!("norms-{}", $name));
        let set = saved(&model.adapters(), &dir.0.join("set"));
        let from_file = blank.switch(&set).unwrap();
        assert_eq!(bits(from_file.valid().forward(input(9))), y, "files");

        let recorder = NamedMpkBytesRecorder::<FullPrecisionSettings>::new();
        let bytes = recorder.record(model.clone().into_record(), ()).unwrap();
        let record = recorder.load(bytes, &device::<Train>()).unwrap();
        let from_record = blank.clone().load_record(record);
        assert_eq!(bits(from_record.valid().forward(input(9))), y, "record");

        let merged = |model: &Lora<Train, $Net<Train>>| {
            let merged: $Net<Train> = model.merge().unwrap();
            bits(merged.valid().forward(input(9)))
        };
        let expected = model.valid().forward(input(9)).into_data().to_vec::<f32>().unwrap();
        let data = expected.into_iter().map(f64::from).collect();
        let plain: $Net<Train> = model.merge().unwrap();
        assert_close(plain.valid().forward(input(9)), &Matrix { rows: 6, cols: 2, data }, 1e-5);
        assert_eq!(merged(&from_file), merged(&model));
        assert_eq!(merged(&from_record), merged(&model));
        fs::read(dir.0.join("set/adapter_model.safetensors")).unwrap()
    }};
}

#[test]
fn b2_statistics_that_moved_are_saved_and_restored() {
    // The names and the values that PEFT writes for a norm in `modules_to_save`.
    let check = |file: &[u8], mean: Tensor<Train, 1>| {
        let tensors = SafeTensors::deserialize(file).unwrap();
        for name in ["weight", "bias", "running_mean", "running_var"] {
            assert_eq!(
                tensors.tensor(&format!("base_model.model.norm.{name}")).unwrap().shape(),
                [4]
            );
        }
        let name = "base_model.model.norm.running_mean";
        let values: Vec<u32> = tensors
            .tensor(name)
            .unwrap()
            .data()
            .chunks(4)
            .map(|it| u32::from_le_bytes(it.try_into().unwrap()))
            .collect();
        assert_eq!(values, bits(mean));
    };
    let blank = Stock::<Train>::new().with_own_statistics();
    let model = train(blank.attach(&config()).unwrap(), |model, x| model.forward(x));
    let file = assert_kept!(Stock, "stock", &model, blank);
    check(&file, model.norm.running_mean.value_sync());

    let blank = Lora::new(Own::<Train>::new());
    for saved in ["norm", "norm.gamma", "no.m"] {
        let config = config().with_modules_to_save([saved]);
        let model = train(blank.attach(&config).unwrap(), |model, x| model.forward(x));
        assert_ne!(moments(&model.norm), moments(&blank.norm));
        let file = assert_kept!(Own, saved, &model, blank.clone());
        if saved != "norm.gamma" {
            check(&file, model.norm.running_mean());
        }
    }

    // Those that did not move are the base's, and in no file.
    let model = train(blank.attach(&config()).unwrap(), |model, x| model.forward(x));
    assert_eq!(moments(&model.norm), moments(&blank.norm));
    let file = assert_kept!(Own, "frozen", &model, blank);
    assert_eq!(SafeTensors::deserialize(&file).unwrap().len(), 4);
}

/// The formula of a batch norm, with the moments given or with the batch's.
fn normalized(
    x: &Matrix,
    moments: Option<(&[f64], &[f64])>,
    gamma: &[f64],
    beta: &[f64],
) -> Matrix {
    let rows = x.rows as f64;
    let mean = |col: usize| (0..x.rows).map(|row| x.at(row, col)).sum::<f64>() / rows;
    Matrix::from_fn(x.rows, x.cols, |row, col| {
        let (mean, var) = match moments {
            Some((mean, var)) => (mean[col], var[col]),
            None => {
                let mean = mean(col);
                (mean, (0..x.rows).map(|row| (x.at(row, col) - mean).powi(2)).sum::<f64>() / rows)
            }
        };
        (x.at(row, col) - mean) / (var + 1e-5).sqrt() * gamma[col] + beta[col]
    })
}

/// A norm with moments, factors and biases of its own, and these.
fn norm<B: Backend>() -> (BatchNorm<B>, [Vec<f64>; 4]) {
    let device = device::<B>();
    let values: [Vec<f64>; 4] =
        [vec![0.5, -1.5, 2.0], vec![0.25, 4.0, 1.5], vec![1.5, -0.5, 2.0], vec![-0.25, 0.75, 1.0]];
    let tensor = |values: &[f64]| Tensor::<B, 1>::from_floats(values, &device);
    let param = |values: &[f64]| Param::from_tensor(tensor(values));
    let [mean, var, gamma, beta] = &values;
    let stock = nn::BatchNorm {
        gamma: param(gamma),
        beta: param(beta),
        running_mean: RunningState::new(tensor(mean)),
        running_var: RunningState::new(tensor(var)),
        momentum: 0.1,
        epsilon: 1e-5,
    };
    (stock.into(), values)
}

#[test]
fn b3_a_frozen_norm_normalizes_by_the_bases_statistics() {
    let x = Matrix::random(10, 3, 4).scaled(2.0);
    let (own, [mean, var, gamma, beta]) = norm::<Train>();
    let expected = normalized(&x, Some((&mean, &var)), &gamma, &beta);
    let frozen = own.clone().no_grad();
    let before = moments(&frozen);
    let tensor = || x.tensor::<Train, 2>([10, 3], &device::<Train>());
    assert_close(frozen.forward(tensor()), &expected, 1e-5);
    assert_identical(frozen.valid().forward(tensor().inner()), frozen.forward(tensor()));
    // Images, `[batch, channels, height, width]`, whose channels come second.
    let images = tensor().reshape([5, 2, 1, 3]).permute([0, 3, 1, 2]);
    let y = frozen.forward(images).permute([0, 2, 3, 1]).reshape([10, 3]);
    assert_close(y, &expected, 1e-5);
    assert_eq!(moments(&frozen), before);

    // While it trains, it is Burn's.
    let expected = normalized(&x, None, &gamma, &beta);
    assert_close(own.forward(tensor()), &expected, 1e-4);
    let batch = x.sum_rows().scaled(0.1);
    let moved: Vec<f64> = (0..3).map(|col| 0.9 * mean[col] + 0.1 * batch.at(0, col)).collect();
    let moved = Matrix { rows: 1, cols: 3, data: moved };
    assert_close(own.running_mean().unsqueeze::<2>(), &moved, 1e-5);
}

#[test]
fn b3_gradients_reach_the_input_of_a_frozen_norm() {
    let (own, [_, var, gamma, _]) = norm::<Train>();
    let x = Matrix::random(2, 3, 4).tensor::<Train, 2>([2, 3], &device::<Train>()).require_grad();
    let grads = own.no_grad().forward(x.clone()).sum().backward();
    let expected = Matrix::from_fn(2, 3, |_, col| gamma[col] / (var[col] + 1e-5).sqrt());
    assert_close(x.grad(&grads).unwrap(), &expected, 1e-5);
}

#[test]
fn b3_files_and_paths_are_burns() {
    let stock = BatchNormConfig::new(3).init::<Train>(&device::<Train>());
    let _ = stock.forward(input(0));
    let recorder = NamedMpkBytesRecorder::<FullPrecisionSettings>::new();
    let bytes = recorder.record(stock.clone().into_record(), ()).unwrap();
    let (own, _) = norm::<Train>();
    let own = own.load_record(recorder.load(bytes.clone(), &device::<Train>()).unwrap());
    assert_eq!(bits(own.running_mean()), bits(stock.running_mean.value_sync()));
    let y = stock.valid().forward(input(1)).into_data().iter::<f64>().collect();
    assert_close(own.valid().forward(input(1)), &Matrix { rows: 6, cols: 3, data: y }, 1e-5);
    assert_eq!(recorder.record(own.into_record(), ()).unwrap(), bytes);
}

#[test]
fn b3_an_overlay_evaluates_what_it_trained() {
    // In evaluation mode, both give the same.
    let base = Own::<Train>::new();
    let model = Lora::overlay(base.clone()).attach(&config()).unwrap();
    let pass = |model: &Lora<Train, Overlay<Train, Own<Train>>>, x| {
        model.with_adapters(|net| net.forward(x))
    };
    let model = train(model, pass);
    let trained = pass(&model, input(9));
    let y = trained.clone().into_data().iter::<f64>().collect();
    let evaluated = model.valid().with_adapters(|net| net.forward(input(9)));
    assert_close(evaluated, &Matrix { rows: 6, cols: 2, data: y }, 1e-5);

    // Where it trains, its statistics move, and are those of the layers' own way.
    let config = config().with_modules_to_save(["norm"]);
    let overlay = train(Lora::overlay(base.clone()).attach(&config).unwrap(), pass);
    let layers = train(base.attach(&config).unwrap(), |model, x| model.forward(x));
    let mean = layers.norm.running_mean().into_data().iter::<f64>().collect();
    let mean = Matrix { rows: 1, cols: 4, data: mean };
    assert_close(overlay.model().norm.running_mean().unsqueeze::<2>(), &mean, 1e-5);
    assert_ne!(moments(&layers.norm), moments(&base.norm));
}

#[test]
fn b3_workers_move_the_statistics_of_the_model() {
    let config = config().with_modules_to_save(["norm"]);
    let model = Own::<Train>::new().attach(&config).unwrap();
    let parts = || vec![input(1), input(2), input(3)];
    let expected: Vec<f64> = {
        // Each of the workers has seen its own parts.
        let mean = |parts: &[u64]| {
            let copy = model.clone();
            parts.iter().for_each(|&seed| drop(copy.forward(input(seed))));
            copy.norm.running_mean().into_data().iter::<f64>().collect::<Vec<_>>()
        };
        let (one, two) = (mean(&[1, 3]), mean(&[2]));
        one.iter().zip(two).map(|(one, two)| (one + two) / 2.0).collect()
    };
    let _ = Workers::new(2).backward(&model, parts(), |model: &Lora<_, _>, part| {
        Backward::new(model, model.forward(part).sum())
    });
    let expected = Matrix { rows: 1, cols: 4, data: expected };
    assert_close(model.norm.running_mean().unsqueeze::<2>(), &expected, 1e-5);
}

impl<B: Backend> Blocks<B, 2, u64> for Own<B> {
    type Context = u64;

    fn blocks(&self) -> usize {
        1
    }

    fn context(&self, input: &u64, _device: &B::Device) -> u64 {
        *input
    }

    fn begin(&self, context: &u64) -> Tensor<B, 2> {
        self.fc.forward(input(*context))
    }

    fn block(&self, _index: usize, x: Tensor<B, 2>, _context: &u64) -> Tensor<B, 2> {
        self.norm.forward(x).tanh()
    }

    fn loss(&self, _part: usize, x: Tensor<B, 2>, _context: &u64) -> Tensor<B, 1> {
        self.head.forward(x).sin().sum()
    }
}

#[test]
fn b3_segments_take_a_frozen_norm() {
    let model = Own::<Train>::new().attach(&config()).unwrap();
    let step = segments::<Train, _, u64, 2>(&model, &3);
    let expected = Backward::new(&model, model.forward(input(3)).sin().sum());
    assert!((step.loss - expected.loss).abs() < 1e-5);
    assert_eq!(step.gradients.len(), 4);
}

/// The way of a model that was adapted without autodiff: it has statistics of its own, too.
#[test]
fn b1_a_model_adapted_without_autodiff_trains_on_its_own() {
    let plain = Stock::<Plain>::new();
    let before = bits(plain.forward(input(9)));
    let start = Lora::<Train, Stock<Train>>::from_inner(plain.attach(&config()).unwrap());
    let model = train(start, |model, x| model.forward(x));
    let file = assert_kept!(
        Stock,
        "inner",
        &model,
        Stock::<Train>::from_inner(plain.clone()).with_own_statistics()
    );
    assert!(
        SafeTensors::deserialize(&file)
            .unwrap()
            .tensor("base_model.model.norm.running_var")
            .is_ok()
    );
    assert_eq!(bits(plain.forward(input(9))), before);
    assert_eq!(bits(model.detach::<Stock<Train>>().valid().forward(input(9))), before);
}

/// A norm whose name is the end of another's.
#[derive(Module, Debug)]
struct Two<B: Backend> {
    fc: LoraLinear<B>,
    prenorm: nn::LayerNorm<B>,
    norm: nn::BatchNorm<B>,
}

#[test]
fn b2_norms_that_came_along_for_their_statistics_do_not_train() {
    let device = device::<Train>();
    let base = Two::<Train> {
        fc: LinearConfig::new(3, 4).init(&device).into(),
        prenorm: nn::LayerNormConfig::new(3).init(&device),
        norm: BatchNormConfig::new(4).init(&device),
    };
    let blank = base.with_own_statistics();
    let model = train(blank.attach(&config()).unwrap(), |model, x| {
        model.norm.forward(model.fc.forward(model.prenorm.forward(x)))
    });
    let dir = TempDir::new("norms-two");
    let switched = blank.switch(&saved(&model.adapters(), &dir.0.join("set"))).unwrap();
    assert_eq!(switched.parameters().trainable, model.parameters().trainable);
    // The one takes records of the other.
    let record = switched.clone().into_record();
    assert_eq!(record.trains, model.clone().into_record().trains);
    model.try_load_record(record).unwrap();
}

#[test]
fn b1_loftq_rounds_a_base_with_statistics_of_its_own() {
    let base = Stock::<Train>::new();
    let before = evaluated(&base);
    let config = LoraConfig::new(2, 3.0);
    let model = base.with_own_statistics().attach_loftq(Quantization::Int8, &config, 2).unwrap();
    let _ = model.forward(input(1));
    assert_eq!(evaluated(&base), before);
}

#[test]
fn b1_a_record_does_not_move_what_clones_share() {
    let trained = Stock::<Train>::new().with_own_statistics().attach(&config()).unwrap();
    let plain = Stock::<Plain>::new();
    // Nothing moved yet.
    let record = trained.valid().into_record();
    assert!(Lora::new(plain.clone()).try_load_record(record).is_ok());
    let before = bits(plain.forward(input(9)));
    let record = train(trained, |model, x| model.forward(x)).valid().into_record();
    let error = Lora::new(plain.clone()).try_load_record(record).unwrap_err();
    assert!(
        matches!(&error, LoraError::SharedStatistics { paths } if paths == &["norm"]),
        "{error}"
    );
    assert_eq!(bits(plain.forward(input(9))), before);
}

#[test]
fn b2_statistics_are_taken_from_a_tuned_model() {
    let config = LoraConfig::new(2, 3.0).with_modules_to_save(["norm"]);
    let base = Stock::<Train>::new().with_own_statistics();
    let all = base.train_only(&[".*"]).unwrap();
    let tuned = train(all, |model, x| model.forward(x));
    let set = base.extract(&tuned, &config).unwrap().adapters;
    let model = base.switch(&set).unwrap();
    assert_eq!(
        bits(model.norm.running_mean.value_sync()),
        bits(tuned.norm.running_mean.value_sync())
    );

    let base = Lora::new(Own::<Train>::new());
    let tuned = train(base.train_only(&[".*"]).unwrap(), |model, x| model.forward(x));
    let model = base.switch(&base.extract(&tuned, &config).unwrap().adapters).unwrap();
    assert_eq!(moments(&model.norm), moments(&tuned.norm));
}

#[test]
#[should_panic = "Burn's batch norms share their running statistics"]
fn b1_a_model_that_lost_its_own_statistics_is_refused() {
    let model = Stock::<Train>::new().with_own_statistics().attach(&config()).unwrap();
    Lora::<Train, _>::new(model.into_inner());
}

/// To a frozen norm its statistics are as much a part of the base as a weight.
#[test]
fn b3_replicas_must_have_the_statistics_of_a_frozen_norm_in_common() {
    let base = Own::<Train>::new();
    let all = base.train_only(&[".*"]).unwrap();
    let _ = all.forward(input(0));
    let mut other = base.clone();
    other.norm = all.norm.clone();
    let lines = |base: &Own<Train>, config: &LoraConfig| fingerprint(&base.attach(config).unwrap());
    assert_ne!(lines(&base, &config()), lines(&other, &config()));
    // Those that move are of each replica's own data.
    let moving = config().with_modules_to_save(["norm"]);
    assert_eq!(lines(&base, &moving), lines(&other, &moving));
}

#[test]
fn b2_statistics_that_a_file_lacks_are_missing() {
    let base = Own::<Train>::new();
    let set = base.attach(&config().with_modules_to_save(["norm"])).unwrap().adapters();
    let dir = TempDir::new("norms-lacking");
    set.save(dir.0.join("set")).unwrap();
    let path = dir.0.join("set/adapter_model.safetensors");
    let file = fs::read(&path).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let others = tensors.iter().filter(|(name, _)| !name.ends_with("running_var"));
    fs::write(&path, safetensors::serialize(others, None).unwrap()).unwrap();
    let set = LoraAdapters::load(dir.0.join("set"), &device::<Train>()).unwrap();
    let error = base.switch(&set).unwrap_err().to_string();
    assert!(error.contains("missing: norm.running_var"), "{error}");
}
