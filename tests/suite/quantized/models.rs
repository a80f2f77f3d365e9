//! What becomes of models with a quantized base.

use burn::{
    module::{AutodiffModule, Module},
    nn::{EmbeddingConfig, LinearConfig},
    optim::{GradientsParams, Optimizer, SgdConfig},
    record::{FullPrecisionSettings, HalfPrecisionSettings, NamedMpkBytesRecorder, Recorder},
    tensor::Tensor,
};
use burn_lora::{
    LoraConfig, LoraError, LoraLinear, LoraModule, Scaling,
    nn::LoraEmbedding,
    quantize::{Quantization, QuantizeConfig, QuantizedWeight},
};

use super::{BOTH, config, linear, random};
use crate::{
    model::{Mlp, Plain, Train, device},
    oracle::{Matrix, assert_close, assert_identical, bits},
};

#[test]
fn trips_and_records_keep_every_bit() {
    for to in BOTH {
        let (layer, _) = linear::<Train>([70, 9], true, 3).quantize(to).unwrap();
        let expected = bits(layer.quantized().unwrap().dense().inner());
        let check = |layer: &LoraLinear<Train>| {
            assert_eq!(bits(layer.quantized().unwrap().dense().inner()), expected);
        };
        check(&layer.clone());
        check(&layer.clone().fork(&device::<Train>()));
        check(&layer.clone().to_device(&device::<Train>()));
        check(&LoraLinear::from_inner(layer.valid()));
        check(&layer.clone().no_grad());
        assert_eq!(bits(layer.valid().quantized().unwrap().dense()), expected);

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
        assert!(full.quantized().is_none());
        assert_identical(full.base.weight.val().inner(), blank().base.weight.val().inner());
    }
}

#[test]
fn only_adapters_train_and_are_seen() {
    let x = || random::<Train, 2>([5, 6], 8);
    let (base, report) = Mlp::<Train>::new(&device::<Train>()).quantize(Quantization::Nf4).unwrap();
    assert_eq!(report.layers.len(), 3);
    assert_eq!(report.layers[0].shape, [6, 8]);
    assert_eq!(report.layers[0].bytes_before, 6 * 8 * 4);
    let parameters = base.parameters();
    assert_eq!(parameters.total, 6 * 8 + 8 + 8 * 7 + 7 + 2 * 7 + 7 * 3);
    // Those of the packed weights, and of the biases and the norm.
    assert_eq!(parameters.base_bytes, report.bytes() + 4 * (8 + 7 + 2 * 7));
    // The biases and the norm.
    assert_eq!(Module::num_params(&base), 8 + 7 + 2 * 7);

    let mut model = base.attach(&config()).unwrap();
    assert_eq!(model.parameters().trainable, 3 * (6 + 8 + 8 + 7 + 7 + 3));
    let before: Vec<_> =
        model.blocks.iter().map(|it| bits(it.quantized().unwrap().dense().inner())).collect();
    let mut optimizer = SgdConfig::new().init();
    let start = model.forward(x()).inner();
    for _ in 0..3 {
        let grads = model.forward(x()).sin().sum().backward();
        let grads = GradientsParams::from_grads(grads, &model);
        assert_eq!(grads.len(), 6);
        model = optimizer.step(0.1, model, grads);
    }
    let after: Vec<_> =
        model.blocks.iter().map(|it| bits(it.quantized().unwrap().dense().inner())).collect();
    assert_eq!(before, after);
    assert!((model.forward(x()).inner() - start).abs().max().into_scalar() > 1e-3);
    assert_identical(model.detach().forward(x()).inner(), base.forward(x()).inner());

    // Records hold the adapters alone, and adapters go from a quantized base to another one.
    let set = model.adapters();
    let (other, _) = Mlp::<Train>::new(&device::<Train>()).quantize(Quantization::Int8).unwrap();
    assert_eq!(other.switch(&set).unwrap().parameters().trainable, model.parameters().trainable);
}

#[test]
fn merging_gives_a_layer_in_full_which_can_be_quantized_again() {
    let (layer, _) = linear::<Train>([70, 9], true, 3).quantize(Quantization::Int8).unwrap();
    let model = layer.attach(&config()).unwrap();
    let merged = model.merge().unwrap();
    assert!(merged.quantized().is_none() && model.quantized().is_some());
    let x: Tensor<Train, 2> = random([6, 70], 2);
    let expected = model.forward(x.clone()).inner().into_data().convert::<f64>();
    let expected = Matrix { rows: 6, cols: 9, data: expected.to_vec::<f64>().unwrap() };
    assert_close(merged.forward(x.clone()).inner(), &expected, 1e-5);
    let (again, report) = merged.quantize(Quantization::Int8).unwrap();
    assert!(report.layers[0].error > 1e-4 && report.layers[0].error < 0.01);
    assert_close(again.forward(x).inner(), &expected, 0.02);
}

#[test]
fn an_adapted_model_is_quantized_under_its_adapters() {
    let model = linear::<Train>([70, 9], true, 3).attach(&config()).unwrap();
    let (quantized, _) = model.quantize(Quantization::Int8).unwrap();
    assert_eq!(quantized.parameters().trainable, model.parameters().trainable);
    let x: Tensor<Train, 2> = random([6, 70], 2);
    let expected = model.forward(x.clone()).inner().into_data().convert::<f64>();
    let expected = Matrix { rows: 6, cols: 9, data: expected.to_vec::<f64>().unwrap() };
    assert_close(quantized.forward(x).inner(), &expected, 0.01);
}

#[test]
fn targets_excludes_and_refusals() {
    let base = Mlp::<Train>::new(&device::<Train>());
    let config = |to: Quantization| QuantizeConfig::from(to);
    let int8 = config(Quantization::Int8);
    let (some, report) = base.quantize(int8.clone().with_excludes(["head"])).unwrap();
    assert_eq!(report.layers.len(), 2);
    assert!(some.head.quantized().is_none());
    assert!(report.to_string().contains("blocks.0"), "{report}");
    let (some, _) = some.quantize(int8.clone().with_targets(["head"])).unwrap();
    let fails = |result: Result<(Mlp<Train>, _), LoraError>| result.err().unwrap().to_string();
    let error = fails(some.quantize(int8.clone()));
    assert_eq!(error, "`blocks.0` cannot be quantized: its weight is quantized already");
    let error = fails(base.quantize(int8.clone().with_targets(["heat"])));
    assert!(error.contains("`heat`") && error.contains("`head`"), "{error}");

    for (train, expected) in [
        (some.train_only(&["head"]), "train_only` names `head.weight`, which is quantized"),
        (some.train_only(&[".*"]), "names `blocks.0.weight`, which is quantized"),
        (
            some.attach(
                &LoraConfig::new(2, 2.0).with_targets(["blocks.0"]).with_modules_to_save(["head"]),
            ),
            "modules_to_save` names `head.weight`, which is quantized, and cannot train",
        ),
    ] {
        let error = train.err().unwrap().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let in_full = base.train_only(&["head"]).unwrap();
    let error = in_full.quantize(int8.clone()).err().unwrap().to_string();
    assert_eq!(error, "`head` cannot be quantized: its weight trains in full");

    let mut broken = base.clone();
    broken.blocks[1].base.weight = broken.blocks[1].base.weight.clone().map(|it| it / 0.0);
    let error = fails(broken.quantize(int8));
    assert_eq!(error, "`blocks.1` cannot be quantized: its weight has numbers that are not finite");
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
    let weight = |shape| QuantizedWeight::<Train>::new(random(shape, 1), Quantization::Nf4);
    let model = base().with_quantized([("0".to_owned(), weight([9, 64]))].into()).unwrap();
    assert!(model[0].quantized().is_some() && model[1].quantized().is_none());
    assert_eq!(model[1].forward(model[0].forward(random([3, 64], 2))).dims(), [3, 5]);
    let wrong = [("1".to_owned(), weight([9, 5])), ("2".to_owned(), weight([9, 5]))];
    let error = base().with_quantized(wrong.into()).err().unwrap().to_string();
    assert_eq!(
        error,
        "a quantized base does not fit; unexpected: 2; of the wrong shape: 1 (expected [9, 5], \
         found [5, 9])"
    );
}

#[test]
fn a_layer_says_what_it_holds() {
    let (layer, _) = linear::<Plain>([70, 9], true, 3).quantize(Quantization::Int8).unwrap();
    assert_eq!(layer.to_string(), "LoraLinear {weight: 9 x 70, Int8, params: 9}");
    let table = LoraEmbedding::from(EmbeddingConfig::new(5, 64).init::<Plain>(&device::<Plain>()));
    let (table, _) = table.quantize(Quantization::Nf4).unwrap();
    assert_eq!(table.quantized().unwrap().num_bytes(), 5 * 64 / 2 + 256 + 4);
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
    let (rounded, _) = base.quantize(Quantization::Nf4).unwrap();
    for scale in [1.0, 0.25, -3.0] {
        let config = LoraConfig::new(8, scale).with_scaling(Scaling::Alpha).with_bias(true);
        let [once, often] =
            [1, 5].map(|it| base.attach_loftq(Quantization::Nf4, &config, it).unwrap());
        // For weights without structure the largest 8 of 40 singular values are about half of the error.
        assert!(error(&once) < 0.9 * error(&rounded), "{} {}", error(&once), error(&rounded));
        assert!(error(&often) < error(&once), "{} {}", error(&often), error(&once));
        assert_eq!(often.adapter().unwrap().scale(), scale);
        // Nothing of the base trains, or is taken for something that was trained.
        let adapter = often.adapter().unwrap().num_trainable();
        assert_eq!(often.parameters().trainable, adapter);
        assert_eq!(often.adapters().num_params(), adapter);

        // The update is the best approximation of what is missing: its residual has no larger part along it.
        let adapter = once.adapter().unwrap();
        let weight = rounded.quantized().unwrap().dense().transpose();
        assert_identical(
            once.quantized().unwrap().dense().transpose().inner(),
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
#[should_panic(expected = "the quantized weight must be [9, 5] = [d_input, d_output], got [5, 9]")]
fn a_weight_of_another_shape_is_refused_by_a_layer_that_was_never_used() {
    let mut layer = LoraLinear::from(LinearConfig::new(9, 5).init::<Plain>(&device::<Plain>()));
    layer.set_quantized(QuantizedWeight::new(random([9, 5], 1), Quantization::Int8));
}

#[test]
fn loftq_of_a_layer_smaller_than_the_rank() {
    let base = linear::<Train>([70, 5], false, 3);
    let config = LoraConfig::new(8, 4.0).with_scaling(Scaling::AlphaOverRank);
    let model = base.attach_loftq(Quantization::Nf4, &config, 1).unwrap();
    // All that rounding took away is in the update.
    let weight = model.quantized().unwrap().dense().transpose().inner();
    let both = weight + model.adapter().unwrap().delta().inner();
    assert_close(both, &Matrix::random(70, 5, 3), 1e-5);
}
