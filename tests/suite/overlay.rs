//! The overlay over stock modules: what it computes, what its adapters learn, and that the base
//! stays what it is.

use std::collections::BTreeMap;

use burn::{
    module::{AutodiffModule, Module, ModuleMapper, ModuleVisitor, Param},
    nn::{
        BatchNorm, BatchNormConfig, Embedding, EmbeddingConfig, Linear, LinearConfig,
        attention::{CrossAttentionConfig, MhaInput, MultiHeadAttentionConfig},
        conv::{
            Conv1dConfig, Conv2dConfig, Conv3dConfig, ConvTranspose1dConfig, ConvTranspose2dConfig,
            ConvTranspose3dConfig, DeformConv2dConfig,
        },
        gru::{BiGruConfig, GruConfig},
        transformer::{
            PositionWiseFeedForwardConfig, TransformerDecoderConfig, TransformerDecoderInput,
            TransformerEncoderConfig, TransformerEncoderInput,
        },
        {BiLstmConfig, BiRnnConfig, LstmConfig, RnnConfig},
    },
    optim::{AdamWConfig, GradientsParams, Optimizer},
    record::{FullPrecisionSettings, NamedMpkBytesRecorder, Recorder},
    tensor::{Int, Tensor, backend::Backend},
};
use burn_lora::{
    Init, Lora, LoraAdapters, LoraConfig, LoraError, LoraLayer, LoraLayers, LoraLinear, LoraModule,
};

use crate::{
    model::{Mlp, Plain, PlainMlp, Train, device},
    oracle::{Matrix, assert_close, assert_identical, bits},
};

fn config() -> LoraConfig {
    LoraConfig::new(2, 0.7).with_init(Init::RandomBoth)
}

fn values<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Vec<f64> {
    tensor.into_data().convert::<f64>().to_vec().unwrap()
}

/// An input of any shape.
fn input<B: Backend, const D: usize>(shape: [usize; D]) -> Tensor<B, D> {
    Matrix::random(1, shape.iter().product(), 3).tensor(shape, &device::<B>())
}

/// `ΔW`, spelled out element by element: `(index, row of A, column of B)` of each element of the
/// weight.
fn places(container: &str, dims: &[usize]) -> Vec<(usize, usize)> {
    let total: usize = dims.iter().product();
    let inner: usize = dims[1..].iter().product();
    let kernel: usize = dims[2..].iter().product();
    (0..total)
        .map(|index| match container {
            // [out, in, kernel]
            it if it.starts_with("Struct:Conv") && !it.contains("Transpose")
                || it == "Struct:DeformConv2d" =>
            {
                (index % inner, index / inner)
            }
            // [in, out, kernel]
            it if it.starts_with("Struct:ConvTranspose") => {
                (index / inner * kernel + index % kernel, index % inner / kernel)
            }
            _ => (index / inner, index % inner),
        })
        .collect()
}

/// Replaces each adapted weight by the sum, formed in `f64`.
struct Dense<'a, B: Backend> {
    set: &'a LoraAdapters<B>,
    names: Vec<(String, String)>,
    changed: usize,
}

fn path(names: &[(String, String)]) -> String {
    names.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(".")
}

/// The name that the adapter of a weight goes by.
fn layer_path(path: &str) -> &str {
    path.strip_suffix("weight").map_or(path, |it| it.strip_suffix('.').unwrap_or(it))
}

impl<B: Backend> ModuleMapper<B> for Dense<'_, B> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.names.push((name.to_owned(), container.to_owned()));
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.names.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let path = path(&self.names);
        let Some(adapter) = self.set.get(layer_path(&path)) else { return param };
        if D < 2 {
            return param;
        }
        self.changed += 1;
        let container = self.names.last().unwrap().1.clone();
        let (a, b) = (values(adapter.a.val()), values(adapter.b.val()));
        let ([_, columns], rank) = (adapter.shape(), adapter.rank());
        param.map(|weight| {
            let dims = weight.dims();
            let mut dense = values(weight.clone());
            for (value, (row, column)) in dense.iter_mut().zip(places(&container, &dims)) {
                let update: f64 =
                    (0..rank).map(|j| a[row * rank + j] * b[j * columns + column]).sum();
                *value += adapter.scale() * update;
            }
            let dense = Matrix { rows: 1, cols: dense.len(), data: dense };
            dense.tensor::<B, D>(dims, &weight.device()).set_require_grad(weight.is_require_grad())
        })
    }
}

/// The gradients of the weights of the dense module, as the gradients of the factors.
struct Gradients<'a> {
    set: &'a LoraAdapters<Train>,
    names: Vec<(String, String)>,
    grads: &'a <Train as burn::tensor::backend::AutodiffBackend>::Gradients,
    found: BTreeMap<String, [Matrix; 2]>,
}

impl ModuleVisitor<Train> for Gradients<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.names.push((name.to_owned(), container.to_owned()));
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.names.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Train, D>>) {
        let path = path(&self.names);
        let layer = layer_path(&path).to_owned();
        let Some(adapter) = self.set.get(&layer).filter(|_| D >= 2) else { return };
        let (Some(grad), [rows, cols]) = (param.grad(self.grads), adapter.shape()) else { return };
        let mut dense = Matrix { rows, cols, data: vec![0.0; rows * cols] };
        let places = places(&self.names.last().unwrap().1, &param.dims());
        for (value, (row, column)) in values(grad).into_iter().zip(places) {
            dense.data[row * cols + column] += value;
        }
        let rank = adapter.rank();
        let a = Matrix { rows, cols: rank, data: values(adapter.a.val()) };
        let b = Matrix { rows: rank, cols, data: values(adapter.b.val()) };
        let scale = adapter.scale();
        let grads =
            [dense.times(&b.transpose()).scaled(scale), a.transpose().times(&dense).scaled(scale)];
        self.found.insert(layer, grads);
    }
}

/// Checks one module: outputs, gradients of every factor, merging, and that the base is untouched.
fn check<M, const D: usize>(module: M, adapters: usize, pass: impl Fn(&M) -> Tensor<Train, D>)
where
    M: AutodiffModule<Train>,
{
    let before = pass(&module);
    let model = Lora::new(module.clone());
    assert_identical(model.forward(&pass), before.clone());
    let model = model.attach(&config()).unwrap();
    let set = model.adapters(&config()).unwrap();
    assert_eq!(set.len(), adapters);

    // Trainable, but the adapters in it are numbers.
    let mut dense = Dense { set: &set, names: vec![], changed: 0 };
    let reference = module.clone().map(&mut dense);
    assert_eq!(dense.changed, adapters);
    let expected = pass(&reference);
    let matrix = |tensor: Tensor<Train, D>| {
        let data = values(tensor);
        Matrix { rows: 1, cols: data.len(), data }
    };
    let y = model.forward(&pass);
    assert_close(y.clone(), &matrix(expected.clone()), 2e-5);

    let grads = expected.sin().sum().backward();
    let mut gradients =
        Gradients { set: &set, names: vec![], grads: &grads, found: BTreeMap::new() };
    reference.visit(&mut gradients);
    // A second pass and its gradients are as good as the first.
    for y in [y, model.forward(&pass)] {
        let grads = y.sin().sum().backward();
        for (path, [d_a, d_b]) in &gradients.found {
            let adapter = set.get(path).unwrap();
            assert_close(adapter.a.grad(&grads).unwrap(), d_a, 5e-5);
            assert_close(adapter.b.grad(&grads).unwrap(), d_b, 5e-5);
        }
        let grads = GradientsParams::from_grads(grads, &model);
        assert_eq!(grads.len(), 2 * gradients.found.len(), "nothing else has a gradient");
    }
    assert!(!gradients.found.is_empty());

    assert_identical(pass(&module), before.clone());
    assert_identical(pass(model.detach().base()), before);
    let merged = model.into_merged().unwrap();
    assert_close(pass(&merged), &matrix(pass(&reference)), 2e-5);
}

#[test]
fn convolutions() {
    let device = device::<Train>();
    let x = || input::<Train, 4>([2, 4, 5, 4]);
    check(Conv1dConfig::new(4, 6, 3).with_groups(2).init(&device), 1, |it| {
        it.forward(input([2, 4, 7]))
    });
    check(Conv2dConfig::new([4, 6], [3, 2]).with_groups(2).init(&device), 1, |it| it.forward(x()));
    check(Conv3dConfig::new([2, 3], [2, 2, 2]).init(&device), 1, |it| {
        it.forward(input([1, 2, 3, 4, 3]))
    });
    check(ConvTranspose1dConfig::new([4, 6], 3).init(&device), 1, |it| {
        it.forward(input([2, 4, 5]))
    });
    let transposed = ConvTranspose2dConfig::new([4, 6], [3, 2]).with_groups(2);
    check(transposed.init(&device), 1, |it| it.forward(x()));
    check(ConvTranspose3dConfig::new([2, 3], [2, 2, 2]).init(&device), 1, |it| {
        it.forward(input([1, 2, 3, 2, 3]))
    });
}

/// Burn's wgpu backend has no gradient for deformable convolutions on every driver.
#[test]
fn deformable_convolutions() {
    let device = device::<Train>();
    check(DeformConv2dConfig::new([2, 3], [2, 2]).init(&device), 1, |it| {
        it.forward(input([1, 2, 4, 4]), input([1, 8, 3, 3]), None)
    });
}

#[test]
fn recurrent_modules() {
    let device = device::<Train>();
    let x = || input::<Train, 3>([2, 3, 4]);
    check(RnnConfig::new(4, 3, true).init(&device), 2, |it| it.forward(x(), None).0);
    check(GruConfig::new(4, 3, true).init(&device), 6, |it| it.forward(x(), None));
    check(LstmConfig::new(4, 3, true).init(&device), 8, |it| it.forward(x(), None).0);
    check(BiRnnConfig::new(4, 3, true).init(&device), 4, |it| it.forward(x(), None).0);
    check(BiGruConfig::new(4, 3, true).init(&device), 12, |it| it.forward(x(), None).0);
    check(BiLstmConfig::new(4, 3, true).init(&device), 16, |it| it.forward(x(), None).0);
}

#[test]
fn transformers_and_what_they_are_made_of() {
    let device = device::<Train>();
    let x = || input::<Train, 3>([2, 3, 4]);
    check(LinearConfig::new(4, 3).init(&device), 1, |it| it.forward(x()));
    let ids = || Tensor::<Train, 2, Int>::from_data([[0, 3, 1], [2, 2, 4]], &Default::default());
    check(EmbeddingConfig::new(6, 4).init(&device), 1, |it| it.forward(ids()));
    check(MultiHeadAttentionConfig::new(4, 2).with_dropout(0.0).init(&device), 4, |it| {
        it.forward(MhaInput::self_attn(x())).context
    });
    let cross = CrossAttentionConfig::new(4, 4, 2, 2, 2).with_dropout(0.0);
    check(cross.init(&device), 4, |it| it.forward(x(), input([2, 5, 4]), None));
    let feed_forward = PositionWiseFeedForwardConfig::new(4, 6).with_dropout(0.0);
    check(feed_forward.init(&device), 2, |it| it.forward(x()));
    let encoder = TransformerEncoderConfig::new(4, 6, 2, 2).with_dropout(0.0);
    check(encoder.init(&device), 12, |it| it.forward(TransformerEncoderInput::new(x())));
    let decoder = TransformerDecoderConfig::new(4, 6, 2, 1).with_dropout(0.0);
    check(decoder.init(&device), 10, |it| {
        it.forward(TransformerDecoderInput::new(x(), input([2, 5, 4])))
    });
}

/// A module of somebody's own, with a matrix that is no layer's.
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

    /// Draws the weights, which clones of an unused module would each draw anew.
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
fn train<M>(mut model: Lora<Train, M>, pass: impl Fn(&M) -> Tensor<Train, 2>) -> Lora<Train, M>
where
    M: AutodiffModule<Train>,
{
    let mut optimizer = AdamWConfig::new().with_weight_decay(0.5).init::<Train, Lora<Train, M>>();
    for _ in 0..5 {
        let grads = model.forward(&pass).sin().sum().backward();
        let grads = GradientsParams::from_grads(grads, &model);
        model = optimizer.step(0.05, model, grads);
    }
    model
}

#[test]
fn a_module_of_ones_own_with_running_statistics() {
    let own = Own::<Train>::new();
    // Statistics that are not those of a fresh norm, the last of them still to be taken in.
    for _ in 0..3 {
        let _ = own.forward(ids());
    }
    let before = statistics(&own);
    let evaluated = own.valid().forward(ids());
    let model = Lora::new(own.clone()).attach(&config()).unwrap();
    let set = model.adapters(&config()).unwrap();
    let paths: Vec<_> = set.iter().map(|(path, it)| (path, it.shape())).collect();
    assert_eq!(paths, [("head", [6, 3]), ("mixer", [4, 6]), ("table", [5, 4])]);

    let model = train(model, |own| own.forward(ids()));
    assert_eq!(statistics(&own), before, "the statistics moved");
    assert_eq!(statistics(model.base()), before);
    assert_identical(own.valid().forward(ids()), evaluated.clone());
    assert_identical(model.detach().valid().forward(|own| own.forward(ids())), evaluated);
}

#[test]
fn records_hold_what_trains_and_nothing_else() {
    let own = Own::<Train>::new();
    let config = config().with_targets(["table", "mixer"]).with_modules_to_save(["head"]);
    let model = Lora::new(own.clone()).attach(&config).unwrap();
    let model = train(model, |own| own.forward(ids()));
    assert_ne!(bits(model.base().head.weight.val()), bits(own.head.weight.val()));
    assert_identical(model.base().mixer.val(), own.mixer.val());

    let recorder = NamedMpkBytesRecorder::<FullPrecisionSettings>::new();
    let record = model.clone().into_record();
    let trained: Vec<_> = record.trained.iter().map(|it| it.path.clone()).collect();
    assert_eq!(
        (record.adapters.len(), trained),
        (2, vec!["head.weight".into(), "head.bias".into()])
    );
    let bytes = recorder.record(record, ()).unwrap();
    let load = || recorder.load(bytes.clone(), &device::<Train>()).unwrap();
    let restored = Lora::new(own.clone()).load_record(load());
    let y = |model: &Lora<Train, Own<Train>>| model.valid().forward(|own| own.forward(ids()));
    assert_identical(y(&restored), y(&model));
    // It trains on where the other would.
    assert_eq!(restored.parameters().trainable, model.parameters().trainable);
    let ids_of = |model: &Lora<Train, Own<Train>>| {
        let record = model.clone().into_record();
        (record.trained[0].values.id, record.adapters[0].adapter.a.id)
    };
    assert_eq!(ids_of(&restored), ids_of(&model));
    // What the record does not have is taken off.
    let other = Lora::new(own).attach(&LoraConfig::new(1, 1.0).with_targets(["head"])).unwrap();
    assert_identical(y(&other.load_record(load())), y(&model));
}

#[test]
#[should_panic = "the record has an adapter of `mixer`, and the module no such layer"]
fn a_record_of_another_module_is_refused() {
    let model = Lora::new(Own::<Train>::new()).attach(&config()).unwrap();
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
    let overlay = Lora::new(plain);

    let adapted = overlay.attach(&config()).unwrap();
    let expected = values(adapted.forward(|it| it.forward(x())));
    let expected = Matrix { rows: 4, cols: 3, data: expected };
    let set = adapted.adapters(&config()).unwrap();
    assert_close(layers.switch(&set).unwrap().forward(x()), &expected, 1e-5);
    // By way of a file, too.
    let dir = std::env::temp_dir().join(format!("burn-lora-overlay-{}", std::process::id()));
    set.save(&dir).unwrap();
    let loaded = LoraAdapters::load(&dir, &device::<Plain>()).unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
    assert_close(layers.switch(&loaded).unwrap().forward(x()), &expected, 1e-5);

    let config = config().with_seed(7);
    let adapted = layers.attach(&config.clone().with_bias(false)).unwrap();
    let expected = values(adapted.forward(x()));
    let expected = Matrix { rows: 4, cols: 3, data: expected };
    let back = overlay.switch(&adapted.adapters(&config).unwrap()).unwrap();
    assert_close(back.forward(|it| it.forward(x())), &expected, 1e-5);
    assert_close(back.into_merged().unwrap().forward(x()), &expected, 1e-5);
}

#[test]
fn a_bias_needs_one_to_be_added_to() {
    // The head has none.
    let overlay = Lora::new(PlainMlp::<Plain>::new(&device::<Plain>()));
    let error = overlay.attach(&config().with_bias(true)).unwrap_err();
    assert!(matches!(error, LoraError::InvalidConfig { field: "bias", .. }), "{error}");
    let config = config().with_bias(true).with_targets(["blocks.*"]);
    let adapted = overlay.attach(&config).unwrap();
    let mut layers =
        Mlp::from(overlay.base().clone()).switch(&adapted.adapters(&config).unwrap()).unwrap();
    for block in layers.blocks.iter_mut() {
        let mut adapter = block.adapter().unwrap().clone();
        let size = adapter.shape()[1];
        let bias = Matrix::random(1, size, 8).tensor([size], &device::<Plain>());
        adapter.bias = Some(Param::from_tensor(bias));
        block.set_adapter(Some(adapter));
    }
    let x = || input::<Plain, 2>([4, 6]);
    let expected = Matrix { rows: 4, cols: 3, data: values(layers.forward(x())) };
    let overlay = overlay.switch(&layers.adapters(&config).unwrap()).unwrap();
    assert_close(overlay.forward(|it| it.forward(x())), &expected, 1e-5);
    assert_close(overlay.into_merged().unwrap().forward(x()), &expected, 1e-5);
}

#[test]
fn dropout_on_inputs_is_refused() {
    let overlay = Lora::new(PlainMlp::<Plain>::new(&device::<Plain>()));
    let error = overlay.attach(&config().with_dropout(0.1)).unwrap_err();
    assert!(matches!(error, LoraError::InvalidConfig { field: "dropout", .. }), "{error}");
}

#[test]
fn extracted_from_a_tuned_module() {
    let device = device::<Plain>();
    let base = Conv2dConfig::new([2, 5], [2, 3]).with_bias(false).init::<Plain>(&device);
    let _ = base.weight.val();
    let tuned = Lora::new(base.clone()).attach(&config()).unwrap().into_merged().unwrap();
    let x = || input::<Plain, 4>([1, 2, 4, 4]);
    let expected = values(tuned.forward(x()));
    let expected = Matrix { rows: 1, cols: expected.len(), data: expected };
    let (base, tuned) = (Lora::new(base), Lora::new(tuned));
    let found = base.extract(&tuned, &LoraConfig::new(2, 1.0)).unwrap();
    assert!(found.kept[""] > 0.9999);
    let model = base.switch(&found.adapters).unwrap();
    assert_close(model.forward(|it| it.forward(x())), &expected, 1e-4);
}

/// An overlay among other layers of a model.
#[derive(Module, Debug)]
struct Mixed<B: Backend> {
    body: Lora<B, PlainMlp<B>>,
    head: LoraLinear<B>,
}

impl<B: Backend> LoraModule<B> for Mixed<B> {
    fn lora_layers(&mut self) -> LoraLayers<'_, B> {
        LoraLayers::new().with("body", &mut self.body).with("head", &mut self.head)
    }
}

#[test]
fn as_the_field_of_a_model() {
    let device = device::<Train>();
    let model = Mixed::<Train> {
        body: Lora::new(PlainMlp::new(&device)),
        head: LinearConfig::new(3, 2).init(&device).into(),
    };
    let config = config().with_targets(["body.blocks.*", "head"]);
    let model = model.attach(&config).unwrap();
    let report = model.parameters();
    assert_eq!(report.trainable, 2 * (6 + 8 + 8 + 7 + 7 + 3 + 3 + 2));
    // A name means every path that ends with it.
    let paths: Vec<_> = report.layers.iter().map(|it| it.path.as_str()).collect();
    assert_eq!(paths, ["body.blocks.0", "body.blocks.1", "body.head", "head"]);
    assert_eq!(report.layers[0].total, 6 * 8 + 8);
    let forward = |model: &Mixed<Train>| {
        let x = input::<Train, 2>([4, 6]);
        model.head.forward(model.body.forward(|it| it.forward(x)))
    };
    let expected = values(forward(&model));
    let merged = model.merge().unwrap();
    assert_close(forward(&merged), &Matrix { rows: 4, cols: 2, data: expected }, 1e-5);
    assert_eq!(merged.into_plain().body.into_base().blocks.len(), 2);
    assert!(model.to_string().contains("Lora"));
}
