//! Training in bf16.

use burn::{
    module::{AutodiffModule, Module, ModuleVisitor, Param},
    optim::{AdamConfig, GradientsParams, Optimizer},
    tensor::{Tensor, activation::relu, backend::Backend},
};
use burn_lora::{
    Init, Lora, LoraConfig, LoraLinear, LoraModule,
    nn::Precision,
    quantize::Quantization,
    train::{Backward, Blocks, Workers, segments},
};

use super::random;
use crate::{
    model::{Mlp, Plain, Train, device, filled},
    oracle::{Matrix, bits},
};

const ROWS: usize = 24;

/// The model, which computes block by block, of a batch `[rows, 6]`.
#[derive(Module, Debug)]
struct Net<B: Backend> {
    mlp: Mlp<B>,
}

impl<B: Backend> Blocks<B, 2, Matrix> for Net<B> {
    type Context = Tensor<B, 2>;

    fn blocks(&self) -> usize {
        self.mlp.blocks.len()
    }

    fn context(&self, batch: &Matrix, device: &B::Device) -> Self::Context {
        batch.tensor([batch.rows, batch.cols], device)
    }

    fn begin(&self, x: &Self::Context) -> Tensor<B, 2> {
        x.clone()
    }

    fn block(&self, index: usize, x: Tensor<B, 2>, _: &Self::Context) -> Tensor<B, 2> {
        relu(self.mlp.blocks[index].forward(x))
    }

    fn loss(&self, _: usize, x: Tensor<B, 2>, _: &Self::Context) -> Tensor<B, 1> {
        self.mlp.head.forward(self.mlp.norm.forward(x)).sin().sum()
    }
}

type Model = Lora<Train, Net<Train>>;

fn model(held: Option<Quantization>) -> Model {
    let mut base = Net { mlp: filled(Mlp::<Train>::new(&device::<Train>())) };
    if let Some(to) = held {
        (base, _) = base.quantize(to).unwrap();
    }
    let config = LoraConfig::new(2, 0.7).with_init(Init::RandomBoth).with_seed(3);
    base.with_precision(Precision::Bf16).attach(&config).unwrap()
}

fn plain(model: &Model, batch: &Matrix) -> Backward {
    let x = batch.tensor([batch.rows, batch.cols], &device::<Train>());
    Backward::new(model, model.mlp.forward(x).sin().sum())
}

/// The loss, and all gradients.
fn values(model: &Model, step: &Backward) -> Vec<f64> {
    struct All<'a>(&'a GradientsParams, Vec<f64>);
    impl ModuleVisitor<Train> for All<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Train, D>>) {
            let gradient = self.0.get::<Plain, D>(param.id);
            self.1.extend(
                gradient.iter().flat_map(|it| it.to_data().iter::<f64>().collect::<Vec<_>>()),
            );
        }
    }
    let mut all = All(&step.gradients, vec![step.loss]);
    model.visit(&mut all);
    all.1
}

#[test]
fn workers_and_segments_give_what_a_plain_pass_gives() {
    for held in [None, Some(Quantization::Nf4), Some(Quantization::Bf16)] {
        let (model, batch) = (model(held), Matrix::random(ROWS, 6, 1));
        let expected = values(&model, &plain(&model, &batch));
        assert_eq!(expected.len(), 1 + 2 * (6 + 8 + 8 + 7 + 7 + 3));
        let check = |of: &str, step: Backward| {
            let found = values(&model, &step);
            assert_eq!(found.len(), expected.len());
            let norm = |it: &mut dyn Iterator<Item = f64>| it.map(|it| it * it).sum::<f64>().sqrt();
            let size = norm(&mut expected.iter().copied());
            let error = norm(&mut found.iter().zip(&expected).map(|(a, b)| a - b));
            assert!(error < 1e-6 * size, "{of}: {error} of {size}");
        };
        check("segments", segments(&model, &batch));
        // Each part has so many rows that its products are in bf16, too.
        let parts = || {
            let rows = batch.data.chunks(6 * ROWS / 3);
            rows.map(|it| Matrix { rows: ROWS / 3, cols: 6, data: it.to_vec() }).collect()
        };
        for count in [1, 2, 3] {
            let workers = Workers::new(count);
            check("workers", workers.backward(&model, parts(), |model, it| plain(model, &it)));
            let pass = |model: &Model, it: Matrix| segments(model, &it);
            check("workers in segments", workers.backward(&model, parts(), pass));
        }
    }
}

#[test]
fn steps_are_the_same_each_time() {
    let (model, batch) = (model(None), Matrix::random(ROWS, 6, 1));
    let first = values(&model, &plain(&model, &batch));
    for _ in 0..3 {
        assert_eq!(values(&model, &plain(&model, &batch)), first);
    }
}

/// The mean squared error at the start, and after some steps.
fn train(precision: Precision, held: Option<Quantization>) -> [f64; 2] {
    let device = device::<Train>();
    let linear = burn::nn::LinearConfig::new(32, 16).init::<Train>(&device);
    let base = filled(LoraLinear::from(linear));
    // What is to be learned is another layer of the same kind, and a little noise.
    let x = random::<Train, 2>([96, 32], 1);
    let change = random::<Train, 2>([32, 3], 2).matmul(random([3, 16], 3)) * 0.5;
    let y = base.forward(x.clone()) + x.clone().matmul(change) + random([96, 16], 4) * 0.3;
    let y = y.detach();
    let base = match held {
        Some(to) => base.quantize(to).unwrap().0,
        None => base,
    };
    let config = LoraConfig::new(4, 2.0).with_seed(6);
    let mut model = base.with_precision(precision).attach(&config).unwrap();
    let mut optimizer = AdamConfig::new().init();
    let loss = |model: &Lora<Train, LoraLinear<Train>>| {
        (model.forward(x.clone()) - y.clone()).square().mean()
    };
    let value = |loss: Tensor<Train, 1>| f64::from(loss.into_scalar());
    let start = value(loss(&model));
    for _ in 0..120 {
        let grads = GradientsParams::from_grads(loss(&model).backward(), &model);
        model = optimizer.step(3e-2, model, grads);
    }
    // What is in bf16 while it trains has learned for both.
    let full = model.with_precision(Precision::F32);
    assert!((value(loss(&full)) / value(loss(&model)) - 1.0).abs() < 0.05);
    let valid = model.valid().forward(x.clone().inner());
    assert_eq!(bits(valid), bits(model.forward(x.clone())));
    [start, value(loss(&model))]
}

#[test]
fn a_regression_reaches_about_the_loss_of_f32() {
    for held in [None, Some(Quantization::Bf16)] {
        let [[start, full], [_, ours]] =
            [Precision::F32, Precision::Bf16].map(|it| train(it, held));
        assert!(full < 0.1 * start, "it learns: {start}, {full}");
        assert!((ours / full - 1.0).abs() < 0.05, "{ours} and {full}");
    }
}
