//! Quantised bases: what they hold, what is computed from them, and what becomes of them.

use burn::{
    module::{AutodiffModule, Module, Param},
    nn::{Embedding, EmbeddingConfig, Linear, LinearConfig, attention::MultiHeadAttentionConfig},
    optim::{GradientsParams, Optimizer, SgdConfig},
    record::{FullPrecisionSettings, HalfPrecisionSettings, NamedMpkBytesRecorder, Recorder},
    tensor::{Int, Tensor, TensorData, backend::Backend},
};
use burn_lora::{
    GgufType, Init, LoraConfig, LoraEmbedding, LoraError, LoraLinear, LoraMhaInput, LoraModule,
    LoraMultiHeadAttention, Quantisation, QuantiseConfig, QuantisedWeight, Scaling,
};
use proptest::prelude::*;
use safetensors::SafeTensors;

use crate::{
    model::{Mlp, Plain, Train, device},
    oracle::{Matrix, assert_close, assert_identical, bits},
};

const BOTH: [Quantisation; 2] = [Quantisation::Int8, Quantisation::Nf4];

fn random<B: Backend, const D: usize>(shape: [usize; D], seed: u64) -> Tensor<B, D> {
    let rows = shape[..D - 1].iter().product();
    Matrix::random(rows, shape[D - 1], seed).tensor(shape, &device::<B>())
}

fn linear<B: Backend>([d_input, d_output]: [usize; 2], bias: bool, seed: u64) -> LoraLinear<B> {
    let bias = bias.then(|| Param::from_tensor(random([d_output], seed + 1)));
    Linear { weight: Param::from_tensor(random([d_input, d_output], seed)), bias }.into()
}

/// A layer whose base is quantised, and one that holds what the codes stand for.
fn pair(layer: LoraLinear<Train>, to: Quantisation) -> [LoraLinear<Train>; 2] {
    let (quantised, _) = layer.quantise(to).unwrap();
    let weight = quantised.quantised().unwrap().dense().transpose();
    let mut dense = layer.no_grad();
    dense.base.weight = Param::from_tensor(weight.detach()).no_grad();
    [quantised, dense]
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
    let ours = QuantisedWeight::new(weight, Quantisation::Nf4);
    // Where two levels are equally near, either may be chosen, which the scales' rounding decides.
    let expected = matrix(&tensors, "nf4.doubled");
    assert_close(ours.dense(), &expected, 1e-6);
}

#[test]
fn blocks_of_gguf_are_held_to_the_bit() {
    let bytes = fixtures();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    for (name, kind) in
        [("Q8_0", GgufType::Q8_0), ("Q4_0", GgufType::Q4_0), ("Q4_1", GgufType::Q4_1)]
    {
        let data = tensors.tensor(&format!("{name}.data")).unwrap();
        let numbers = tensor(&tensors, &format!("{name}.numbers"));
        let from = |shape, data: &[u8]| {
            QuantisedWeight::<Plain>::from_gguf(kind, shape, data, &device::<Plain>())
        };
        let held = from(numbers.dims(), data.data()).unwrap();
        let largest = numbers.clone().abs().max().into_scalar();
        let error = (held.dense() - numbers).abs().max().into_scalar();
        // A GPU may multiply and add with one rounding.
        assert!(error <= 1e-7 * largest, "{name}: {error}");

        for (shape, cut, expected) in [
            ([7, 95], 0, "95 columns are no blocks of 32"),
            ([7, 96], 1, "bytes cannot be 7 x 96 numbers"),
            ([usize::MAX, 96], 0, "numbers"),
            ([1, usize::MAX - 31], 0, "numbers"),
            ([0, 96], data.data().len(), "0 bytes cannot be 0 x 96 numbers"),
        ] {
            let error = from(shape, &data.data()[cut..]).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let mut infinite = data.data().to_vec();
        infinite[..2].copy_from_slice(&[0, 0x7c]);
        let error = from([7, 96], &infinite).unwrap_err().to_string();
        assert_eq!(error, format!("a matrix of {name}: a scale is not finite"));
    }
}

/// What rounding may change in a number, of the largest in its block.
fn coarseness(to: Quantisation) -> f64 {
    match to {
        Quantisation::Int8 => 0.5 / 127.0,
        // Half of the widest gap between levels, and half a step of the scales.
        _ => 0.152 + 0.01,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn each_number_is_rounded_to_what_is_near(
        rows in 1_usize..7, columns in prop_oneof![1_usize..150, Just(64), Just(128)], seed in 0_u64..1000,
        to in prop_oneof![Just(Quantisation::Int8), Just(Quantisation::Nf4)],
    ) {
        let numbers = Matrix::random(rows, columns, seed);
        let weight = QuantisedWeight::<Plain>::new(numbers.tensor([rows, columns], &device::<Plain>()), to);
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
        seed in 0_u64..1000, to in prop_oneof![Just(Quantisation::Int8), Just(Quantisation::Nf4)],
    ) {
        let layer = linear::<Train>([d_input, d_output], bias, seed);
        let pair = pair(layer, to).map(|layer| match adapted {
            true => layer.attach(&config()).unwrap().into_inner(),
            false => layer,
        });
        let x = random([batch, d_input], seed + 2);
        let [quantised, dense] = pair.map(|layer| results(&layer, x.clone()));
        prop_assert_eq!(quantised, dense);
    }
}

fn fixtures() -> Vec<u8> {
    std::fs::read("tests/quantised/fixtures/quantised.safetensors").unwrap()
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
            let [quantised, dense] =
                pair(linear([130, 9], true, 3), to).map(|layer| match adapted {
                    true => layer.attach(&config()).unwrap().into_inner().valid(),
                    false => layer.valid(),
                });
            for rows in [1, 2, 4, 5] {
                let x: Tensor<Plain, 2> = random([rows, 130], 9);
                let expected = dense.forward(x.clone()).into_data().convert::<f64>();
                let expected = Matrix { rows, cols: 9, data: expected.to_vec::<f64>().unwrap() };
                assert_close(quantised.forward(x.clone()), &expected, 1e-5);
                let cube = quantised.forward(x.clone().reshape([1, rows, 130]));
                assert_eq!(cube.dims(), [1, rows, 9]);
                assert_close(cube, &expected, 1e-5);
            }
            let row: Tensor<Plain, 1> = random([130], 9);
            assert_eq!(quantised.forward(row).dims(), [9]);
            let nothing = Tensor::<Plain, 2>::zeros([0, 130], &device::<Plain>());
            assert_eq!(quantised.forward(nothing).dims(), [0, 9]);
        }
    }
}

#[test]
fn an_embedding_looks_up_and_projects() {
    let table = random::<Train, 2>([11, 70], 1);
    let layer = LoraEmbedding::from(Embedding { weight: Param::from_tensor(table) });
    let ids = Tensor::<Train, 2, Int>::from_ints([[3, 10, 0], [1, 3, 7]], &device::<Train>());
    for to in BOTH {
        let (quantised, _) = layer.quantise(to).unwrap();
        let mut dense = layer.clone();
        dense.base.weight = Param::from_tensor(quantised.quantised().unwrap().dense().detach());
        for adapted in [false, true] {
            let [quantised, dense] = [&quantised, &dense].map(|layer| match adapted {
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
            let ((ours, logits), (expected, data)) = (run(&quantised), run(&dense));
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
fn attention_has_quantised_projections() {
    let config = MultiHeadAttentionConfig::new(8, 2).with_dropout(0.0);
    let attention = LoraMultiHeadAttention::<Train>::from(config.init(&device::<Train>()));
    let (quantised, report) = attention.quantise(Quantisation::Int8).unwrap();
    let paths: Vec<_> = report.layers.iter().map(|it| it.path.as_str()).collect();
    assert_eq!(paths, ["query", "key", "value", "output"]);
    let x = random([2, 5, 8], 3);
    let [y, expected] = [&quantised, &attention]
        .map(|it| it.forward(LoraMhaInput::self_attn(x.clone())).context.inner());
    let error = (y - expected).abs().max().into_scalar();
    assert!(error > 0.0 && error < 0.05, "{error}");
}

#[test]
fn trips_and_records_keep_every_bit() {
    for to in BOTH {
        let (layer, _) = linear::<Train>([70, 9], true, 3).quantise(to).unwrap();
        let expected = bits(layer.quantised().unwrap().dense().inner());
        let check = |layer: &LoraLinear<Train>| {
            assert_eq!(bits(layer.quantised().unwrap().dense().inner()), expected);
        };
        check(&layer.clone());
        check(&layer.clone().fork(&device::<Train>()));
        check(&layer.clone().to_device(&device::<Train>()));
        check(&LoraLinear::from_inner(layer.valid()));
        check(&layer.clone().no_grad());
        assert_eq!(bits(layer.valid().quantised().unwrap().dense()), expected);

        let blank = || linear::<Train>([70, 9], true, 30);
        let full = NamedMpkBytesRecorder::<FullPrecisionSettings>::new();
        let bytes = Recorder::<Train>::record(&full, layer.clone().into_record(), ()).unwrap();
        assert!(bytes.len() < 70 * 9 * 4 * 3 / 4, "{} bytes", bytes.len());
        check(&blank().load_record(full.load(bytes, &device::<Train>()).unwrap()));
        let half = NamedMpkBytesRecorder::<HalfPrecisionSettings>::new();
        let bytes = Recorder::<Train>::record(&half, layer.clone().into_record(), ()).unwrap();
        check(&blank().load_record(half.load(bytes, &device::<Train>()).unwrap()));

        // A record of a base in full makes the layer one in full.
        let bytes = Recorder::<Train>::record(&full, blank().into_record(), ()).unwrap();
        let full = layer.load_record(full.load(bytes, &device::<Train>()).unwrap());
        assert!(full.quantised().is_none());
        assert_identical(full.base.weight.val().inner(), blank().base.weight.val().inner());
    }
}

#[test]
fn only_adapters_train_and_are_seen() {
    let x = || random::<Train, 2>([5, 6], 8);
    let (base, report) = Mlp::<Train>::new(&device::<Train>()).quantise(Quantisation::Nf4).unwrap();
    assert_eq!(report.layers.len(), 3);
    assert_eq!(report.layers[0].shape, [6, 8]);
    assert_eq!(report.layers[0].bytes_before, 6 * 8 * 4);
    let parameters = base.parameters();
    assert_eq!(parameters.total, 6 * 8 + 8 + 8 * 7 + 7 + 2 * 7 + 7 * 3);
    // The biases and the norm.
    assert_eq!(Module::num_params(&base), 8 + 7 + 2 * 7);

    let mut model = base.attach(&config()).unwrap();
    assert_eq!(model.parameters().trainable, 3 * (6 + 8 + 8 + 7 + 7 + 3));
    let before: Vec<_> =
        model.blocks.iter().map(|it| bits(it.quantised().unwrap().dense().inner())).collect();
    let mut optimizer = SgdConfig::new().init();
    let start = model.forward(x()).inner();
    for _ in 0..3 {
        let grads = model.forward(x()).sin().sum().backward();
        let grads = GradientsParams::from_grads(grads, &model);
        assert_eq!(grads.len(), 6);
        model = optimizer.step(0.1, model, grads);
    }
    let after: Vec<_> =
        model.blocks.iter().map(|it| bits(it.quantised().unwrap().dense().inner())).collect();
    assert_eq!(before, after);
    assert!((model.forward(x()).inner() - start).abs().max().into_scalar() > 1e-3);
    assert_identical(model.detach().forward(x()).inner(), base.forward(x()).inner());

    // Records hold the adapters alone, and adapters go from a quantised base to another one.
    let set = model.adapters();
    let (other, _) = Mlp::<Train>::new(&device::<Train>()).quantise(Quantisation::Int8).unwrap();
    assert_eq!(other.switch(&set).unwrap().parameters().trainable, model.parameters().trainable);
}

#[test]
fn merging_gives_a_layer_in_full_which_can_be_quantised_again() {
    let (layer, _) = linear::<Train>([70, 9], true, 3).quantise(Quantisation::Int8).unwrap();
    let model = layer.attach(&config()).unwrap();
    let merged = model.merge().unwrap();
    assert!(merged.quantised().is_none() && model.quantised().is_some());
    let x: Tensor<Train, 2> = random([6, 70], 2);
    let expected = model.forward(x.clone()).inner().into_data().convert::<f64>();
    let expected = Matrix { rows: 6, cols: 9, data: expected.to_vec::<f64>().unwrap() };
    assert_close(merged.forward(x.clone()).inner(), &expected, 1e-5);
    let (again, report) = merged.quantise(Quantisation::Int8).unwrap();
    assert!(report.layers[0].error > 1e-4 && report.layers[0].error < 0.01);
    assert_close(again.forward(x).inner(), &expected, 0.02);
}

#[test]
fn an_adapted_model_is_quantised_under_its_adapters() {
    let model = linear::<Train>([70, 9], true, 3).attach(&config()).unwrap();
    let (quantised, _) = model.quantise(Quantisation::Int8).unwrap();
    assert_eq!(quantised.parameters().trainable, model.parameters().trainable);
    let x: Tensor<Train, 2> = random([6, 70], 2);
    let expected = model.forward(x.clone()).inner().into_data().convert::<f64>();
    let expected = Matrix { rows: 6, cols: 9, data: expected.to_vec::<f64>().unwrap() };
    assert_close(quantised.forward(x).inner(), &expected, 0.01);
}

#[test]
fn targets_excludes_and_refusals() {
    let base = Mlp::<Train>::new(&device::<Train>());
    let config = |to: Quantisation| QuantiseConfig::from(to);
    let int8 = config(Quantisation::Int8);
    let (some, report) = base.quantise(int8.clone().with_excludes(["head"])).unwrap();
    assert_eq!(report.layers.len(), 2);
    assert!(some.head.quantised().is_none());
    assert!(report.to_string().contains("blocks.0"), "{report}");
    let (some, _) = some.quantise(int8.clone().with_targets(["head"])).unwrap();
    let fails = |result: Result<(Mlp<Train>, _), LoraError>| result.err().unwrap().to_string();
    let error = fails(some.quantise(int8.clone()));
    assert_eq!(error, "`blocks.0` cannot be quantised: its weight is quantised already");
    let error = fails(base.quantise(int8.clone().with_targets(["heat"])));
    assert!(error.contains("`heat`") && error.contains("`head`"), "{error}");

    for (train, expected) in [
        (some.train_only(&["head"]), "train_only` names `head.weight`, which is quantised"),
        (some.train_only(&[".*"]), "names `blocks.0.weight`, which is quantised"),
        (
            some.attach(
                &LoraConfig::new(2, 2.0).with_targets(["blocks.0"]).with_modules_to_save(["head"]),
            ),
            "modules_to_save` names `head.weight`, which is quantised, and cannot train",
        ),
    ] {
        let error = train.err().unwrap().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let in_full = base.train_only(&["head"]).unwrap();
    let error = in_full.quantise(int8.clone()).err().unwrap().to_string();
    assert_eq!(error, "`head` cannot be quantised: its weight trains in full");

    let mut broken = base.clone();
    broken.blocks[1].base.weight = broken.blocks[1].base.weight.clone().map(|it| it / 0.0);
    let error = fails(broken.quantise(int8));
    assert_eq!(error, "`blocks.1` cannot be quantised: its weight has numbers that are not finite");
}

#[test]
fn weights_from_elsewhere_are_put_where_they_belong() {
    // The base was never used: its own weights are not needed.
    let base = || {
        let layer = |[d_input, d_output]: [usize; 2]| {
            LoraLinear::from(LinearConfig::new(d_input, d_output).init::<Train>(&device::<Train>()))
        };
        vec![layer([64, 9]), layer([9, 5])]
    };
    let weight = |shape| QuantisedWeight::<Train>::new(random(shape, 1), Quantisation::Nf4);
    let model = base().with_quantised([("0".to_owned(), weight([9, 64]))].into()).unwrap();
    assert!(model[0].quantised().is_some() && model[1].quantised().is_none());
    assert_eq!(model[1].forward(model[0].forward(random([3, 64], 2))).dims(), [3, 5]);
    let wrong = [("1".to_owned(), weight([9, 5])), ("2".to_owned(), weight([9, 5]))];
    let error = base().with_quantised(wrong.into()).err().unwrap().to_string();
    assert_eq!(
        error,
        "a quantised base does not fit; unexpected: 2; of the wrong shape: 1 (expected [9, 5], \
         found [5, 9])"
    );
}

#[test]
fn a_layer_says_what_it_holds() {
    let (layer, _) = linear::<Plain>([70, 9], true, 3).quantise(Quantisation::Int8).unwrap();
    assert_eq!(layer.to_string(), "LoraLinear {weight: 9 x 70, Int8, params: 9}");
    let table = LoraEmbedding::from(EmbeddingConfig::new(5, 64).init::<Plain>(&device::<Plain>()));
    let (table, _) = table.quantise(Quantisation::Nf4).unwrap();
    assert_eq!(table.quantised().unwrap().num_bytes(), 5 * 64 / 2 + 256 + 4);
}

#[test]
fn loftq_starts_nearer_to_the_base() {
    let base = linear::<Train>([130, 40], true, 3);
    let x: Tensor<Train, 2> = random([6, 130], 2);
    let expected = base.forward(x.clone()).inner();
    let error = |layer: &LoraLinear<Train>| {
        let error = (layer.forward(x.clone()).inner() - expected.clone()).square().sum();
        f64::from(error.into_scalar()).sqrt()
    };
    let (rounded, _) = base.quantise(Quantisation::Nf4).unwrap();
    for scale in [1.0, 0.25, -3.0] {
        let config = LoraConfig::new(8, scale).with_scaling(Scaling::Alpha).with_bias(true);
        let [once, often] =
            [1, 5].map(|it| base.attach_loftq(Quantisation::Nf4, &config, it).unwrap());
        // For weights without structure the largest 8 of 40 singular values are about half of the error.
        assert!(error(&once) < 0.9 * error(&rounded), "{} {}", error(&once), error(&rounded));
        assert!(error(&often) < error(&once), "{} {}", error(&often), error(&once));
        assert_eq!(often.adapter().unwrap().scale(), scale);

        // The update is the best approximation of what is missing: its residual has no larger part along it.
        let adapter = once.adapter().unwrap();
        let weight = rounded.quantised().unwrap().dense().transpose();
        assert_identical(
            once.quantised().unwrap().dense().transpose().inner(),
            weight.clone().inner(),
        );
        let missing = base.base.weight.val().inner() - weight.inner();
        let rest = missing.clone() - adapter.delta().inner();
        let norm = |it: Tensor<Plain, 2>| f64::from(it.square().sum().into_scalar());
        let update = norm(adapter.delta().inner());
        let gap = norm(missing) - update - norm(rest);
        assert!(gap.abs() < 1e-4 * update, "{gap}");
        assert_eq!(once.parameters().trainable, 8 * (130 + 40) + 40);
    }
}

#[test]
fn a_large_matrix_is_unpacked_in_parts() {
    // More than 2 million numbers, in several parts, and a last part that is smaller.
    let [rows, columns] = [4200, 1030];
    let weight: Tensor<Train, 2> = random([rows, columns], 1);
    let weight = QuantisedWeight::new(weight, Quantisation::Int8);
    let layer = |quantised: bool| {
        let mut layer = linear::<Train>([1, 1], false, 2);
        layer.base.weight = Param::from_tensor(weight.dense().transpose().detach()).no_grad();
        if quantised {
            layer.set_quantised(weight.clone());
        }
        layer.attach(&config()).unwrap()
    };
    let run = |quantised| {
        let x = random::<Train, 2>([6, columns], 3).require_grad();
        let y = layer(quantised).forward(x.clone());
        let grads = y.clone().sin().sum().backward();
        [y.inner(), x.grad(&grads).unwrap()]
    };
    for (ours, expected) in run(true).into_iter().zip(run(false)) {
        let [rows, cols] = expected.dims();
        let data = expected.into_data().convert::<f64>().to_vec::<f64>().unwrap();
        assert_close(ours, &Matrix { rows, cols, data }, 1e-5);
    }
}
