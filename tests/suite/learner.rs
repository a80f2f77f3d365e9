//! Burn's own trainer works with an adapted model: it trains only the adapters, and resumes from its
//! checkpoints.

use std::{path::Path, sync::Arc};

use burn::{
    data::{
        dataloader::{DataLoader, DataLoaderBuilder, batcher::Batcher},
        dataset::InMemDataset,
    },
    module::{AutodiffModule, Module},
    optim::AdamConfig,
    record::{FullPrecisionSettings, NamedMpkFileRecorder},
    tensor::{
        Tensor,
        backend::{AutodiffBackend, Backend},
    },
    train::{
        InferenceStep, Learner, RegressionOutput, SupervisedTraining, TrainOutput, TrainStep,
        metric::LossMetric,
    },
};
use burn_lora::{Lora, LoraConfig, LoraModule};

use crate::{
    model::{Mlp, Plain, Train, device, filled},
    oracle::{Matrix, assert_identical, bits},
};

type Batch<B> = Tensor<B, 2>;

#[derive(Clone)]
struct Rows;

impl<B: Backend> Batcher<B, Vec<f32>, Batch<B>> for Rows {
    fn batch(&self, items: Vec<Vec<f32>>, device: &B::Device) -> Batch<B> {
        let rows = items.len();
        let data = burn::tensor::TensorData::new(items.concat(), [rows, 6]);
        Tensor::from_data(data, device)
    }
}

impl<B: Backend> Mlp<B> {
    /// Regression with the first three inputs as targets.
    fn regression(&self, x: Batch<B>) -> RegressionOutput<B> {
        let output = self.forward(x.clone());
        let targets = x.narrow(1, 0, 3);
        let loss = (output.clone() - targets.clone()).square().mean();
        RegressionOutput::new(loss, output, targets)
    }
}

/// The model for burn-train: a struct with the adapted model as a field.
#[derive(Module, Debug)]
struct Task<B: Backend> {
    net: Lora<B, Mlp<B>>,
}

impl<B: AutodiffBackend> TrainStep for Task<B> {
    type Input = Batch<B>;
    type Output = RegressionOutput<B>;

    fn step(&self, x: Batch<B>) -> TrainOutput<RegressionOutput<B>> {
        let output = self.net.regression(x);
        TrainOutput::new(self, output.loss.backward(), output)
    }
}

impl<B: Backend> InferenceStep for Task<B> {
    type Input = Batch<B>;
    type Output = RegressionOutput<B>;

    fn step(&self, x: Batch<B>) -> RegressionOutput<B> {
        self.net.regression(x)
    }
}

fn loader<B: Backend>() -> Arc<dyn DataLoader<B, Batch<B>>> {
    let items = Matrix::random(40, 6, 3);
    let rows = items.data.chunks(6).map(|row| row.iter().map(|&it| it as f32).collect()).collect();
    DataLoaderBuilder::new(Rows).batch_size(8).build(InMemDataset::new(rows))
}

fn train(
    net: Lora<Train, Mlp<Train>>,
    dir: &Path,
    epochs: usize,
    checkpoint: Option<usize>,
) -> Lora<Plain, Mlp<Plain>> {
    let recorder = NamedMpkFileRecorder::<FullPrecisionSettings>::new();
    let mut training = SupervisedTraining::new(dir, loader::<Train>(), loader::<Plain>())
        .metrics((LossMetric::new(),))
        .with_file_checkpointer(recorder)
        .with_application_logger(None)
        .num_epochs(epochs);
    if let Some(epoch) = checkpoint {
        training = training.checkpoint(epoch);
    }
    let optimizer = AdamConfig::new().init::<Train, Task<Train>>();
    training.launch(Learner::new(Task { net }, optimizer, 0.01)).model.net
}

#[test]
fn the_learner_trains_adapters_alone_and_resumes() {
    let dir = std::env::temp_dir().join(format!("burn-lora-learner-{}", std::process::id()));
    let model = filled(Mlp::<Train>::new(&device::<Train>()));
    let adapted = model.attach(&LoraConfig::new(2, 3.0)).unwrap();
    let x = Matrix::random(9, 6, 8);
    let loss = |model: &Mlp<Plain>| {
        let x = x.tensor([9, 6], &device::<Plain>());
        model.regression(x).loss.into_scalar()
    };
    let before = loss(&adapted.valid());

    let straight = train(adapted.clone(), &dir.join("straight"), 4, None);
    assert!(loss(&straight) < 0.9 * before, "{} after {before}", loss(&straight));
    assert_identical(straight.head.base.weight.val(), model.head.base.weight.val());
    assert_identical(straight.norm.gamma.val(), model.norm.gamma.val());
    assert!(bits(straight.head.adapter().unwrap().b.val()).iter().any(|&bits| bits != 0));

    // Trains two epochs, and then two more from the checkpoint with an untrained model.
    train(adapted.clone(), &dir.join("resumed"), 2, None);
    let resumed = train(adapted, &dir.join("resumed"), 4, Some(2));
    let adapter = |model: &Mlp<Plain>| model.head.adapter().unwrap().delta();
    assert_identical(adapter(&resumed), adapter(&straight));
    std::fs::remove_dir_all(dir).unwrap();
}
