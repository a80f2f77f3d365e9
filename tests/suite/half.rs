//! A base in half precision or quantized, with adapters in `f32`. The reference for half precision is
//! the same layer in `f32` with the same, rounded, numbers. On backends that have no numbers in half
//! precision there is nothing to test.

use burn::{
    module::{AutodiffModule, Module, ModuleMapper, Param},
    nn::{
        EmbeddingConfig, LinearConfig,
        attention::MultiHeadAttentionConfig,
        conv::{Conv1dConfig, Conv2dConfig, ConvTranspose2dConfig},
    },
    tensor::{
        DType, FloatDType, Int, Tensor,
        backend::Backend,
        ops::QuantizedTensor,
        quantization::{QTensorPrimitive, QuantLevel, QuantParam, QuantValue},
    },
};
use burn_lora::{
    Init, Lora, LoraConfig, LoraModule,
    nn::{LoraMhaInput, LoraMultiHeadAttention},
};

use crate::{
    model::{Mlp, Plain, Train, device},
    oracle::{Matrix, assert_close, assert_identical},
};

struct Cast(FloatDType);

impl<B: Backend> ModuleMapper<B> for Cast {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        param.map(|tensor| tensor.cast(self.0))
    }
}

fn config() -> LoraConfig {
    LoraConfig::new(2, 3.0).with_init(Init::RandomBoth)
}

/// The types in half precision that the backend has, with the error that one rounding makes.
fn types() -> Vec<(FloatDType, f64)> {
    let types = [(FloatDType::F16, DType::F16, 1e-3), (FloatDType::BF16, DType::BF16, 8e-3)];
    let known = types.into_iter().filter(|it| Plain::supports_dtype(&device::<Plain>(), it.1));
    known.map(|(dtype, _, error)| (dtype, error)).collect()
}

fn values<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Matrix {
    let data = tensor.into_data().convert::<f64>().to_vec().unwrap();
    Matrix { rows: 1, cols: data.len(), data }
}

fn input<const D: usize>(shape: [usize; D], dtype: FloatDType) -> Tensor<Train, D> {
    let size = shape.iter().product();
    Matrix::random(1, size, 3).tensor::<Train, D>(shape, &device::<Train>()).cast(dtype)
}

/// Compares output, gradients and the merged layer of `$base` in half precision with those in `f32`.
macro_rules! check {
    ($base:expr, $config:expr, $shape:expr) => {
        for (dtype, error) in types() {
            let base = $base.map(&mut Cast(dtype));
            let half = $config.init(base.clone());
            let mut full = $config.init(base.map(&mut Cast(FloatDType::F32)));
            full.set_adapter(half.adapter().cloned());
            let x = input($shape, dtype);
            let x_full = x.clone().cast(FloatDType::F32).require_grad();
            let x = x.require_grad();

            let (y, expected) = (half.forward(x.clone()), full.forward(x_full.clone()));
            assert_eq!(y.dtype(), DType::from(dtype));
            assert_close(y.clone(), &values(expected.clone()), 2.0 * error);
            let grads = y.cast(FloatDType::F32).sin().sum().backward();
            let expected = expected.sin().sum().backward();
            let (adapter, same) = (half.adapter().unwrap(), full.adapter().unwrap());
            for (factor, same) in [(&adapter.a, &same.a), (&adapter.b, &same.b)] {
                let gradient = factor.grad(&grads).unwrap();
                assert_eq!(gradient.dtype(), DType::F32);
                assert_close(gradient, &values(same.grad(&expected).unwrap()), 20.0 * error);
            }
            let (dx, expected) = (x.grad(&grads).unwrap(), x_full.grad(&expected).unwrap());
            assert_eq!(dx.dtype(), DType::from(dtype));
            assert_close(dx, &values(expected), 20.0 * error);

            let merged = Lora::new(half.clone()).merge().unwrap();
            assert_eq!(merged.base.weight.dtype(), DType::from(dtype));
            let y = merged.forward(x.detach());
            assert_eq!(y.dtype(), DType::from(dtype));
            assert_close(y, &values(full.forward(x_full)), 4.0 * error);
        }
    };
}

#[test]
fn linear() {
    let config = config().with_bias(true);
    for bias in [true, false] {
        let base = LinearConfig::new(5, 4).with_bias(bias).init::<Train>(&device::<Train>());
        check!(base.clone(), config, [3, 5]);
        check!(base.clone(), config, [2, 3, 5]);
    }
}

#[test]
fn convolutions() {
    let device = device::<Train>();
    for groups in [1, 2] {
        let base = Conv1dConfig::new(4, 6, 3).with_groups(groups).with_stride(2);
        check!(base.init::<Train>(&device), config().with_bias(true), [2, 4, 8]);
        let base = Conv2dConfig::new([4, 6], [3, 2]).with_groups(groups).with_bias(false);
        check!(base.init::<Train>(&device), config().with_bias(true), [2, 4, 5, 4]);
        let base = ConvTranspose2dConfig::new([4, 6], [3, 2]).with_groups(groups);
        check!(base.init::<Train>(&device), config(), [2, 4, 3, 2]);
    }
}

#[test]
fn embedding() {
    let base = EmbeddingConfig::new(7, 4).init::<Train>(&device::<Train>());
    let indices = || Tensor::<Train, 2, Int>::from_ints([[3, 1, 6], [0, 0, 5]], &device::<Train>());
    for (dtype, error) in types() {
        let base = base.clone().map(&mut Cast(dtype));
        let half = config().init(base.clone());
        let mut full = config().init(base.map(&mut Cast(FloatDType::F32)));
        full.set_adapter(half.adapter().cloned());
        let y = half.forward(indices());
        assert_eq!(y.dtype(), DType::from(dtype));
        assert_close(y.clone(), &values(full.forward(indices())), 4.0 * error);
        let logits = half.project(y.clone());
        assert_eq!(logits.dtype(), DType::from(dtype));
        let expected = full.project(y.cast(FloatDType::F32));
        assert_close(logits.clone(), &values(expected), 20.0 * error);
        let grads = logits.cast(FloatDType::F32).sum().backward();
        assert!(half.adapter().unwrap().a.grad(&grads).is_some());
    }
}

#[test]
fn attention() {
    let base = MultiHeadAttentionConfig::new(4, 2).with_dropout(0.0);
    let base = LoraMultiHeadAttention::from(base.init::<Train>(&device::<Train>()));
    for (dtype, error) in types() {
        let base = base.clone().map(&mut Cast(dtype));
        let half = base.attach(&config()).unwrap();
        let full = base.map(&mut Cast(FloatDType::F32)).switch(&half.adapters()).unwrap();
        let x = input([2, 3, 4], dtype);
        let y = half.forward(LoraMhaInput::self_attn(x.clone())).context;
        assert_eq!(y.dtype(), DType::from(dtype));
        let expected = full.forward(LoraMhaInput::self_attn(x.cast(FloatDType::F32))).context;
        assert_close(y, &values(expected), 8.0 * error);
    }
}

/// A model whose first block is quantized by one of Burn's own schemes.
fn quantized() -> Mlp<Plain> {
    let scheme = <QuantizedTensor<Plain> as QTensorPrimitive>::default_scheme()
        .with_value(QuantValue::Q8S)
        .with_level(QuantLevel::Tensor)
        .with_param(QuantParam::F32);
    let mut model = Mlp::<Plain>::new(&device::<Plain>());
    let weight = &mut model.blocks[0].base.weight;
    *weight = Param::from_tensor(weight.val().quantize_dynamic(&scheme));
    model
}

/// The model with its weights as numbers of `f32`.
fn dequantized(mut model: Mlp<Plain>) -> Mlp<Plain> {
    let weight = &mut model.blocks[0].base.weight;
    *weight = Param::from_tensor(weight.val().dequantize());
    model
}

#[test]
fn a_quantized_base_stays_quantized() {
    let base = quantized();
    let expected = base.blocks[0].base.weight.val().into_data();
    let unchanged = |model: &Mlp<Plain>| {
        let weight = model.blocks[0].base.weight.val();
        assert!(matches!(weight.dtype(), DType::QFloat(_)), "{:?}", weight.dtype());
        weight.into_data().assert_eq(&expected, true);
    };
    let x = || Matrix::random(10, 6, 5).tensor::<Plain, 2>([10, 6], &device::<Plain>());
    let model = base.attach(&config()).unwrap();
    unchanged(&model);
    let dense = dequantized(base.clone()).switch(&model.adapters()).unwrap();
    assert_close(model.forward(x()), &values(dense.forward(x())), 1e-5);
    let switched = base.switch(&model.adapters()).unwrap();
    unchanged(&switched);
    assert_identical(switched.forward(x()), model.forward(x()));
    unchanged(&model.detach());
    // The sum of a quantized weight and an update is not quantized.
    let merged = model.merge().unwrap();
    assert_eq!(merged.blocks[0].base.weight.dtype(), DType::F32);
    assert_close(merged.forward(x()), &values(dense.forward(x())), 1e-5);
}

#[test]
fn a_quantized_base_cannot_train() {
    let base = Mlp::<Train>::from_inner(quantized());
    let error = base.attach(&config()).unwrap_err().to_string();
    assert!(
        error.contains("`blocks.0` cannot carry an adapter: its weight is quantized"),
        "{error}"
    );
    // What is not quantized can.
    let model = base.attach(&config().with_targets(["head"])).unwrap();
    assert!(matches!(model.blocks[0].base.weight.dtype(), DType::QFloat(_)));
    let error = base.train_only(&["blocks"]).unwrap_err().to_string();
    assert!(error.contains("names `blocks.0.weight`, which is quantized"), "{error}");
}
