//! Batches whose samples use different adapters, compared with one run for each sample.

use std::collections::BTreeMap;

use burn::{
    module::{AutodiffModule, Module, Param},
    nn::{
        EmbeddingConfig, Linear, LinearConfig, PaddingConfig2d,
        attention::MultiHeadAttentionConfig,
        conv::{Conv1dConfig, Conv2dConfig, ConvTranspose2dConfig},
    },
    tensor::{Int, Tensor, backend::Backend},
};
use burn_lora::{
    Init, LoraAdapter, LoraAdapters, LoraConfig, LoraError, LoraLinear, LoraModule, Scaling,
    nn::{
        LoraConv1d, LoraConv2d, LoraConvTranspose2d, LoraEmbedding, LoraMhaInput,
        LoraMultiHeadAttention,
    },
    quantize::Quantization,
    serve::{MixedBatch, MultiLora},
};
use proptest::prelude::*;

use crate::{
    model::{Mlp, Plain, Train, device, random_cases},
    oracle::{Matrix, assert_close, assert_identical},
};

/// A model with every layer, nested in every way: texts go through the embedding, convolutions and
/// attention, and to the table of embeddings.
#[derive(Module, Debug)]
struct Everything<B: Backend> {
    table: LoraEmbedding<B>,
    signal: LoraConv1d<B>,
    images: (LoraConv2d<B>, Vec<LoraConvTranspose2d<B>>),
    attention: Option<LoraMultiHeadAttention<B>>,
    body: [LoraLinear<B>; 2],
}

const WORDS: usize = 11;
const LENGTH: usize = 6;
const WIDTH: usize = 8;

impl Everything<Plain> {
    fn new() -> Self {
        let device = &device::<Plain>();
        let same = Conv2dConfig::new([2, 4], [3, 3]).with_padding(PaddingConfig2d::Same);
        let back = ConvTranspose2dConfig::new([4, 2], [1, 1]);
        let linear = || LinearConfig::new(WIDTH, WIDTH).init(device).into();
        Self {
            table: EmbeddingConfig::new(WORDS, WIDTH).init(device).into(),
            signal: Conv1dConfig::new(LENGTH, LENGTH, 1).init(device).into(),
            images: (same.init(device).into(), vec![back.init(device).into()]),
            attention: Some(MultiHeadAttentionConfig::new(WIDTH, 2).init(device).into()),
            body: [linear(), linear()],
        }
    }

    /// The scores of each word at each place: `[batch, LENGTH]` to `[batch, LENGTH, WORDS]`.
    fn forward(&self, ids: Tensor<Plain, 2, Int>) -> Tensor<Plain, 3> {
        let batch = ids.dims()[0];
        let x = self.signal.forward(self.table.forward(ids));
        let (down, up) = &self.images;
        let image = x.reshape([batch, 2, LENGTH, WIDTH / 2]);
        let x = up.iter().fold(down.forward(image), |x, layer| layer.forward(x));
        let x = x.reshape([batch, LENGTH, WIDTH]);
        let x = match &self.attention {
            Some(attention) => attention.forward(LoraMhaInput::self_attn(x)).context,
            None => x,
        };
        self.table.project(self.body.iter().fold(x, |x, layer| layer.forward(x)))
    }
}

fn ids(batch: usize, seed: usize) -> Tensor<Plain, 2, Int> {
    let ids: Vec<i32> =
        (0..batch * LENGTH).map(|it| ((it * 7 + seed * 3 + it * it) % WORDS) as i32).collect();
    Tensor::<Plain, 1, Int>::from_ints(&*ids, &device::<Plain>()).reshape([batch, LENGTH])
}

/// A set of random adapters on the layers that `layers` has a bit for.
fn set(model: &Everything<Plain>, rank: usize, seed: u64, layers: u32) -> LoraAdapters<Plain> {
    let config = LoraConfig::new(rank, 0.7 * rank as f64 + 0.2).with_init(Init::RandomBoth);
    let adapted = model.attach(&config.with_seed(seed)).unwrap();
    let all = adapted.adapters();
    let chosen = all.iter().enumerate().filter(|(bit, _)| layers >> bit & 1 == 1);
    LoraAdapters::new(chosen.map(|(_, (path, adapter))| (path, adapter.clone())))
}

proptest! {
    #![proptest_config(random_cases(6))]

    #[test]
    fn each_sample_is_as_if_alone(
        sets in prop::collection::vec((1_usize..5, 0_u64..100, any::<u32>()), 1..4),
        samples in prop::collection::vec(0_usize..4, 1..9),
        seed in 0_usize..50,
    ) {
        let base = Everything::new();
        // Draws its weights, which clones then share.
        base.forward(ids(1, 0));
        let mut models = MultiLora::new(base.clone()).unwrap();
        let sets: BTreeMap<_, _> = sets.into_iter().enumerate().map(|(index, (rank, seed, layers))| {
            (format!("set {index}"), set(&base, rank, seed, layers | 1 << (seed % 9)))
        }).collect();
        for (name, set) in &sets {
            models.insert(name, set).unwrap();
        }
        // The last of them is the base.
        let names: Vec<_> = samples.iter().map(|it| sets.keys().nth(it % (sets.len() + 1))).collect();
        let ids = ids(samples.len(), seed);
        let y = models.batch(&names).unwrap().run(ids.clone(), |model, ids| model.forward(ids));
        for (sample, name) in names.iter().enumerate() {
            let x = ids.clone().narrow(0, sample, 1);
            let expected = match name {
                Some(name) => base.switch(&sets[*name]).unwrap().forward(x),
                None => base.forward(x),
            };
            assert_near(y.clone().narrow(0, sample, 1), expected);
        }
    }
}

/// Equal to five digits, relative to the largest element.
fn assert_near<const D: usize>(actual: Tensor<Plain, D>, expected: Tensor<Plain, D>) {
    let largest = |x: Tensor<Plain, D>| x.abs().max().into_data().iter::<f64>().next().unwrap();
    let distance = largest(actual - expected.clone());
    assert!(distance <= 1e-5 * largest(expected.clone()).max(1.0), "{distance}");
}

/// Two sets for one layer, `y = x·W + b + s·(x·A)·B`, compared with the formula.
#[test]
fn a_layer_computes_the_formula_for_each_sample() {
    let base = linear([5, 3]);
    let (weight, bias) = (Matrix::random(5, 3, 1), Matrix::random(1, 3, 2));
    let mut models = MultiLora::new(base).unwrap();
    let mut updates = BTreeMap::new();
    for (name, rank, alpha) in [("a", 1, 0.7), ("b", 9, 5.0)] {
        let seed = rank as u64;
        let (a, b) = (Matrix::random(5, rank, seed + 5), Matrix::random(rank, 3, seed + 9));
        let own = Matrix::random(1, 3, seed + 13);
        let scale = alpha / rank as f64;
        updates.insert(name, (a.times(&b).scaled(scale), own.scaled(scale)));
        let to = &device::<Plain>();
        let (a, b) = (a.tensor([5, rank], to), b.tensor([rank, 3], to));
        let mut adapter = LoraAdapter::new(a, b, alpha, Scaling::AlphaOverRank);
        adapter.bias = Some(Param::from_tensor(own.tensor([3], to)));
        models.insert(name, &LoraAdapters::new([("", adapter)])).unwrap();
    }
    let x = Matrix::random(4, 5, 30);
    let names = [Some("b"), None, Some("a"), Some("b")];
    let expected = Matrix::from_fn(4, 3, |row, col| {
        let y = x.times(&weight).plus_row(&bias);
        match names[row].map(|name| &updates[name]) {
            Some((delta, own)) => y.plus(&x.times(delta)).plus_row(own).at(row, col),
            None => y.at(row, col),
        }
    });
    let batch = models.batch(&names).unwrap();
    assert_eq!(batch.order(), [1, 2, 0, 3]);
    let input = x.tensor::<Plain, 2>([4, 5], &device::<Plain>());
    assert_close(batch.run(input, |layer, x| layer.forward(x)), &expected, 1e-5);
    // Two rows for each sample.
    let twice = Matrix::from_fn(8, 5, |row, col| x.at(row / 2, col));
    let expected = Matrix::from_fn(8, 3, |row, col| expected.at(row / 2, col));
    let input = twice.tensor::<Plain, 3>([4, 2, 5], &device::<Plain>());
    let y = batch.run(input, |layer, x| layer.forward(x));
    assert_close(y.reshape([8, 3]), &expected, 1e-5);
}

fn linear(shape: [usize; 2]) -> LoraLinear<Plain> {
    let (device, [d_input, d_output]) = (&device::<Plain>(), shape);
    let weight = Matrix::random(d_input, d_output, 1).tensor(shape, device);
    let bias = Matrix::random(1, d_output, 2).tensor([d_output], device);
    Linear { weight: Param::from_tensor(weight), bias: Some(Param::from_tensor(bias)) }.into()
}

/// The adapters of a small network, and the network.
fn two() -> (Mlp<Plain>, [LoraAdapters<Plain>; 2]) {
    let base = Mlp::<Plain>::new(&device::<Plain>());
    let config = LoraConfig::new(3, 2.0).with_init(Init::RandomBoth);
    let sets = [1, 2].map(|seed| base.attach(&config.clone().with_seed(seed)).unwrap().adapters());
    (base, sets)
}

fn rows(count: usize) -> Tensor<Plain, 2> {
    Matrix::random(count, 6, 8).tensor([count, 6], &device::<Plain>())
}

#[test]
fn one_set_for_all_is_that_set_to_the_bit() {
    let (base, [set, _]) = two();
    let mut models = MultiLora::new(base.clone()).unwrap();
    models.insert("only", &set).unwrap();
    let batch = models.batch(&[Some("only"); 4]).unwrap();
    let y = batch.run(rows(4), |model, x| model.forward(x));
    assert_identical(y, base.switch(&set).unwrap().forward(rows(4)));
    let batch = models.batch(&[None::<&str>; 4]).unwrap();
    assert_identical(batch.run(rows(4), |model, x| model.forward(x)), base.forward(rows(4)));
}

#[test]
fn a_mixed_model_stays_one_on_its_trips() {
    let (base, [one, other]) = two();
    let mut models = MultiLora::new(base).unwrap();
    models.insert("one", &one).unwrap();
    models.insert("other", &other).unwrap();
    let batch = models.batch(&[Some("one"), None, Some("other")]).unwrap();
    let expected = batch.model().forward(rows(3));
    for model in [
        batch.model().clone().fork(&device::<Plain>()),
        batch.model().clone().to_device(&device::<Plain>()),
        batch.model().clone().no_grad(),
        batch.clone().model().clone(),
    ] {
        assert_identical(model.forward(rows(3)), expected.clone());
    }
}

#[test]
fn a_quantized_base_is_shared_by_all() {
    let (base, _) = linear([70, 9]).quantize(Quantization::Nf4).unwrap();
    let config = LoraConfig::new(2, 3.0).with_init(Init::RandomBoth);
    let adapted = base.attach(&config).unwrap();
    let mut models = MultiLora::new(base.clone()).unwrap();
    models.insert("one", &adapted.adapters()).unwrap();
    let x = Matrix::random(8, 70, 3).tensor::<Plain, 2>([8, 70], &device::<Plain>());
    let names: Vec<_> = (0..8).map(|sample| (sample % 2 == 0).then_some("one")).collect();
    let y = models.batch(&names).unwrap().run(x.clone(), |layer, x| layer.forward(x));
    let [with, without] = [adapted.forward(x.clone()), base.forward(x)];
    for sample in 0..8 {
        let expected = if sample % 2 == 0 { &with } else { &without };
        assert_near(y.clone().narrow(0, sample, 1), expected.clone().narrow(0, sample, 1));
    }
}

#[test]
fn sets_are_replaced_and_removed() {
    let (base, [one, other]) = two();
    let mut models = MultiLora::new(base).unwrap();
    models.insert("it", &one).unwrap();
    let old = models.batch(&[Some("it"), None]).unwrap();
    let before = old.model().forward(rows(2));
    models.insert("it", &other).unwrap();
    let after = models.batch(&[Some("it"), None]).unwrap().model().forward(rows(2));
    // What is being computed keeps the set that it began with.
    assert_identical(old.model().forward(rows(2)), before.clone());
    let change = (after - before).abs().max().into_scalar();
    assert!(change > 1e-3, "{change}");
    assert_eq!(models.names().collect::<Vec<_>>(), ["it"]);
    assert!(models.remove("it") && !models.remove("it"));
}

#[test]
fn s17_the_bytes_of_the_base_and_of_each_set_are_told() {
    let (base, [one, other]) = two();
    let mut models = MultiLora::new(base).unwrap();
    models.insert("one", &one).unwrap();
    models.insert("other", &other).unwrap();
    let memory = models.memory();
    assert_eq!(memory.base, 4 * (6 * 8 + 8 + 8 * 7 + 7 + 7 + 7 + 7 * 3));
    let of = |set: &LoraAdapters<Plain>| {
        let sizes = set.iter().map(|(_, it)| it.rank() * it.shape().iter().sum::<usize>());
        4 * sizes.sum::<usize>()
    };
    let sets = [("one".to_owned(), of(&one)), ("other".to_owned(), of(&other))];
    assert_eq!(memory.sets, sets);
    assert_eq!(memory.total(), memory.base + of(&one) + of(&other));
    let end = format!("2 sets, {} bytes in all", burn_lora::report::grouped(memory.total()));
    assert!(memory.to_string().ends_with(&end), "{memory}");
    assert_eq!(models.base().switch(&one).unwrap().parameters().base_bytes, memory.base);
}

#[test]
fn what_cannot_be_mixed_is_refused() {
    let (base, [set, _]) = two();
    let mut models = MultiLora::new(base.clone()).unwrap();
    models.insert("one", &set).unwrap();
    let error = models.batch(&[Some("one"), Some("won"), None]).unwrap_err();
    assert!(matches!(&error, LoraError::UnknownAdapters { names, .. } if names == &["won"]));
    assert_eq!(error.to_string(), "there are no adapters called `won`; there are `one`");

    let full = base.attach(&LoraConfig::new(2, 3.0).with_modules_to_save(["norm"])).unwrap();
    let error = models.insert("full", &full.adapters()).unwrap_err();
    assert!(matches!(error, LoraError::NotMixable { .. }), "{error}");
    let expected = "`norm.bias` of `full` cannot be part of a mixed batch: it was trained in full";
    assert!(error.to_string().starts_with(expected), "{error}");

    let misfit = set.get("blocks.0").unwrap().clone();
    let error = models.insert("misfit", &LoraAdapters::new([("head", misfit)])).unwrap_err();
    assert!(matches!(error, LoraError::Mismatch { .. }), "{error}");
    assert_eq!(models.names().collect::<Vec<_>>(), ["one"]);

    let adapted = base.switch(&set).unwrap().into_inner();
    let error = MultiLora::new(adapted).unwrap_err();
    assert!(matches!(error, LoraError::AlreadyAttached { .. }), "{error}");

    let training = Mlp::<Train>::new(&device::<Train>());
    let error = MultiLora::new(training.clone()).unwrap_err().to_string();
    assert!(error.contains("use its `valid()`"), "{error}");
    MultiLora::new(training.valid()).unwrap();
}

/// A batch of two samples: one with adapters, and one without.
fn pair() -> MixedBatch<Mlp<Plain>> {
    let (base, [set, _]) = two();
    let mut models = MultiLora::new(base).unwrap();
    models.insert("one", &set).unwrap();
    models.batch(&[Some("one"), None]).unwrap()
}

#[test]
#[should_panic(expected = "a mixed batch of 2 samples: expected [2, ..], got [3, 6]")]
fn a_batch_of_another_size_is_refused() {
    pair().sorted(rows(3));
}

#[test]
#[should_panic(expected = "must be a multiple of 2, the same for each sample, got 3")]
fn a_layer_that_mixes_samples_up_is_refused() {
    pair().model().forward(rows(3));
}

#[test]
#[should_panic(expected = "a model for a mixed batch does not train")]
fn a_mixed_model_does_not_train() {
    let _ = Mlp::<Train>::from_inner(pair().model().clone());
}
