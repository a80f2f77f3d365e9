//! Empty inputs give empty outputs, of the shapes that the layers without adapters give.

use burn::{
    nn::{
        EmbeddingConfig, LinearConfig,
        attention::MultiHeadAttentionConfig,
        conv::{Conv1dConfig, Conv2dConfig, ConvTranspose2dConfig},
    },
    tensor::{Tensor, backend::Backend},
};
use burn_lora::{Init, LoraConfig, nn::LoraMhaInput};

use crate::{
    model::{Plain, Train, device},
    oracle::Matrix,
};

fn config() -> LoraConfig {
    LoraConfig::new(2, 3.0).with_init(Init::RandomBoth)
}

fn zeros<B: Backend, const D: usize>(shape: [usize; D]) -> Tensor<B, D> {
    Tensor::zeros(shape, &device::<B>())
}

/// Calls the test on a backend with autodiff, and on one without.
macro_rules! on_both {
    ($($test:ident),*) => {$(
        #[test]
        fn $test() {
            self::check::$test::<Train>();
            self::check::$test::<Plain>();
        }
    )*};
}

on_both!(linear, conv1d, conv2d, conv_transpose2d, embedding, attention, attention_to_nothing);

mod check {
    use super::*;

    pub fn linear<B: Backend>() {
        let layer =
            config().with_bias(true).init(LinearConfig::new(3, 4).init::<B>(&device::<B>()));
        assert_eq!(layer.forward(zeros::<B, 2>([0, 3])).dims(), [0, 4]);
        assert_eq!(layer.forward(zeros::<B, 3>([2, 0, 3])).dims(), [2, 0, 4]);
        assert_eq!(layer.forward(zeros::<B, 4>([0, 1, 2, 3])).dims(), [0, 1, 2, 4]);
    }

    pub fn conv1d<B: Backend>() {
        for groups in [1, 2] {
            let base = Conv1dConfig::new(4, 6, 3).with_groups(groups).init::<B>(&device::<B>());
            let y = config().with_bias(true).init(base).forward(zeros([0, 4, 8]));
            assert_eq!(y.dims(), [0, 6, 6]);
        }
    }

    pub fn conv2d<B: Backend>() {
        for groups in [1, 2] {
            let base =
                Conv2dConfig::new([4, 6], [3, 3]).with_groups(groups).init::<B>(&device::<B>());
            let y = config().with_bias(true).init(base).forward(zeros([0, 4, 8, 5]));
            assert_eq!(y.dims(), [0, 6, 6, 3]);
        }
    }

    pub fn conv_transpose2d<B: Backend>() {
        for groups in [1, 2] {
            let base = ConvTranspose2dConfig::new([4, 6], [3, 3]).with_groups(groups);
            let y = config().init(base.init::<B>(&device::<B>())).forward(zeros([0, 4, 8, 5]));
            assert_eq!(y.dims(), [0, 6, 10, 7]);
        }
    }

    pub fn embedding<B: Backend>() {
        let layer = config().init(EmbeddingConfig::new(5, 4).init::<B>(&device::<B>()));
        for [batch, length] in [[2, 0], [0, 3]] {
            let indices = Tensor::zeros([batch, length], &device::<B>());
            assert_eq!(layer.forward(indices).dims(), [batch, length, 4]);
            assert_eq!(layer.project(zeros([batch, length, 4])).dims(), [batch, length, 5]);
        }
    }

    pub fn attention<B: Backend>() {
        let base = MultiHeadAttentionConfig::new(4, 2).init::<B>(&device::<B>());
        let layer = config().init_attention(base);
        for [batch, length] in [[2, 0], [0, 3]] {
            let y = layer.forward(LoraMhaInput::self_attn(zeros([batch, length, 4])));
            assert_eq!(y.context.dims(), [batch, length, 4]);
            assert_eq!(y.weights.dims(), [batch, 2, length, length]);
        }
    }

    /// Nothing to attend to leaves the bias of the last projection.
    pub fn attention_to_nothing<B: Backend>() {
        let base = MultiHeadAttentionConfig::new(4, 2).init::<B>(&device::<B>());
        let layer = config().init_attention(base);
        let x = Matrix::random(6, 4, 1).tensor([2, 3, 4], &device::<B>());
        let y = layer.forward(LoraMhaInput::new(x, zeros([2, 0, 4]), zeros([2, 0, 4])));
        assert_eq!(y.weights.dims(), [2, 2, 3, 0]);
        let bias = layer.output.base.bias.as_ref().unwrap().val().into_data();
        for row in y.context.reshape([6, 4]).iter_dim(0) {
            row.reshape([4]).into_data().assert_eq(&bias, true);
        }
    }
}
