//! The model: four convolutions and a linear layer. Each can have an adapter.

use burn::{
    module::Module,
    nn::{
        GroupNorm, GroupNormConfig, LinearConfig, PaddingConfig2d,
        conv::Conv2dConfig,
        pool::{AdaptiveAvgPool2d, AdaptiveAvgPool2dConfig},
    },
    tensor::{Tensor, activation::relu, backend::Backend},
};
use burn_lora::{LoraLinear, nn::LoraConv2d};
use common::classifier::Classifier;

use crate::data::{CHANNELS, Photo, SIDE};

/// A convolutional network for images of 32×32 pixels.
///
/// The norms are group norms, which normalize each image by itself. Batch norms would update their
/// running statistics although the base is frozen, and so change the outputs on the old task.
#[derive(Module, Debug)]
pub struct Cnn<B: Backend> {
    convs: Vec<LoraConv2d<B>>,
    norms: Vec<GroupNorm<B>>,
    pool: AdaptiveAvgPool2d,
    head: LoraLinear<B>,
}

/// Input channels, output channels and stride. The outputs are 16, 8, 4 and 4 pixels wide and high.
const CONVS: [(usize, usize, usize); 4] =
    [(CHANNELS, 32, 2), (32, 64, 2), (64, 96, 2), (96, 96, 1)];

impl<B: Backend> Cnn<B> {
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
