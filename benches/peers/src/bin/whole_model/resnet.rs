//! A residual network for images of 32×32 pixels, as LoRA adapts it.

use burn::{
    module::Module,
    nn::{
        GroupNorm, GroupNormConfig, LinearConfig, PaddingConfig2d,
        conv::Conv2dConfig,
        pool::{AdaptiveAvgPool2d, AdaptiveAvgPool2dConfig},
    },
    tensor::{Tensor, activation::relu, backend::Backend},
};
use burn_lora::{
    LoraLinear,
    nn::{LoraConv2d, group_norm},
};

/// The layers that get adapters.
pub const LAYERS: [&str; 5] = ["stem", "first", "second", "shortcut", "head"];

/// The channels of each stage. A stage has two blocks, and all but the first stage halve the image.
const STAGES: [usize; 3] = [32, 64, 128];

const GROUPS: usize = 8;

#[derive(Module, Debug)]
struct Block<B: Backend> {
    first: LoraConv2d<B>,
    first_norm: GroupNorm<B>,
    second: LoraConv2d<B>,
    second_norm: GroupNorm<B>,
    /// Where the size changes.
    shortcut: Option<LoraConv2d<B>>,
}

#[derive(Module, Debug)]
pub struct ResNet<B: Backend> {
    stem: LoraConv2d<B>,
    stem_norm: GroupNorm<B>,
    blocks: Vec<Block<B>>,
    pool: AdaptiveAvgPool2d,
    head: LoraLinear<B>,
}

fn conv<B: Backend>(
    channels: [usize; 2],
    side: usize,
    stride: usize,
    device: &B::Device,
) -> LoraConv2d<B> {
    let around = side / 2;
    Conv2dConfig::new(channels, [side; 2])
        .with_stride([stride; 2])
        .with_padding(PaddingConfig2d::Explicit(around, around, around, around))
        .with_bias(false)
        .init(device)
        .into()
}

fn norm<B: Backend>(channels: usize, device: &B::Device) -> GroupNorm<B> {
    GroupNormConfig::new(GROUPS, channels).init(device)
}

impl<B: Backend> Block<B> {
    fn new(from: usize, to: usize, device: &B::Device) -> Self {
        let stride = if from == to { 1 } else { 2 };
        Self {
            first: conv([from, to], 3, stride, device),
            first_norm: norm(to, device),
            second: conv([to, to], 3, 1, device),
            second_norm: norm(to, device),
            shortcut: (from != to).then(|| conv([from, to], 1, stride, device)),
        }
    }

    fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let y = relu(group_norm(&self.first_norm, self.first.forward(x.clone())));
        let y = group_norm(&self.second_norm, self.second.forward(y));
        let x = self.shortcut.iter().fold(x, |x, it| it.forward(x));
        relu(x + y)
    }
}

impl<B: Backend> ResNet<B> {
    pub fn new(device: &B::Device) -> Self {
        let mut from = STAGES[0];
        let blocks = STAGES.into_iter().flat_map(|to| [to; 2]);
        let blocks = blocks.map(|to| Block::new(std::mem::replace(&mut from, to), to, device));
        Self {
            blocks: blocks.collect(),
            stem: conv([3, STAGES[0]], 3, 1, device),
            stem_norm: norm(STAGES[0], device),
            pool: AdaptiveAvgPool2dConfig::new([1, 1]).init(),
            head: LinearConfig::new(STAGES[2], 10).init(device).into(),
        }
    }

    /// Images `[batch, 3, 32, 32]` to logits `[batch, 10]`.
    pub fn forward(&self, images: Tensor<B, 4>) -> Tensor<B, 2> {
        let x = relu(group_norm(&self.stem_norm, self.stem.forward(images)));
        let x = self.blocks.iter().fold(x, |x, block| block.forward(x));
        self.head.forward(self.pool.forward(x).flatten::<2>(1, 3))
    }
}
