//! The initial values of fresh adapters.

mod olora;
mod orthogonal;
mod pissa;

use burn::{
    nn::DropoutConfig,
    tensor::{Tensor, TensorData, backend::Backend},
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use rand_distr::{Normal, StandardNormal, Uniform};

use super::{LoraAdapter, Training, WeightLayout};
use crate::{
    config::{Init, LayerConfig, LoraConfig},
    tensors::trainable,
};

impl<B: Backend> LoraAdapter<B> {
    /// A fresh adapter for a weight `[d_input, d_output]`, with initial values as `config` says. Fields
    /// of `config` that concern a whole model, such as the targets, are ignored.
    ///
    /// The factors are drawn on the host from the seed alone, so they are the same on every backend.
    ///
    /// # Panics
    ///
    /// If the rank is 0 or the dropout is not a probability, or if the initial values depend on the weight,
    /// as those of PiSSA, OLoRA and DoRA do: [`LoraConfig::init`] knows the weight.
    pub fn init(config: &LoraConfig, shape: [usize; 2], device: &B::Device) -> LoraAdapter<B> {
        assert!(
            !config.reads_weight(),
            "the initial values depend on the weight: use `LoraConfig::init`, or attach the adapter to a model"
        );
        Self::drawn(&config.into(), WeightLayout::Unknown, shape, device)
    }

    /// A fresh adapter for the given weight, which is read only if the initial values depend on it.
    pub(crate) fn init_on(
        config: &LayerConfig,
        layout: WeightLayout,
        shape: [usize; 2],
        device: &B::Device,
        weight: impl Fn() -> Tensor<B, 2>,
    ) -> LoraAdapter<B> {
        assert!(
            !(config.freeze_a && layout == WeightLayout::Embedding),
            "an embedding's A is zero at first, and cannot be frozen"
        );
        let mut adapter = Self::drawn(config, layout, shape, device);
        let (rank, scale) = (config.rank.min(shape[0]).min(shape[1]), |rank| {
            config.scaling.scale(config.alpha, rank)
        });
        let start = match config.init {
            Init::Pissa => Some(pissa::exact(weight(), rank, scale(rank))),
            Init::PissaRandomized { iterations } => {
                Some(pissa::randomized(weight(), rank, iterations, scale(rank)))
            }
            Init::Olora => Some(olora::factors(weight(), rank)),
            _ => None,
        };
        if let Some([a, b]) = &start {
            (adapter.a, adapter.b) = (trainable(a.clone()), trainable(b.clone()));
        }
        adapter.training.start = start;
        if config.dora { adapter.with_magnitude(weight()) } else { adapter }
    }

    /// A fresh adapter whose factors do not depend on the weight.
    fn drawn(
        config: &LayerConfig,
        layout: WeightLayout,
        [d_input, d_output]: [usize; 2],
        device: &B::Device,
    ) -> LoraAdapter<B> {
        let rank = config.rank;
        let mut rng = StdRng::seed_from_u64(config.seed);
        let (a, b) = match (&layout, config.init) {
            (_, Init::Orthogonal) => {
                orthogonal::factors([d_input, rank, d_output], &mut rng, device)
            }
            (WeightLayout::Embedding, init) => {
                let mut normal = |shape| random(shape, || rng.sample(StandardNormal), device);
                let b = normal([rank, d_output]);
                let a = match init {
                    Init::RandomBoth => normal([d_input, rank]),
                    _ => Tensor::zeros([d_input, rank], device),
                };
                (a, b)
            }
            (_, Init::Gaussian) => {
                let normal = Normal::new(0.0, 1.0 / rank as f32).expect("the deviation is finite");
                let a = random([d_input, rank], || rng.sample(normal), device);
                (a, Tensor::zeros([rank, d_output], device))
            }
            (_, init) => {
                let mut uniform = |shape: [usize; 2], fan_in: usize| {
                    let bound = 1.0 / (fan_in as f32).sqrt();
                    let range = Uniform::new_inclusive(-bound, bound);
                    let range = range.expect("the bound is finite");
                    random(shape, || rng.sample(range), device)
                };
                let a = uniform([d_input, rank], d_input);
                let b = match init {
                    Init::RandomBoth => uniform([rank, d_output], rank),
                    _ => Tensor::zeros([rank, d_output], device),
                };
                (a, b)
            }
        };
        Self {
            layout,
            bias: config.bias.then(|| trainable(Tensor::zeros([d_output], device))),
            dropout: DropoutConfig::new(config.dropout).init(),
            training: Training { freezes_a: config.freeze_a, ..Training::default() },
            ..Self::new(a, b, config.alpha, config.scaling)
        }
    }
}

fn random<B: Backend>(
    shape: [usize; 2],
    mut draw: impl FnMut() -> f32,
    device: &B::Device,
) -> Tensor<B, 2> {
    let values: Vec<f32> = (0..shape[0] * shape[1]).map(|_| draw()).collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}
