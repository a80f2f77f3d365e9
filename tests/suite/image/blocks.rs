//! The parts of the U-Net, as diffusers has them.

use burn::{
    module::Module,
    nn::{
        GroupNorm, GroupNormConfig, LayerNorm, LayerNormConfig, LinearConfig, PaddingConfig2d,
        conv::Conv2dConfig,
    },
    tensor::{
        Tensor,
        activation::{gelu, silu, softmax},
        backend::Backend,
    },
};
use burn_lora::{LoraLinear, nn::LoraConv2d};

use super::unet::{CONTEXT, TIME};
use crate::model::device;

const HEADS: usize = 2;

/// A level on the way down or up, or the middle.
#[derive(Module, Debug)]
pub struct Block<B: Backend> {
    pub resnets: Vec<Resnet<B>>,
    attentions: Vec<Transformer<B>>,
    pub downsamplers: Vec<Sampler<B>>,
    pub upsamplers: Vec<Sampler<B>>,
}

#[derive(Module, Debug)]
pub struct Resnet<B: Backend> {
    norm1: GroupNorm<B>,
    conv1: LoraConv2d<B>,
    time_emb_proj: LoraLinear<B>,
    norm2: GroupNorm<B>,
    conv2: LoraConv2d<B>,
    conv_shortcut: Option<LoraConv2d<B>>,
}

#[derive(Module, Debug)]
pub struct Sampler<B: Backend> {
    pub conv: LoraConv2d<B>,
}

#[derive(Module, Debug)]
pub struct Transformer<B: Backend> {
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

pub fn linear<B: Backend>(d_input: usize, d_output: usize, bias: bool) -> LoraLinear<B> {
    LinearConfig::new(d_input, d_output).with_bias(bias).init(&device::<B>()).into()
}

pub fn conv<B: Backend>(channels: [usize; 2], size: usize, stride: usize) -> LoraConv2d<B> {
    let padding = size / 2;
    let config = Conv2dConfig::new(channels, [size, size]).with_stride([stride, stride]);
    config
        .with_padding(PaddingConfig2d::Explicit(padding, padding, padding, padding))
        .init(&device::<B>())
        .into()
}

pub fn group_norm<B: Backend>(channels: usize, epsilon: f64) -> GroupNorm<B> {
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

    pub fn forward(&self, x: Tensor<B, 4>, time: Tensor<B, 2>) -> Tensor<B, 4> {
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
    pub fn new(resnets: &[[usize; 2]], attentions: usize) -> Self {
        let [.., [_, channels]] = *resnets else { panic!("a level has resnets") };
        Self {
            resnets: resnets.iter().map(|[from, to]| Resnet::new(*from, *to)).collect(),
            attentions: (0..attentions).map(|_| Transformer::new(channels)).collect(),
            downsamplers: vec![],
            upsamplers: vec![],
        }
    }

    /// The resnet with this number, and the attention behind it, if there is one.
    pub fn stage(
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
