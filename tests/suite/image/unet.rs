//! The U-Net of `tests/image/make_fixtures.py`: the `UNet2DConditionModel` of diffusers with these options.

use burn::{
    module::Module,
    nn::GroupNorm,
    tensor::{Tensor, TensorData, activation::silu, backend::Backend},
};
use burn_lora::{LoraLinear, nn::LoraConv2d, peft::Renaming};
use burn_store::{ModuleSnapshot, PyTorchToBurnAdapter, SafetensorsStore};

use super::{
    blocks::{Block, Sampler, conv, group_norm, linear},
    fixture,
};

/// The channels of the two levels.
const CHANNELS: [usize; 2] = [4, 8];
pub const CONTEXT: usize = 6;
pub const TIME: usize = 4 * CHANNELS[0];

#[derive(Module, Debug)]
pub struct UNet<B: Backend> {
    time_embedding: TimeEmbedding<B>,
    conv_in: LoraConv2d<B>,
    down_blocks: Vec<Block<B>>,
    /// `mid_block` in Python.
    middle: Block<B>,
    up_blocks: Vec<Block<B>>,
    conv_norm_out: GroupNorm<B>,
    conv_out: LoraConv2d<B>,
}

#[derive(Module, Debug)]
struct TimeEmbedding<B: Backend> {
    linear_1: LoraLinear<B>,
    linear_2: LoraLinear<B>,
}

/// From the names in Python to the paths here.
pub fn names() -> Renaming {
    let mut pairs = Vec::new();
    for (theirs, ours) in [
        ("down_blocks.*", "down_blocks.*"),
        ("up_blocks.*", "up_blocks.*"),
        ("mid_block", "middle"),
    ] {
        for (layer, field) in [("net.0.proj", "expand"), ("net.2", "contract")] {
            let block = "attentions.*.transformer_blocks.*.ff";
            pairs.push((format!("{theirs}.{block}.{layer}"), format!("{ours}.{block}.{field}")));
        }
    }
    pairs.push(("mid_block".to_owned(), "middle".to_owned()));
    Renaming::new(pairs)
}

impl<B: Backend> UNet<B> {
    /// The base that the fixtures were made for.
    pub fn base() -> Self {
        let [first, second] = CHANNELS;
        let sampler =
            |channels, stride| vec![Sampler { conv: conv([channels, channels], 3, stride) }];
        let mut down = Block::new(&[[first, first]], 1);
        down.downsamplers = sampler(first, 2);
        let mut up = Block::new(&[[2 * second, second], [first + second, second]], 0);
        up.upsamplers = sampler(second, 1);
        let mut model = Self {
            time_embedding: TimeEmbedding {
                linear_1: linear(first, TIME, true),
                linear_2: linear(TIME, TIME, true),
            },
            conv_in: conv([3, first], 3, 1),
            down_blocks: vec![down, Block::new(&[[first, second]], 0)],
            middle: Block::new(&[[second, second], [second, second]], 1),
            up_blocks: vec![up, Block::new(&[[first + second, first], [2 * first, first]], 2)],
            conv_norm_out: group_norm(first, 1e-5),
            conv_out: conv([first, 3], 3, 1),
        };
        let store = SafetensorsStore::from_file(fixture("base.safetensors"))
            .with_from_adapter(PyTorchToBurnAdapter)
            .with_key_remapping(r"^mid_block\.", "middle.")
            .with_key_remapping(r"\.net\.0\.proj\.", ".expand.")
            .with_key_remapping(r"\.net\.2\.", ".contract.");
        let result = model.load_from(&mut { store }).unwrap();
        assert!(result.missing.is_empty(), "{result}");
        model
    }

    /// What noise the images `[batch, 3, height, width]` have at these times `[batch]`, if they show the context
    /// `[batch, length, 6]`.
    pub fn forward(
        &self,
        x: Tensor<B, 4>,
        times: Tensor<B, 1>,
        context: Tensor<B, 3>,
    ) -> Tensor<B, 4> {
        let time = self.time_embedding.linear_1.forward(waves(times));
        let time = &self.time_embedding.linear_2.forward(silu(time));
        let mut x = self.conv_in.forward(x);
        let mut seen = vec![x.clone()];
        for block in &self.down_blocks {
            for number in 0..block.resnets.len() {
                x = block.stage(number, x, time, &context);
                seen.push(x.clone());
            }
            for sampler in &block.downsamplers {
                x = sampler.conv.forward(x);
                seen.push(x.clone());
            }
        }
        x = self.middle.stage(0, x, time, &context);
        x = self.middle.resnets[1].forward(x, time.clone());
        for block in &self.up_blocks {
            for number in 0..block.resnets.len() {
                x = Tensor::cat(vec![x, seen.pop().unwrap()], 1);
                x = block.stage(number, x, time, &context);
            }
            for sampler in &block.upsamplers {
                x = sampler.conv.forward(doubled(x));
            }
        }
        self.conv_out.forward(silu(self.conv_norm_out.forward(x)))
    }
}

/// The cosines and sines of the times.
fn waves<B: Backend>(times: Tensor<B, 1>) -> Tensor<B, 2> {
    let half = CHANNELS[0] / 2;
    let speed = |index: usize| (-(10000f64.ln()) * index as f64 / half as f64).exp() as f32;
    let speeds: Vec<_> = (0..half).map(speed).collect();
    let speeds = Tensor::<B, 1>::from_data(TensorData::new(speeds, [half]), &times.device());
    let angles = times.unsqueeze_dim::<2>(1) * speeds.unsqueeze_dim::<2>(0);
    Tensor::cat(vec![angles.clone().cos(), angles.sin()], 1)
}

/// Images twice as high and wide, with each element four times.
fn doubled<B: Backend>(x: Tensor<B, 4>) -> Tensor<B, 4> {
    let [batch, channels, height, width] = x.dims();
    let wide = x.reshape([batch, channels, height * width, 1]).repeat_dim(3, 2);
    let wide = wide.reshape([batch, channels * height, 1, 2 * width]).repeat_dim(2, 2);
    wide.reshape([batch, channels, 2 * height, 2 * width])
}
