//! A recognizer of grids of numbers, such as gray images and spectrograms: an encoder with four
//! convolutions, and a linear layer. Each layer can have an adapter.

use std::sync::Arc;

use burn::{
    module::Module,
    nn::{
        GroupNorm, GroupNormConfig, LinearConfig, PaddingConfig2d,
        conv::Conv2dConfig,
        pool::{AdaptiveAvgPool2d, AdaptiveAvgPool2dConfig},
    },
    tensor::{Tensor, TensorData, activation::relu, backend::Backend},
};
use burn_lora::{
    LoraLinear,
    nn::{LoraConv2d, group_norm},
};

use super::classifier::{Classifier, Sample};

/// A grid of numbers from 0 to 1, and its class.
#[derive(Clone, Debug)]
pub struct Grid {
    /// Row by row. Clones share the numbers.
    pub values: Arc<[f32]>,
    /// The numbers of rows and columns.
    pub shape: [usize; 2],
    pub label: u8,
}

impl Grid {
    /// Grids of one shape as a tensor: `[batch, rows, columns]`.
    pub fn stack<'a, B: Backend>(
        grids: impl ExactSizeIterator<Item = &'a Self> + Clone,
        device: &B::Device,
    ) -> Tensor<B, 3> {
        let batch = grids.len();
        let [rows, columns] = grids.clone().next().map_or([0; 2], |first| first.shape);
        let values: Vec<f32> = grids.flat_map(|grid| grid.values.iter().copied()).collect();
        Tensor::from_data(TensorData::new(values, [batch, rows, columns]), device)
    }
}

impl Sample for Grid {
    type Input<B: Backend> = Tensor<B, 3>;

    /// Few, so that an epoch of a few dozen samples has several steps.
    const BATCH: usize = 16;

    fn label(&self) -> u8 {
        self.label
    }

    fn stack<B: Backend>(samples: &[Self], device: &B::Device) -> Tensor<B, 3> {
        Self::stack(samples.iter(), device)
    }
}

/// Input channels, output channels and stride.
const CONVS: [(usize, usize, usize); 4] = [(1, 32, 2), (32, 64, 2), (64, 96, 2), (96, 96, 1)];

/// Rows and columns of what is left of a grid: its quarters.
const POOLED: [usize; 2] = [2, 2];

/// Convolutions that turn a grid of any shape into [`Encoder::FEATURES`] numbers.
///
/// The norms are group norms, which normalize each grid by itself. Batch norms would update their
/// running statistics although the base is frozen, and so change the outputs on the old task.
#[derive(Module, Debug)]
pub struct Encoder<B: Backend> {
    convs: Vec<LoraConv2d<B>>,
    norms: Vec<GroupNorm<B>>,
    pool: AdaptiveAvgPool2d,
}

impl<B: Backend> Encoder<B> {
    /// The number of features: those of each quarter of the grid.
    pub const FEATURES: usize = CONVS[CONVS.len() - 1].1 * POOLED[0] * POOLED[1];

    pub fn new(device: &B::Device) -> Self {
        let conv = |(channels_in, channels_out, stride)| {
            let config = Conv2dConfig::new([channels_in, channels_out], [3, 3]);
            let config = config.with_stride([stride; 2]);
            config.with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1)).init(device).into()
        };
        let norm = |(_, channels, _)| GroupNormConfig::new(8, channels).init(device);
        Self {
            convs: CONVS.map(conv).into(),
            norms: CONVS.map(norm).into(),
            pool: AdaptiveAvgPool2dConfig::new(POOLED).init(),
        }
    }

    /// `[batch, rows, columns]` to `[batch, features]`.
    pub fn forward(&self, grids: Tensor<B, 3>) -> Tensor<B, 2> {
        let image = grids.unsqueeze_dim::<4>(1).sub_scalar(0.5);
        let layers = self.convs.iter().zip(&self.norms);
        let maps = layers.fold(image, |x, (conv, norm)| relu(group_norm(norm, conv.forward(x))));
        self.pool.forward(maps).flatten::<2>(1, 3)
    }
}

/// An encoder, and a linear layer with a logit per class.
#[derive(Module, Debug)]
pub struct Recognizer<B: Backend> {
    pub encoder: Encoder<B>,
    pub head: LoraLinear<B>,
}

impl<B: Backend> Recognizer<B> {
    pub fn new(classes: usize, device: &B::Device) -> Self {
        let head = LinearConfig::new(Encoder::<B>::FEATURES, classes).init(device).into();
        Self { encoder: Encoder::new(device), head }
    }
}

impl<B: Backend> Classifier<B> for Recognizer<B> {
    type Sample = Grid;

    fn logits(&self, grids: Tensor<B, 3>) -> Tensor<B, 2> {
        self.head.forward(self.encoder.forward(grids))
    }
}
