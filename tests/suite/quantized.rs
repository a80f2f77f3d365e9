//! Quantized bases: what they hold, and what is computed from them.

mod gguf;
mod models;

use burn::{
    module::{AutodiffModule, Module, Param},
    nn::{Embedding, Linear, attention::MultiHeadAttentionConfig},
    tensor::{Int, Tensor, TensorData, backend::Backend},
};
use burn_lora::{
    Init, LoraConfig, LoraLinear, LoraModule,
    nn::{LoraEmbedding, LoraMhaInput, LoraMultiHeadAttention},
    quantize::{Quantization, QuantizedWeight},
};
use proptest::prelude::*;
use safetensors::SafeTensors;

use crate::{
    model::{Plain, Train, device, random_cases},
    oracle::{Matrix, assert_close, assert_identical, bits},
};

const BOTH: [Quantization; 2] = [Quantization::Int8, Quantization::Nf4];

fn random<B: Backend, const D: usize>(shape: [usize; D], seed: u64) -> Tensor<B, D> {
    let rows = shape[..D - 1].iter().product();
    Matrix::random(rows, shape[D - 1], seed).tensor(shape, &device::<B>())
}

fn linear<B: Backend>([d_input, d_output]: [usize; 2], bias: bool, seed: u64) -> LoraLinear<B> {
    let bias = bias.then(|| Param::from_tensor(random([d_output], seed + 1)));
    Linear { weight: Param::from_tensor(random([d_input, d_output], seed)), bias }.into()
}

/// A layer whose base is quantized, and one that holds what the codes stand for.
fn pair(layer: LoraLinear<Train>, to: Quantization) -> [LoraLinear<Train>; 2] {
    let (quantized, _) = layer.quantize(to).unwrap();
    let weight = quantized.quantized().unwrap().dense().transpose();
    let mut dense = layer.no_grad();
    dense.base.weight = Param::from_tensor(weight.detach()).no_grad();
    [quantized, dense]
}

/// The output, and the gradients of x and of the adapter.
fn results<const D: usize>(layer: &LoraLinear<Train>, x: Tensor<Train, D>) -> Vec<Vec<u32>> {
    let x = x.require_grad();
    let y = layer.forward(x.clone());
    let grads = y.clone().sin().sum().backward();
    let mut results = vec![bits(y.inner()), bits(x.grad(&grads).unwrap())];
    if let Some(adapter) = layer.adapter() {
        results.push(bits(adapter.a.val().grad(&grads).unwrap()));
        results.push(bits(adapter.b.val().grad(&grads).unwrap()));
    }
    results
}

fn config() -> LoraConfig {
    LoraConfig::new(3, 7.0).with_init(Init::RandomBoth).with_seed(5)
}

#[test]
fn nf4_is_that_of_bitsandbytes() {
    let bytes = fixtures();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let weight = tensor(&tensors, "weight");
    let ours = QuantizedWeight::new(weight, Quantization::Nf4);
    let expected = matrix(&tensors, "nf4.doubled");
    assert_close(ours.dense(), &expected, 1e-6);

    // The only block's scale is 1, which is the mean of all scales.
    let levels = tensor(&tensors, "nf4.levels");
    assert_identical(QuantizedWeight::new(levels.clone(), Quantization::Nf4).dense(), levels);
}

#[test]
fn nf4_of_a_file_is_held_to_the_bit() {
    // As bitsandbytes' own, which the quantized numbers are compared with above.
    let levels = tensor(&SafeTensors::deserialize(&fixtures()).unwrap(), "nf4.levels");
    let levels: Vec<f32> = levels.into_data().to_vec().unwrap();
    let mut levels = levels[..16].to_vec();
    levels.sort_by(f32::total_cmp);
    let codes: Vec<_> = (0..3 * 128 / 2).map(|it| (it * 89 % 256) as u8).collect();
    let scales: Vec<_> = (0..6).map(|it| 0.3 + 0.17 * it as f32).collect();
    let from = |shape, levels: &[f32], codes: &[u8], scales: &[f32]| {
        let scales = scales.to_vec();
        QuantizedWeight::<Plain>::from_nf4(shape, levels, codes, scales, &device::<Plain>())
    };
    let held = from([3, 128], &levels, &codes, &scales).unwrap();
    let number = |place: usize| {
        let byte = codes[place / 2];
        let code = if place.is_multiple_of(2) { byte / 16 } else { byte % 16 };
        levels[usize::from(code)] * scales[place / 64]
    };
    let expected: Vec<_> = (0..3 * 128).map(|place| number(place).to_bits()).collect();
    assert_eq!(bits(held.dense()), expected);

    for (shape, cut, expected) in [
        ([3, 128], 0, "its levels are not those of NF4"),
        ([4, 96], 16, "96 columns are no blocks of 64"),
        ([3, 64], 16, "192 bytes cannot be 3 x 64 numbers"),
        ([usize::MAX, 128], 16, "192 bytes cannot be"),
        ([0, 128], 16, "192 bytes cannot be 0 x 128 numbers"),
    ] {
        let error = from(shape, &levels[..cut], &codes, &scales).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let error = from([3, 128], &levels, &codes, &scales[1..]).unwrap_err().to_string();
    assert!(error.contains("5 scales cannot be those of 3 x 128 numbers"), "{error}");
    let infinite = [&[f32::INFINITY], &scales[1..]].concat();
    let error = from([3, 128], &levels, &codes, &infinite).unwrap_err().to_string();
    assert_eq!(error, "a matrix of bitsandbytes: a scale is not finite");
}

/// What rounding may change in a number, of the largest in its block.
fn coarseness(to: Quantization) -> f64 {
    match to {
        Quantization::Int8 => 0.5 / 127.0,
        // Half of the widest gap between levels, and half a step of the scales.
        _ => 0.152 + 0.01,
    }
}

proptest! {
    #![proptest_config(random_cases(12))]

    #[test]
    fn each_number_is_rounded_to_what_is_near(
        rows in 1_usize..7, columns in prop_oneof![1_usize..150, Just(64), Just(128)], seed in 0_u64..1000,
        to in prop_oneof![Just(Quantization::Int8), Just(Quantization::Nf4)],
    ) {
        let numbers = Matrix::random(rows, columns, seed);
        let weight = QuantizedWeight::<Plain>::new(numbers.tensor([rows, columns], &device::<Plain>()), to);
        prop_assert_eq!(weight.shape(), [rows, columns]);
        let dense = weight.dense();
        prop_assert_eq!(dense.dims(), [rows, columns]);
        let dense = dense.into_data().convert::<f64>().to_vec::<f64>().unwrap();
        for (index, (before, after)) in numbers.data.iter().zip(&dense).enumerate() {
            let (row, block) = (index / columns, index % columns / 64);
            let block = block * 64..columns.min(block * 64 + 64);
            let largest = block.map(|col| numbers.at(row, col).abs()).fold(0.0, f64::max);
            prop_assert!((before - after).abs() <= coarseness(to) * largest + 1e-3, "{} {}", before, after);
        }
    }

    #[test]
    fn outputs_and_gradients_are_those_of_the_rounded_weight(
        // Of fewer rows CPU backends add the products in another order.
        batch in 5_usize..40, d_input in 1_usize..140, d_output in 1_usize..40, bias: bool, adapted: bool,
        seed in 0_u64..1000, to in prop_oneof![Just(Quantization::Int8), Just(Quantization::Nf4)],
    ) {
        let layer = linear::<Train>([d_input, d_output], bias, seed);
        let pair = pair(layer, to).map(|layer| match adapted {
            true => layer.attach(&config()).unwrap().into_inner(),
            false => layer,
        });
        let x = random([batch, d_input], seed + 2);
        let [quantized, dense] = pair.map(|layer| results(&layer, x.clone()));
        prop_assert_eq!(quantized, dense);
    }
}

fn fixtures() -> Vec<u8> {
    std::fs::read("tests/quantized/fixtures/quantized.safetensors").unwrap()
}

fn matrix(tensors: &SafeTensors, name: &str) -> Matrix {
    let view = tensors.tensor(name).unwrap();
    let numbers = view.data().as_chunks().0.iter().map(|&it| f64::from(f32::from_le_bytes(it)));
    Matrix { rows: view.shape()[0], cols: view.shape()[1], data: numbers.collect() }
}

fn tensor(tensors: &SafeTensors, name: &str) -> Tensor<Plain, 2> {
    let matrix = matrix(tensors, name);
    matrix.tensor([matrix.rows, matrix.cols], &device::<Plain>())
}

#[test]
fn inputs_of_any_rank_and_few_rows() {
    for to in BOTH {
        for adapted in [false, true] {
            let [quantized, dense] =
                pair(linear([130, 9], true, 3), to).map(|layer| match adapted {
                    true => layer.attach(&config()).unwrap().into_inner().valid(),
                    false => layer.valid(),
                });
            for rows in [1, 2, 4, 5] {
                let x: Tensor<Plain, 2> = random([rows, 130], 9);
                let expected = dense.forward(x.clone()).into_data().convert::<f64>();
                let expected = Matrix { rows, cols: 9, data: expected.to_vec::<f64>().unwrap() };
                assert_close(quantized.forward(x.clone()), &expected, 1e-5);
                let cube = quantized.forward(x.clone().reshape([1, rows, 130]));
                assert_eq!(cube.dims(), [1, rows, 9]);
                assert_close(cube, &expected, 1e-5);
            }
            let row: Tensor<Plain, 1> = random([130], 9);
            assert_eq!(quantized.forward(row).dims(), [9]);
            let nothing = Tensor::<Plain, 2>::zeros([0, 130], &device::<Plain>());
            assert_eq!(quantized.forward(nothing).dims(), [0, 9]);
        }
    }
}

#[test]
fn an_embedding_looks_up_and_projects() {
    let table = random::<Train, 2>([11, 70], 1);
    let layer = LoraEmbedding::from(Embedding { weight: Param::from_tensor(table) });
    let ids = Tensor::<Train, 2, Int>::from_ints([[3, 10, 0], [1, 3, 7]], &device::<Train>());
    for to in BOTH {
        let (quantized, _) = layer.quantize(to).unwrap();
        let mut dense = layer.clone();
        dense.base.weight = Param::from_tensor(quantized.quantized().unwrap().dense().detach());
        for adapted in [false, true] {
            let [quantized, dense] = [&quantized, &dense].map(|layer| match adapted {
                true => layer.attach(&config()).unwrap().into_inner(),
                false => layer.clone(),
            });
            let run = |layer: &LoraEmbedding<Train>| {
                let hidden = layer.forward(ids.clone());
                let x = random::<Train, 3>([2, 3, 70], 4).require_grad();
                let logits = layer.project(x.clone());
                let mut results = vec![bits(hidden.clone().inner())];
                let loss = logits.clone().sin().sum() + hidden.sin().sum();
                let grads = loss.backward();
                results.push(bits(x.grad(&grads).unwrap()));
                results.extend(layer.adapter().map(|it| bits(it.a.val().grad(&grads).unwrap())));
                (results, logits.inner().into_data().convert::<f64>().to_vec::<f64>().unwrap())
            };
            let ((ours, logits), (expected, data)) = (run(&quantized), run(&dense));
            assert_eq!(ours, expected);
            let logits = Tensor::<Plain, 1>::from_data(
                TensorData::new(logits, [66]).convert::<f32>(),
                &device::<Plain>(),
            );
            assert_close(logits, &Matrix { rows: 6, cols: 11, data }, 1e-5);
        }
    }
}

#[test]
fn attention_has_quantized_projections() {
    let config = MultiHeadAttentionConfig::new(8, 2).with_dropout(0.0);
    let attention = LoraMultiHeadAttention::<Train>::from(config.init(&device::<Train>()));
    let (quantized, report) = attention.quantize(Quantization::Int8).unwrap();
    let paths: Vec<_> = report.layers.iter().map(|it| it.path.as_str()).collect();
    assert_eq!(paths, ["query", "key", "value", "output"]);
    let x = random([2, 5, 8], 3);
    let [y, expected] = [&quantized, &attention]
        .map(|it| it.forward(LoraMhaInput::self_attn(x.clone())).context.inner());
    let error = (y - expected).abs().max().into_scalar();
    assert!(error > 0.0 && error < 0.05, "{error}");
}

#[test]
fn a_large_matrix_is_unpacked_in_parts() {
    // More than 2 million numbers, in several parts, and a last part that is smaller.
    let [rows, columns] = [4200, 1030];
    let weight: Tensor<Train, 2> = random([rows, columns], 1);
    let weight = QuantizedWeight::new(weight, Quantization::Int8);
    let layer = |quantized: bool| {
        let mut layer = linear::<Train>([1, 1], false, 2);
        layer.base.weight = Param::from_tensor(weight.dense().transpose().detach()).no_grad();
        if quantized {
            layer.set_quantized(weight.clone());
        }
        layer.attach(&config()).unwrap()
    };
    let run = |quantized| {
        let x = random::<Train, 2>([6, columns], 3).require_grad();
        let y = layer(quantized).forward(x.clone());
        let grads = y.clone().sin().sum().backward();
        [y.inner(), x.grad(&grads).unwrap()]
    };
    for (ours, expected) in run(true).into_iter().zip(run(false)) {
        let [rows, cols] = expected.dims();
        let data = expected.into_data().convert::<f64>().to_vec::<f64>().unwrap();
        assert_close(ours, &Matrix { rows, cols, data }, 1e-5);
    }
}
