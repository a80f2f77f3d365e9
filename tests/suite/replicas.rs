//! Replicas, each with its part of the batch, train as one model with the whole batch.

use std::{
    cell::Cell,
    panic::{UnwindSafe, catch_unwind},
};

use burn::{
    module::{Module, ModuleVisitor, Param},
    nn::{Linear, LinearConfig},
    optim::{AdamConfig, GradientsParams, Optimizer},
    tensor::{Tensor, backend::Backend},
};
use burn_lora::{
    Init, Lora, LoraConfig, LoraError, LoraModule,
    quantize::Quantization,
    train::{Alone, Backward, Replicas, ThreadReplica, fingerprint},
};

use crate::{
    model::{Mlp, Plain, PlainMlp, Train, device, filled},
    oracle::Matrix,
};

type Model = Lora<Train, Mlp<Train>>;

/// The number of rows of a batch.
const ROWS: usize = 12;

fn config() -> LoraConfig {
    LoraConfig::new(2, 0.7).with_init(Init::RandomBoth).with_seed(3)
}

/// A model that is the same each time, but for the ids of its parameters.
fn model() -> Model {
    let base = filled(Mlp::<Train>::new(&device::<Train>()));
    base.attach(&config().with_modules_to_save(["norm"])).unwrap()
}

/// All parameters, one after the other.
fn parameters(model: &Model) -> Vec<f64> {
    struct All(Vec<f64>);
    impl<B: Backend> ModuleVisitor<B> for All {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            self.0.extend(param.val().into_data().iter::<f64>());
        }
    }
    let mut all = All(Vec::new());
    model.visit(&mut all);
    all.0
}

/// The part of replica `index` of `count` of the batch of a step: `[rows, 6]` and `[rows, 3]`. The parts are
/// not equally long.
fn part(step: u64, index: usize, count: usize) -> [Tensor<Train, 2>; 2] {
    let begin = |index: usize| index * (index + 1) * ROWS / (count * (count + 1));
    let (start, end) = (begin(index), begin(index + 1));
    let of = |width: usize, seed: u64| {
        let values = Matrix::random(ROWS, width, seed);
        values.tensor::<Train, 2>([ROWS, width], &device::<Train>()).narrow(0, start, end - start)
    };
    [of(6, 100 + step), of(3, 200 + step)]
}

/// Trains for 20 steps, and gives the parameters after each.
fn train(replicas: &impl Replicas) -> Vec<Vec<f64>> {
    let mut model = model();
    let mut optimizer = AdamConfig::new().init();
    let mut trace = Vec::new();
    for step in 0..20 {
        let [x, y] = part(step, replicas.index(), replicas.count());
        let error = (model.forward(x) - y).square().sum() / ROWS as f64;
        let Backward { gradients, .. } = Backward::new(&model, error).all_reduce(&model, replicas);
        model = optimizer.step(1e-2, model, gradients);
        trace.push(parameters(&model));
    }
    trace
}

#[test]
fn replicas_with_parts_train_as_one_model_with_the_whole_batch() {
    let start = parameters(&model());
    let one = train(&Alone).pop().unwrap();
    let norm = |values: &[f64]| values.iter().map(|it| it * it).sum::<f64>().sqrt();
    let difference = |one: &[f64], other: &[f64]| {
        norm(&one.iter().zip(other).map(|(one, other)| one - other).collect::<Vec<_>>())
    };
    assert!(difference(&one, &start) > 0.1 * norm(&start), "it trains");
    for count in [2, 4] {
        let traces = ThreadReplica::run(count, |replica| train(&replica));
        let last = traces[0].last().unwrap();
        let error = difference(last, &one) / norm(&one);
        assert!(error < 1e-6, "{count} replicas: {error}");
        // All bits, after every step.
        assert!(traces.iter().all(|trace| *trace == traces[0]));
        assert_eq!(ThreadReplica::run(count, |replica| train(&replica))[0], traces[0]);
    }
}

/// Counts the bytes that a replica sends.
struct Counted<R>(R, Cell<usize>);

impl<R: Replicas> Replicas for Counted<R> {
    fn count(&self) -> usize {
        self.0.count()
    }

    fn index(&self) -> usize {
        self.0.index()
    }

    fn sum(&self, buffer: &mut [f32]) {
        self.1.set(self.1.get() + size_of_val(buffer));
        self.0.sum(buffer);
    }
}

#[test]
fn only_what_trains_is_sent() {
    let sent = ThreadReplica::run(2, |replica| {
        let (model, replica) = (model(), Counted(replica, Cell::default()));
        Backward::sum(&model, []).all_reduce(&model, &replica);
        (replica.1.get(), model.parameters())
    });
    // Three pairs of factors, and the norm.
    let (parameters, trainable) = (8, 2 * (6 + 8 + 8 + 7 + 7 + 3) + 2 * 7);
    for (bytes, report) in sent {
        assert_eq!(report.trainable, trainable);
        assert_eq!(bytes, 4 * (trainable + parameters + 1));
    }
}

/// The gradients that there are, by the order of their parameters.
fn gradients(model: &Model, gradients: &GradientsParams) -> Vec<Option<Vec<f64>>> {
    struct All<'a>(&'a GradientsParams, Vec<Option<Vec<f64>>>);
    impl ModuleVisitor<Train> for All<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Train, D>>) {
            let gradient = self.0.get::<Plain, D>(param.id);
            self.1.push(gradient.map(|it| it.into_data().iter::<f64>().collect()));
        }
    }
    let mut all = All(gradients, Vec::new());
    model.visit(&mut all);
    all.1
}

#[test]
fn a_parameter_that_no_replica_uses_has_no_gradient() {
    let x = || part(0, 0, 1)[0].clone();
    let pass = |model: &Model, replica: usize| {
        let first = model.blocks[0].forward(x()).sum();
        match replica {
            0 => Backward::new(model, first),
            1 => Backward::new(
                model,
                first
                    + model.blocks[1]
                        .forward(Tensor::<_, 2>::ones([2, 8], &device::<Train>()))
                        .sum(),
            ),
            _ => Backward::sum(model, []),
        }
    };
    let models: Vec<_> = (0..2).map(|_| model()).collect();
    let passes: Vec<_> = models.iter().zip(0..).map(|(model, it)| pass(model, it)).collect();
    let alone: Vec<_> =
        passes.iter().zip(&models).map(|(it, model)| gradients(model, &it.gradients)).collect();
    let loss: f64 = passes.iter().map(|it| it.loss).sum();
    let sums = ThreadReplica::run(3, |replica| {
        let model = model();
        let step = pass(&model, replica.index()).all_reduce(&model, &replica);
        assert!((step.loss - loss).abs() < 1e-4 * loss.abs(), "{} {loss}", step.loss);
        gradients(&model, &step.gradients)
    });
    for sum in sums {
        let count = sum.iter().flatten().count();
        assert_eq!(count, 4, "those of two layers");
        for ((sum, first), second) in sum.iter().zip(&alone[0]).zip(&alone[1]) {
            let Some(sum) = sum else {
                assert!(first.is_none() && second.is_none());
                continue;
            };
            let second = second.as_ref().unwrap();
            for (i, sum) in sum.iter().enumerate() {
                let expected = first.as_ref().map_or(0.0, |it| it[i]) + second[i];
                assert!(
                    (sum - expected).abs() < 1e-5 * expected.abs().max(1.0),
                    "{sum} {expected}"
                );
            }
        }
    }
}

/// What replicas with these lines say to each other.
fn agreement(lines: &[String]) -> Result<(), String> {
    let results = ThreadReplica::run(lines.len(), |replica| {
        let result = replica.agree(&lines[replica.index()]);
        // The next sum is not disturbed.
        assert!(replica.any(replica.index() == 0) && !replica.any(false));
        result.map_err(|error: LoraError| error.to_string())
    });
    assert!(results.iter().all(|result| *result == results[0]), "{results:?}");
    results[0].clone()
}

#[test]
fn replicas_that_differ_are_refused_with_the_difference() {
    let device = device::<Train>();
    let base = || filled(Mlp::<Train>::new(&device));
    let of = |config: &LoraConfig| fingerprint(&base().attach(config).unwrap());
    let usual = of(&config());
    assert_eq!(agreement(&vec![usual.clone(); 4]), Ok(()));
    assert_eq!(agreement(&vec![usual.clone(); 1]), Ok(()));
    let refused = |other: String, expected: &str| {
        let error = agreement(&[usual.clone(), usual.clone(), other]).unwrap_err();
        assert!(error.starts_with("replica 2 has `") && error.contains(expected), "{error}");
    };
    let rank_3 = LoraConfig { rank: 3, ..config() };
    refused(
        of(&rank_3),
        "blocks.0: an adapter of rank 3, scale 0.7 and dropout 0` where replica 0 has `blocks.0: an adapter of rank 2",
    );
    refused(of(&LoraConfig { alpha: 0.8, ..config() }), "scale 0.8");
    refused(of(&config().with_dropout(0.1)), "dropout 0.1");
    refused(of(&config().with_seed(4)), "blocks.0.adapter.a: [6, 2] of F32 trains");
    refused(of(&config().with_targets(["blocks.0"])), "where replica 0 has `blocks.1: an adapter");
    // Another base: its layers differ, and not their adapters.
    let other = Mlp { norm: base().norm, ..base() };
    let weight =
        other.blocks[1].base.weight.clone().map(|it| it.add_scalar(1e-6).set_require_grad(false));
    let mut other = other;
    other.blocks[1].base.weight = weight;
    refused(
        fingerprint(&other.attach(&config()).unwrap()),
        "blocks.1.weight: [8, 7] of F32 is frozen",
    );
    refused(
        format!("{usual}done: 3 steps"),
        "has `done: 3 steps` where replica 0 has `nothing more`",
    );
    // Adapters on stock modules.
    let overlay =
        || Lora::overlay(filled(PlainMlp::<Train>::new(&device))).attach(&config()).unwrap();
    let lines = fingerprint(&overlay());
    assert_eq!(lines, fingerprint(&overlay()));
    assert!(lines.contains("blocks.1: an adapter of rank 2, scale 0.7"), "{lines}");
    assert!(lines.contains("head.adapter.b: [2, 3] of F32 trains"), "{lines}");
    // Weights that no visitor sees.
    let quantized = |kind| {
        let (model, _) = base().attach(&config()).unwrap().quantize(kind).unwrap();
        fingerprint(&model)
    };
    let (int8, nf4) = (quantized(Quantization::Int8), quantized(Quantization::Nf4));
    assert_eq!(quantized(Quantization::Nf4), nf4);
    refused(int8.clone(), "blocks.0: a quantized weight [8, 6]");
    assert!(agreement(&[int8, nf4]).is_err());
}

/// The message with which two replicas end.
fn panic_of(work: impl Fn(ThreadReplica) + Sync + UnwindSafe) -> String {
    let panic = catch_unwind(|| ThreadReplica::run(2, work)).expect_err("it panics");
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|it| (*it).to_owned())).unwrap()
}

#[test]
fn nobody_waits_for_a_replica_that_ended() {
    let message = panic_of(|replica| {
        replica.wait();
        if replica.index() == 0 {
            replica.wait();
        }
    });
    assert_eq!(message, "replica 1 ended, and replica 0 waits for it");
    // The first cause is told, and not what the others see of it.
    let message = panic_of(|replica| match replica.index() {
        1 => panic!("the disk is full"),
        _ => replica.wait(),
    });
    assert_eq!(message, "the disk is full");
    let message = panic_of(|replica| replica.sum(&mut vec![1.0; 2 + replica.index()]));
    assert_eq!(message, "buffers of [2, 3] numbers cannot be added");
    assert!(catch_unwind(|| ThreadReplica::run(0, drop)).is_err());
}

/// A model that uses one layer twice.
#[derive(Module, Debug)]
struct Twice<B: Backend> {
    first: Linear<B>,
    second: Linear<B>,
}

#[test]
fn a_parameter_at_two_places_is_sent_once() {
    let device = device::<Train>();
    let model = || {
        let first = filled(LinearConfig::new(3, 3).init::<Train>(&device));
        Twice { second: first.clone(), first }
    };
    let pass = |model: &Twice<Train>, scale: f64| {
        let x = Matrix::random(4, 3, 1).tensor::<Train, 2>([4, 3], &device);
        Backward::new(model, model.second.forward(model.first.forward(x)).square().sum() * scale)
    };
    let of = |model: &Twice<Train>, step: &Backward| {
        let weight = step.gradients.get::<Plain, 2>(model.first.weight.id).unwrap();
        weight.into_data().iter::<f64>().collect::<Vec<_>>()
    };
    let model_alone = model();
    let expected = of(&model_alone, &pass(&model_alone, 3.0));
    let sums = ThreadReplica::run(2, |replica| {
        let (model, replica) = (model(), Counted(replica, Cell::default()));
        let scale = 1.0 + replica.index() as f64;
        let step = pass(&model, scale).all_reduce(&model, &replica);
        assert_eq!(step.gradients.len(), 2);
        (of(&model, &step), replica.1.get())
    });
    for (sum, sent) in sums {
        assert_eq!(sent, 4 * (9 + 3 + 2 + 1));
        for (sum, expected) in sum.iter().zip(&expected) {
            assert!((sum - expected).abs() < 1e-4 * expected.abs().max(1.0), "{sum} {expected}");
        }
    }
}
