//! The model: four convolutions and a linear layer. Each can have an adapter.

use burn::{
    module::Module,
    nn::{
        self, BatchNormConfig, GroupNorm, GroupNormConfig, LinearConfig, PaddingConfig2d,
        conv::Conv2dConfig,
        pool::{AdaptiveAvgPool2d, AdaptiveAvgPool2dConfig},
    },
    tensor::{Tensor, activation::relu, backend::Backend},
};
use burn_lora::{
    LoraLinear,
    nn::{BatchNorm, LoraConv2d, group_norm},
};
use clap::ValueEnum;
use common::classifier::Classifier;
use serde::Serialize;

use crate::data::{CHANNELS, Photo, SIDE};

/// What normalizes the channels.
#[derive(ValueEnum, Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Norms {
    /// Group norms, which normalize each image by itself
    Group,
    /// Batch norms that are frozen with the base: those of this crate
    Batch,
    /// Batch norms whose running statistics move whatever is frozen: those of Burn
    Moving,
}

#[derive(Module, Debug)]
enum Norm<B: Backend> {
    Group(GroupNorm<B>),
    Batch(BatchNorm<B>),
    Moving(nn::BatchNorm<B>),
}

impl<B: Backend> Norm<B> {
    fn new(norms: Norms, channels: usize, device: &B::Device) -> Self {
        let batch = BatchNormConfig::new(channels);
        match norms {
            Norms::Group => Self::Group(GroupNormConfig::new(8, channels).init(device)),
            Norms::Batch => Self::Batch(batch.init(device).into()),
            Norms::Moving => Self::Moving(batch.init(device)),
        }
    }

    fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        match self {
            Self::Group(norm) => group_norm(norm, x),
            Self::Batch(norm) => norm.forward(x),
            Self::Moving(norm) => norm.forward(x),
        }
    }
}

/// A convolutional network for images of 32×32 pixels.
#[derive(Module, Debug)]
pub struct Cnn<B: Backend> {
    convs: Vec<LoraConv2d<B>>,
    norms: Vec<Norm<B>>,
    pool: AdaptiveAvgPool2d,
    head: LoraLinear<B>,
}

/// Input channels, output channels and stride. The outputs are 16, 8, 4 and 4 pixels wide and high.
const CONVS: [(usize, usize, usize); 4] =
    [(CHANNELS, 32, 2), (32, 64, 2), (64, 96, 2), (96, 96, 1)];

impl<B: Backend> Cnn<B> {
    pub fn new(norms: Norms, device: &B::Device) -> Self {
        let conv = |(channels_in, channels_out, stride)| {
            let config = Conv2dConfig::new([channels_in, channels_out], [3, 3]);
            let config = config.with_stride([stride; 2]);
            config.with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1)).init(device).into()
        };
        let norm = |(_, channels, _)| Norm::new(norms, channels, device);
        Self {
            convs: CONVS.map(conv).into(),
            norms: CONVS.map(norm).into(),
            pool: AdaptiveAvgPool2dConfig::new([1, 1]).init(),
            head: LinearConfig::new(96, 10).init(device).into(),
        }
    }
}

impl<B: Backend> Classifier<B> for Cnn<B> {
    type Sample = Photo;

    fn logits(&self, pixels: Tensor<B, 2>) -> Tensor<B, 2> {
        let [batch, _] = pixels.dims();
        let image = pixels.reshape([batch, CHANNELS, SIDE, SIDE]).sub_scalar(0.5);
        let layers = self.convs.iter().zip(&self.norms);
        let features = layers.fold(image, |x, (conv, norm)| relu(norm.forward(conv.forward(x))));
        self.head.forward(self.pool.forward(features).flatten::<2>(1, 3))
    }
}
