//! The U-Net of `tests/image/make_fixtures.py`: the `UNet2DConditionModel` of diffusers with these options.

use burn::{
    module::Module,
    nn::{
        GroupNorm, GroupNormConfig, LayerNorm, LayerNormConfig, LinearConfig, PaddingConfig2d,
        conv::Conv2dConfig,
    },
    tensor::{
        Tensor, TensorData,
        activation::{gelu, silu, softmax},
        backend::Backend,
    },
};
use burn_lora::{LoraLinear, nn::LoraConv2d, peft::Renaming};
use burn_store::{ModuleSnapshot, PyTorchToBurnAdapter, SafetensorsStore};

use super::fixture;
use crate::model::device;

/// The channels of the two levels.
const CHANNELS: [usize; 2] = [4, 8];
const CONTEXT: usize = 6;
const TIME: usize = 4 * CHANNELS[0];
const HEADS: usize = 2;

#[derive(Module, Debug)]
pub struct UNet<B: Backend> {
    time_embedding: TimeEmbedding<B>,
    pub conv_in: LoraConv2d<B>,
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

/// A level on the way down or up, or the middle.
#[derive(Module, Debug)]
struct Block<B: Backend> {
    resnets: Vec<Resnet<B>>,
    attentions: Vec<Transformer<B>>,
    downsamplers: Vec<Sampler<B>>,
    upsamplers: Vec<Sampler<B>>,
}

#[derive(Module, Debug)]
struct Resnet<B: Backend> {
    norm1: GroupNorm<B>,
    conv1: LoraConv2d<B>,
    time_emb_proj: LoraLinear<B>,
    norm2: GroupNorm<B>,
    conv2: LoraConv2d<B>,
    conv_shortcut: Option<LoraConv2d<B>>,
}

#[derive(Module, Debug)]
struct Sampler<B: Backend> {
    conv: LoraConv2d<B>,
}

#[derive(Module, Debug)]
struct Transformer<B: Backend> {
    norm: GroupNorm<B>,
    proj_in: LoraConv2d<B>,
    transformer_blocks: Vec<TransformerBlock<B>>,
    proj_out: LoraConv2d<B>,
}

#[derive(Module, Debug)]
struct TransformerBlock<B: Backend> {
    norm1: LayerNorm<B>,
    attn1: Attention<B>,
    norm2: LayerNorm<B>,
    attn2: Attention<B>,
    norm3: LayerNorm<B>,
    ff: FeedForward<B>,
}

#[derive(Module, Debug)]
struct Attention<B: Backend> {
    to_q: LoraLinear<B>,
    to_k: LoraLinear<B>,
    to_v: LoraLinear<B>,
    to_out: Vec<LoraLinear<B>>,
}

#[derive(Module, Debug)]
struct FeedForward<B: Backend> {
    /// `net.0.proj` in Python.
    expand: LoraLinear<B>,
    /// `net.2` in Python.
    contract: LoraLinear<B>,
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

fn linear<B: Backend>(d_input: usize, d_output: usize, bias: bool) -> LoraLinear<B> {
    LinearConfig::new(d_input, d_output).with_bias(bias).init(&device::<B>()).into()
}

fn conv<B: Backend>(channels: [usize; 2], size: usize, stride: usize) -> LoraConv2d<B> {
    let padding = size / 2;
    let config = Conv2dConfig::new(channels, [size, size]).with_stride([stride, stride]);
    config
        .with_padding(PaddingConfig2d::Explicit(padding, padding, padding, padding))
        .init(&device::<B>())
        .into()
}

fn group_norm<B: Backend>(channels: usize, epsilon: f64) -> GroupNorm<B> {
    GroupNormConfig::new(2, channels).with_epsilon(epsilon).init(&device::<B>())
}

impl<B: Backend> Resnet<B> {
    fn new(d_input: usize, d_output: usize) -> Self {
        Self {
            norm1: group_norm(d_input, 1e-5),
            conv1: conv([d_input, d_output], 3, 1),
            time_emb_proj: linear(TIME, d_output, true),
            norm2: group_norm(d_output, 1e-5),
            conv2: conv([d_output, d_output], 3, 1),
            conv_shortcut: (d_input != d_output).then(|| conv([d_input, d_output], 1, 1)),
        }
    }

    fn forward(&self, x: Tensor<B, 4>, time: Tensor<B, 2>) -> Tensor<B, 4> {
        let hidden = self.conv1.forward(silu(self.norm1.forward(x.clone())));
        let time = self.time_emb_proj.forward(silu(time));
        let hidden = hidden + time.unsqueeze_dims::<4>(&[2, 3]);
        let hidden = self.conv2.forward(silu(self.norm2.forward(hidden)));
        match &self.conv_shortcut {
            Some(shortcut) => shortcut.forward(x) + hidden,
            None => x + hidden,
        }
    }
}

impl<B: Backend> Attention<B> {
    fn new(d_model: usize, d_context: usize) -> Self {
        Self {
            to_q: linear(d_model, d_model, false),
            to_k: linear(d_context, d_model, false),
            to_v: linear(d_context, d_model, false),
            to_out: vec![linear(d_model, d_model, true)],
        }
    }

    fn forward(&self, x: Tensor<B, 3>, context: Tensor<B, 3>) -> Tensor<B, 3> {
        let [batch, length, d_model] = x.dims();
        let d_head = d_model / HEADS;
        let heads = |it: Tensor<B, 3>| {
            let length = it.dims()[1];
            it.reshape([batch, length, HEADS, d_head]).swap_dims(1, 2)
        };
        let query = heads(self.to_q.forward(x)).div_scalar((d_head as f64).sqrt());
        let [key, value] =
            [&self.to_k, &self.to_v].map(|layer| heads(layer.forward(context.clone())));
        let weights = softmax(query.matmul(key.swap_dims(2, 3)), 3);
        let y = weights.matmul(value).swap_dims(1, 2).reshape([batch, length, d_model]);
        self.to_out[0].forward(y)
    }
}

impl<B: Backend> TransformerBlock<B> {
    fn new(d_model: usize) -> Self {
        let norm = || LayerNormConfig::new(d_model).init(&device::<B>());
        Self {
            norm1: norm(),
            attn1: Attention::new(d_model, d_model),
            norm2: norm(),
            attn2: Attention::new(d_model, CONTEXT),
            norm3: norm(),
            ff: FeedForward {
                expand: linear(d_model, 8 * d_model, true),
                contract: linear(4 * d_model, d_model, true),
            },
        }
    }

    fn forward(&self, x: Tensor<B, 3>, context: Tensor<B, 3>) -> Tensor<B, 3> {
        let normed = self.norm1.forward(x.clone());
        let x = x + self.attn1.forward(normed.clone(), normed);
        let x = x.clone() + self.attn2.forward(self.norm2.forward(x), context);
        let hidden = self.ff.expand.forward(self.norm3.forward(x.clone()));
        let mut halves = hidden.chunk(2, 2);
        let (gate, up) = (halves.pop().unwrap(), halves.pop().unwrap());
        x + self.ff.contract.forward(up * gelu(gate))
    }
}

impl<B: Backend> Transformer<B> {
    fn new(channels: usize) -> Self {
        Self {
            norm: group_norm(channels, 1e-6),
            proj_in: conv([channels, channels], 1, 1),
            transformer_blocks: vec![TransformerBlock::new(channels)],
            proj_out: conv([channels, channels], 1, 1),
        }
    }

    fn forward(&self, x: Tensor<B, 4>, context: Tensor<B, 3>) -> Tensor<B, 4> {
        let [batch, channels, height, width] = x.dims();
        let hidden = self.proj_in.forward(self.norm.forward(x.clone()));
        let hidden = hidden.reshape([batch, channels, height * width]).swap_dims(1, 2);
        let blocks = self.transformer_blocks.iter();
        let hidden = blocks.fold(hidden, |it, block| block.forward(it, context.clone()));
        let hidden = hidden.swap_dims(1, 2).reshape([batch, channels, height, width]);
        x + self.proj_out.forward(hidden)
    }
}

impl<B: Backend> Block<B> {
    fn new(resnets: &[[usize; 2]], attentions: usize) -> Self {
        let [.., [_, channels]] = *resnets else { panic!("a level has resnets") };
        Self {
            resnets: resnets.iter().map(|[from, to]| Resnet::new(*from, *to)).collect(),
            attentions: (0..attentions).map(|_| Transformer::new(channels)).collect(),
            downsamplers: vec![],
            upsamplers: vec![],
        }
    }

    /// The resnet with this number, and the attention behind it, if there is one.
    fn stage(
        &self,
        number: usize,
        x: Tensor<B, 4>,
        time: &Tensor<B, 2>,
        context: &Tensor<B, 3>,
    ) -> Tensor<B, 4> {
        let x = self.resnets[number].forward(x, time.clone());
        match self.attentions.get(number) {
            Some(attention) => attention.forward(x, context.clone()),
            None => x,
        }
    }
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
