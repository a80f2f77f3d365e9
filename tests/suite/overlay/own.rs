//! The overlay on a user's own modules: in training, in records, and together with layers that have
//! adapters themselves.

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::{
    module::{AutodiffModule, Module, Param},
    nn::{
        BatchNorm, BatchNormConfig, Embedding, EmbeddingConfig, Linear, LinearConfig,
        conv::{Conv2d, Conv2dConfig},
    },
    optim::{AdamWConfig, GradientsParams, Optimizer},
    record::{FullPrecisionSettings, NamedMpkBytesRecorder, Recorder},
    tensor::{Int, Tensor, backend::Backend},
};
use burn_lora::{
    Lora, LoraAdapters, LoraConfig, LoraError, LoraLinear, LoraModule,
    overlay::Overlay,
    quantize::{Quantization, QuantizeConfig},
    serve::MultiLora,
};

use super::{config, input, values};
use crate::{
    model::{Mlp, Plain, PlainMlp, Train, device},
    oracle::{Matrix, assert_close, assert_identical, bits},
};

/// A user's own module, with a matrix that belongs to no layer.
#[derive(Module, Debug)]
struct Own<B: Backend> {
    mixer: Param<Tensor<B, 3>>,
    table: Embedding<B>,
    norm: BatchNorm<B>,
    head: Linear<B>,
}

impl<B: Backend> Own<B> {
    fn new() -> Self {
        let device = device::<B>();
        Self {
            mixer: Param::from_tensor(Matrix::random(1, 24, 4).tensor([4, 2, 3], &device)),
            table: EmbeddingConfig::new(5, 4).init(&device),
            norm: BatchNormConfig::new(6).init(&device),
            head: LinearConfig::new(6, 3).init(&device),
        }
        .drawn()
    }

    /// The first use draws the weights. Clones of an unused module would each draw their own.
    fn drawn(self) -> Self {
        let _ = self.forward(ids());
        self
    }

    fn forward(&self, ids: Tensor<B, 2, Int>) -> Tensor<B, 2> {
        let x = self.table.forward(ids).flatten::<2>(0, 1);
        let x = x.matmul(self.mixer.val().reshape([4, 6]));
        self.head.forward(self.norm.forward(x))
    }
}

fn ids<B: Backend>() -> Tensor<B, 2, Int> {
    Tensor::from_data([[0, 3, 1], [2, 2, 4]], &device::<B>())
}

fn statistics(own: &Own<Train>) -> Vec<u32> {
    [own.norm.running_mean.value_sync(), own.norm.running_var.value_sync()].map(bits).concat()
}

/// Trains for some steps.
fn train<M>(
    mut model: Lora<Train, Overlay<Train, M>>,
    pass: impl Fn(&M) -> Tensor<Train, 2>,
) -> Lora<Train, Overlay<Train, M>>
where
    M: AutodiffModule<Train>,
{
    let mut optimizer =
        AdamWConfig::new().with_weight_decay(0.5).init::<Train, Lora<Train, Overlay<Train, M>>>();
    for _ in 0..5 {
        let grads = model.with_adapters(&pass).sin().sum().backward();
        let grads = GradientsParams::from_grads(grads, &model);
        model = optimizer.step(0.05, model, grads);
    }
    model
}

#[test]
fn a_module_of_ones_own_with_running_statistics() {
    let own = Own::<Train>::new();
    // Statistics that differ from those of a new norm. The last update is still pending in Burn.
    for _ in 0..3 {
        let _ = own.forward(ids());
    }
    let before = statistics(&own);
    let evaluated = own.valid().forward(ids());
    let model = Lora::overlay(own.clone()).with_own_statistics().attach(&config()).unwrap();
    let set = model.adapters();
    let paths: Vec<_> = set.iter().map(|(path, it)| (path, it.shape())).collect();
    assert_eq!(paths, [("head", [6, 3]), ("mixer", [4, 6]), ("table", [5, 4])]);

    let model = train(model, |own| own.forward(ids()));
    assert_eq!(statistics(&own), before, "the statistics moved");
    assert_eq!(statistics(&model.detach()), before);
    assert_identical(own.valid().forward(ids()), evaluated.clone());
    let base: Own<Train> = model.detach();
    assert_identical(base.valid().forward(ids()), evaluated);
}

#[test]
fn running_statistics_stay_when_a_pass_panics() {
    let own = Own::<Train>::new();
    let config = config().with_targets(["mixer"]);
    let model = Lora::overlay(own.clone()).with_own_statistics().attach(&config).unwrap();
    let before = statistics(&own);
    let pass = AssertUnwindSafe(|| {
        model.with_adapters(|own| {
            let _ = own.forward(ids());
            panic!("in the middle of the pass");
        })
    });
    assert!(catch_unwind(pass).is_err());
    assert_eq!(statistics(&own), before);
}

#[test]
fn records_hold_what_trains_and_nothing_else() {
    let own = Own::<Train>::new();
    let config = config().with_targets(["table", "mixer"]).with_modules_to_save(["head"]);
    let model = Lora::overlay(own.clone()).with_own_statistics().attach(&config).unwrap();
    let model = train(model, |own| own.forward(ids()));
    assert_ne!(bits(model.model().head.weight.val()), bits(own.head.weight.val()));
    let base: Own<Train> = model.detach();
    assert_identical(base.mixer.val(), own.mixer.val());
    assert_identical(base.head.weight.val(), own.head.weight.val());

    let recorder = NamedMpkBytesRecorder::<FullPrecisionSettings>::new();
    let record = model.clone().into_record();
    let trained: Vec<_> = record.parameters.iter().map(|it| it.path.clone()).collect();
    let norm = ["norm.gamma", "norm.beta", "norm.running_mean", "norm.running_var"];
    assert_eq!(record.adapters.len(), 2);
    assert_eq!(trained, [&norm[..], &["head.weight", "head.bias"]].concat());
    let bytes = recorder.record(record, ()).unwrap();
    let load = || recorder.load(bytes.clone(), &device::<Train>()).unwrap();
    let restored = Lora::overlay(own.clone()).with_own_statistics().load_record(load());
    let y = |model: &Lora<Train, Overlay<Train, Own<Train>>>| {
        model.valid().with_adapters(|own| own.forward(ids()))
    };
    assert_identical(y(&restored), y(&model));
    // Further training gives the same as with the original.
    assert_eq!(restored.parameters().trainable, model.parameters().trainable);
    let ids_of = |model: &Lora<Train, Overlay<Train, Own<Train>>>| {
        let record = model.clone().into_record();
        (record.parameters[4].values.id, record.adapters[0].adapter.a.id)
    };
    assert_eq!(ids_of(&restored), ids_of(&model));
}

#[test]
#[should_panic = "`mixer` has rank 1 and scale 1, and rank 2 and scale 0.7 in the record"]
fn a_record_of_other_adapters_is_refused_by_layer() {
    let own = Own::<Train>::new();
    let model = |config| Lora::overlay(own.clone()).with_own_statistics().attach(&config).unwrap();
    let record = model(config().with_targets(["table", "mixer"])).into_record();
    model(LoraConfig::new(1, 1.0).with_targets(["mixer"])).load_record(record);
}

#[test]
fn a_record_that_does_not_fit_is_an_error_when_it_is_tried() {
    let own = Own::<Train>::new();
    let record = || {
        let config = config().with_modules_to_save(["head"]).with_targets(["mixer"]);
        Lora::overlay(own.clone()).with_own_statistics().attach(&config).unwrap().into_record()
    };
    let blank = || Lora::overlay(own.clone()).with_own_statistics();
    assert_eq!(blank().try_load_record(record()).unwrap().adapters().len(), 1);
    let refused = |model: Lora<Train, Overlay<Train, Own<Train>>>, record, message: &str| {
        let error = model.try_load_record(record).unwrap_err();
        assert!(
            matches!(&error, LoraError::InvalidRecord { problem } if problem.contains(message)),
            "{error}"
        );
    };
    let other = LoraConfig::new(1, 1.0).with_targets(["mixer"]);
    let other = Lora::overlay(own.clone()).with_own_statistics().attach(&other).unwrap();
    refused(
        other,
        record(),
        "`mixer` has rank 1 and scale 1, and rank 2 and scale 0.7 in the record",
    );

    let mut broken = record();
    broken.adapters[0].adapter.b = Param::from_tensor(Tensor::zeros([2, 5], &device::<Train>()));
    refused(blank(), broken, "`mixer`: the adapter must fit the weight: expected [4, 6]");
    let mut broken = record();
    broken.adapters[0].adapter.a = Param::from_tensor(Tensor::zeros([4, 3], &device::<Train>()));
    refused(blank(), broken, "`mixer`: the factors must have one rank");
    let mut broken = record();
    broken.parameters[4].values = Param::from_tensor(Tensor::zeros([4], &device::<Train>()));
    refused(blank(), broken, "the record has 4 elements for `head.weight`, and the model 18");
    let mut broken = record();
    broken.parameters[4].path = "tail.weight".to_owned();
    refused(blank(), broken, "parameters that the model does not have: [\"tail.weight\"]");
    let mut broken = record();
    broken.described = "{".to_owned();
    refused(blank(), broken, "no JSON");
}

#[test]
#[should_panic = "the record has an adapter of `mixer`, and the model no such layer"]
fn a_record_of_another_module_is_refused() {
    let model = Lora::overlay(Own::<Train>::new()).with_own_statistics().attach(&config()).unwrap();
    let other = Lora::new(LinearConfig::new(6, 3).init::<Train>(&device::<Train>()));
    other.load_record(model.into_record());
}

#[test]
fn adapters_go_from_the_overlay_to_layers_and_back() {
    let plain = PlainMlp::<Plain>::new(&device::<Plain>());
    let x = || input::<Plain, 2>([4, 6]);
    let y = plain.forward(x());
    let layers = Mlp::from(plain.clone());
    assert_identical(layers.forward(x()), y);
    let overlay = Lora::overlay(plain);

    let adapted = overlay.attach(&config()).unwrap();
    let expected = values(adapted.with_adapters(|it| it.forward(x())));
    let expected = Matrix { rows: 4, cols: 3, data: expected };
    let set = adapted.adapters();
    assert_close(layers.switch(&set).unwrap().forward(x()), &expected, 1e-5);
    // The same after saving and loading a file.
    let dir = std::env::temp_dir().join(format!("burn-lora-overlay-{}", std::process::id()));
    set.save(&dir).unwrap();
    let loaded = LoraAdapters::load(&dir, &device::<Plain>()).unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
    assert_close(layers.switch(&loaded).unwrap().forward(x()), &expected, 1e-5);

    let config = config().with_seed(7);
    let adapted = layers.attach(&config.clone().with_bias(false)).unwrap();
    let expected = values(adapted.forward(x()));
    let expected = Matrix { rows: 4, cols: 3, data: expected };
    let back = overlay.switch(&adapted.adapters()).unwrap();
    assert_close(back.with_adapters(|it| it.forward(x())), &expected, 1e-5);
    let merged: PlainMlp<Plain> = back.merge().unwrap();
    assert_close(merged.forward(x()), &expected, 1e-5);
}

#[test]
fn a_bias_needs_one_to_be_added_to() {
    // The head has none.
    let overlay = Lora::overlay(PlainMlp::<Plain>::new(&device::<Plain>()));
    let error = overlay.attach(&config().with_bias(true)).unwrap_err();
    assert!(matches!(error, LoraError::InvalidConfig { field: "bias", .. }), "{error}");
    let config = config().with_bias(true).with_targets(["blocks.*"]);
    let adapted = overlay.attach(&config).unwrap();
    let layers =
        Mlp::from(overlay.detach::<PlainMlp<Plain>>()).switch(&adapted.adapters()).unwrap();
    let mut layers = layers.into_inner();
    for block in layers.blocks.iter_mut() {
        let mut adapter = block.adapter().unwrap().clone();
        let size = adapter.shape()[1];
        let bias = Matrix::random(1, size, 8).tensor([size], &device::<Plain>());
        adapter.bias = Some(Param::from_tensor(bias));
        block.set_adapter(Some(adapter));
    }
    let x = || input::<Plain, 2>([4, 6]);
    let expected = Matrix { rows: 4, cols: 3, data: values(layers.forward(x())) };
    let layers = Lora::new(layers);
    let overlay = overlay.switch(&layers.adapters()).unwrap();
    assert_close(overlay.with_adapters(|it| it.forward(x())), &expected, 1e-5);
    let merged: PlainMlp<Plain> = overlay.merge().unwrap();
    assert_close(merged.forward(x()), &expected, 1e-5);
}

#[test]
fn dropout_on_inputs_is_refused() {
    let overlay = Lora::overlay(PlainMlp::<Plain>::new(&device::<Plain>()));
    let error = overlay.attach(&config().with_dropout(0.1)).unwrap_err();
    assert!(matches!(error, LoraError::InvalidConfig { field: "dropout", .. }), "{error}");
}

#[test]
fn extracted_from_a_tuned_module() {
    let device = device::<Plain>();
    let base = Conv2dConfig::new([2, 5], [2, 3]).with_bias(false).init::<Plain>(&device);
    let _ = base.weight.val();
    let tuned = Lora::overlay(base.clone()).attach(&config()).unwrap();
    let tuned: Conv2d<Plain> = tuned.merge().unwrap();
    let x = || input::<Plain, 4>([1, 2, 4, 4]);
    let expected = values(tuned.forward(x()));
    let expected = Matrix { rows: 1, cols: expected.len(), data: expected };
    let (base, tuned) = (Lora::overlay(base), Lora::overlay(tuned));
    let found = base.extract(&tuned, &LoraConfig::new(2, 1.0)).unwrap();
    assert!(found.kept[""] > 0.9999);
    let model = base.switch(&found.adapters).unwrap();
    assert_close(model.with_adapters(|it| it.forward(x())), &expected, 1e-4);
}

/// An overlay among other layers of a model.
#[derive(Module, Debug)]
struct Mixed<B: Backend> {
    body: Overlay<B, PlainMlp<B>>,
    head: LoraLinear<B>,
}

#[test]
fn as_the_field_of_a_model() {
    let device = device::<Train>();
    let model = Mixed::<Train> {
        body: Overlay::new(PlainMlp::new(&device)),
        head: LinearConfig::new(3, 2).init(&device).into(),
    };
    let config = config().with_targets(["body.blocks.*", "head"]);
    let model = model.attach(&config).unwrap();
    let report = model.parameters();
    assert_eq!(report.trainable, 2 * (6 + 8 + 8 + 7 + 7 + 3 + 3 + 2));
    // A name matches every path that ends with it.
    let paths: Vec<_> = report.layers.iter().map(|it| it.path.as_str()).collect();
    assert_eq!(paths, ["body.blocks.0", "body.blocks.1", "body.head", "head"]);
    assert_eq!(report.layers[0].total, 6 * 8 + 8);
    let forward = |model: &Mixed<Train>| {
        let x = input::<Train, 2>([4, 6]);
        model.head.forward(model.body.with_adapters(|it| it.forward(x)))
    };
    let expected = values(forward(&model));
    let merged = model.merge().unwrap();
    assert_close(forward(&merged), &Matrix { rows: 4, cols: 2, data: expected }, 1e-5);
    assert_eq!(merged.body.into_inner().blocks.len(), 2);
    assert!(model.to_string().contains("Lora"));
}

#[test]
fn as_a_record_of_its_own() {
    let device = device::<Plain>();
    let overlay = Overlay::new(PlainMlp::<Plain>::new(&device)).attach(&config()).unwrap();
    let x = input::<Plain, 2>([4, 6]);
    let y = overlay.with_adapters(|it| it.forward(x.clone()));
    let recorder = NamedMpkBytesRecorder::<FullPrecisionSettings>::new();
    let bytes = recorder.record(overlay.into_inner().into_record(), ()).unwrap();
    // The record has the base, too, as that of a layer with an adapter.
    let other = Overlay::new(PlainMlp::<Plain>::new(&device));
    let restored = other.load_record(recorder.load(bytes, &device).unwrap());
    assert_identical(restored.with_adapters(|it| it.forward(x)), y);
}

#[test]
fn what_is_attached_to_an_adapted_model_stays_one_model() {
    let device = device::<Plain>();
    let base = Mlp::from(PlainMlp::<Plain>::new(&device));
    let x = || input::<Plain, 2>([16, 6]);
    let first = base.attach(&config().with_targets(["blocks.0"])).unwrap();
    let kept = bits(first.blocks[0].adapter().unwrap().a.val());
    let fresh = LoraConfig::new(2, 0.7).with_targets(["head"]);

    let eva: Lora<Plain, Mlp<Plain>> =
        first.attach_eva(&fresh, 1.0, |model| drop(model.forward(x()))).unwrap();
    assert_eq!(eva.adapters().len(), 2);
    assert_eq!(bits(eva.blocks[0].adapter().unwrap().a.val()), kept);

    let loftq: Lora<Plain, Mlp<Plain>> = first
        .attach_loftq(
            QuantizeConfig::from(Quantization::Int8).with_targets(["blocks.0", "head"]),
            &fresh,
            2,
        )
        .unwrap();
    assert_eq!(loftq.adapters().len(), 2);
    assert_eq!(bits(loftq.blocks[0].adapter().unwrap().a.val()), kept);
    assert!(loftq.head.quantized().is_some() && loftq.blocks[0].quantized().is_some());
}

#[test]
fn stock_modules_are_no_part_of_a_mixed_batch() {
    let base = Overlay::new(PlainMlp::<Plain>::new(&device::<Plain>()));
    let set = base.attach(&config()).unwrap().adapters();
    let error = MultiLora::new(base).unwrap().insert("one", &set).unwrap_err();
    assert!(matches!(error, LoraError::NotMixable { .. }), "{error}");
}
