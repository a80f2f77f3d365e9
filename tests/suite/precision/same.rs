//! A model that was set to bf16 and back gives the bits of one that never was.

use burn::{
    module::{Module, ModuleVisitor, Param},
    nn::{
        EmbeddingConfig, LinearConfig, PaddingConfig2d,
        attention::MultiHeadAttentionConfig,
        conv::{Conv1dConfig, Conv2dConfig, ConvTranspose2dConfig},
    },
    tensor::{DType, FloatDType, Int, Tensor, backend::Backend},
};
use burn_lora::{
    Init, LoraConfig, LoraLinear, LoraModule,
    nn::{
        LoraConv1d, LoraConv2d, LoraConvTranspose2d, LoraEmbedding, LoraMhaInput,
        LoraMultiHeadAttention, Precision,
    },
    quantize::Quantization,
};

use super::{Gradients, random};
use crate::{
    model::{Plain, Train, device, filled},
    oracle::bits,
};

/// The bits of the gradients of all parameters that have some.
fn gradients<M: Module<Train>>(model: &M, grads: &Gradients) -> Vec<Vec<u32>> {
    struct All<'a>(&'a Gradients, Vec<Vec<u32>>);
    impl ModuleVisitor<Train> for All<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Train, D>>) {
            self.1.extend(param.val().grad(self.0).map(bits));
        }
    }
    let mut all = All(grads, Vec::new());
    model.visit(&mut all);
    all.1
}

/// Checks the layer as it is and with an adapter.
#[track_caller]
fn check<M: Module<Train>, const D: usize, const E: usize>(
    base: M,
    x: Tensor<Train, D>,
    forward: impl Fn(&M, Tensor<Train, D>) -> Tensor<Train, E>,
) {
    let config = LoraConfig::new(3, 2.0).with_init(Init::RandomBoth).with_seed(4);
    let adapted = base.attach(&config).unwrap().into_inner();
    for model in [filled(base), adapted] {
        let run = |model: &M| {
            let x = x.clone().require_grad();
            let y = forward(model, x.clone());
            let grads = y.clone().sin().sum().backward();
            (bits(y), bits(x.grad(&grads).unwrap()), gradients(model, &grads))
        };
        let expected = run(&model);
        assert!(!expected.2.is_empty());
        let back = model.with_precision(Precision::Bf16).with_precision(Precision::F32);
        assert_eq!(run(&back), expected);
        assert_eq!(run(&model.with_precision(Precision::F32)), expected);
    }
}

#[test]
fn linear_layers() {
    for (size, rows, bias) in [([40, 33], 70, true), ([7, 9], 6, false), ([20, 4], 2, true)] {
        let base = LinearConfig::new(size[0], size[1]).with_bias(bias);
        let layer = LoraLinear::from(base.init(&device::<Train>()));
        check(layer, random([rows, size[0]], 1), |layer, x: Tensor<Train, 2>| layer.forward(x));
    }
}

#[test]
fn quantized_layers() {
    for to in [Quantization::Int8, Quantization::Nf4, Quantization::Bf16] {
        for rows in [3, 20] {
            let base = LoraLinear::from(LinearConfig::new(70, 33).init(&device::<Train>()));
            let (layer, _) = filled(base).quantize(to).unwrap();
            check(layer, random([rows, 70], 1), |layer, x: Tensor<Train, 2>| layer.forward(x));
        }
    }
}

#[test]
fn convolutions() {
    let device = device::<Train>();
    let flat = Conv2dConfig::new([3, 6], [3, 3]).with_padding(PaddingConfig2d::Same);
    let flat = LoraConv2d::from(flat.init(&device));
    check(flat, random([2, 3, 6, 7], 1), |layer, x| layer.forward(x));
    let line = LoraConv1d::from(Conv1dConfig::new(3, 6, 2).init(&device));
    check(line, random([2, 3, 9], 1), |layer, x| layer.forward(x));
    let back = LoraConvTranspose2d::from(ConvTranspose2dConfig::new([3, 6], [2, 2]).init(&device));
    check(back, random([2, 3, 4, 5], 1), |layer, x| layer.forward(x));
}

#[test]
fn tied_heads_and_their_losses() {
    let table = || LoraEmbedding::from(EmbeddingConfig::new(30, 12).init(&device::<Train>()));
    check(table(), random([2, 9, 12], 1), |layer, x| layer.project(x));
    let loss = |layer: &LoraEmbedding<Train>, x: Tensor<Train, 2>| {
        let targets: Vec<_> = (0..18).map(|it| it * 7 % 30).collect();
        layer.cross_entropy(x, Tensor::<Train, 1, Int>::from_ints(&*targets, &device::<Train>()))
    };
    check(table(), random([18, 12], 1), loss);
}

#[test]
fn attention() {
    let config = MultiHeadAttentionConfig::new(12, 3).with_dropout(0.0);
    let attention = || LoraMultiHeadAttention::from(config.init(&device::<Train>()));
    let forward = |layer: &LoraMultiHeadAttention<Train>, x| {
        layer.forward(LoraMhaInput::self_attn(x)).context
    };
    check(attention(), random([2, 7, 12], 1), forward);
    let context =
        |layer: &LoraMultiHeadAttention<Train>, x| layer.context(LoraMhaInput::self_attn(x));
    check(attention(), random([2, 7, 12], 1), context);
}

#[test]
fn a_base_in_half_precision_ignores_it() {
    let device = device::<Train>();
    if !Plain::supports_dtype(&crate::model::device::<Plain>(), DType::BF16) {
        return;
    }
    let layer = filled(LoraLinear::from(LinearConfig::new(40, 33).init::<Train>(&device)));
    let mut half = layer.clone().no_grad();
    half.base.weight = half.base.weight.map(|it| it.cast(FloatDType::BF16));
    half.base.bias = half.base.bias.map(|it| it.map(|it| it.cast(FloatDType::BF16)));
    let x = random::<Train, 2>([20, 40], 1).cast(FloatDType::BF16);
    let config = LoraConfig::new(3, 2.0).with_init(Init::RandomBoth).with_seed(4);
    for layer in [half.attach(&config).unwrap().into_inner(), half] {
        let of = |precision| layer.with_precision(precision).forward(x.clone()).into_data();
        assert_eq!(of(Precision::Bf16), of(Precision::F32));
    }
}
