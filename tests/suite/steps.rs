//! Training steps shared among workers, and computed in segments, give the gradients of a plain backward
//! pass.

use std::{collections::BTreeMap, panic::AssertUnwindSafe};

use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId},
    nn::{
        BatchNorm, BatchNormConfig, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear,
        LinearConfig, attention::MultiHeadAttentionConfig,
    },
    optim::GradientsParams,
    tensor::{Int, Tensor, TensorData, backend::Backend},
};
use burn_lora::{
    Init, Lora, LoraConfig, LoraLinear, LoraModule,
    nn::{LoraEmbedding, LoraMhaInput, LoraMultiHeadAttention},
    train::{Backward, Blocks, Workers, segments},
};

use crate::{
    model::{Plain, Train, device},
    oracle::Matrix,
};

const WIDTH: usize = 6;

/// Embeddings, blocks and a head.
#[derive(Module, Debug)]
struct Net<B: Backend> {
    table: LoraEmbedding<B>,
    blocks: Vec<Block<B>>,
    head: LoraLinear<B>,
}

#[derive(Module, Debug)]
struct Block<B: Backend> {
    norm: LayerNorm<B>,
    attention: LoraMultiHeadAttention<B>,
    mix: LoraLinear<B>,
}

/// The tokens of texts of one length.
type Texts = [[i32; 5]];

const TEXTS: [[i32; 5]; 5] =
    [[0, 3, 1, 4, 2], [2, 2, 0, 1, 3], [4, 1, 1, 0, 0], [3, 4, 2, 2, 1], [1, 0, 4, 3, 4]];

/// Gives all parameters the same values in every run.
struct Fixed {
    count: u64,
}

impl<B: Backend> ModuleMapper<B> for Fixed {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        self.count += 1;
        // About as large as Burn draws them. Factors of norms stay 1.
        let size = if self.count == 1 { 1.7 } else { 0.4 };
        param.map(|it| {
            if D == 1 && it.clone().equal_elem(1.0).all().into_data().iter::<bool>().all(|it| it) {
                return it;
            }
            let values = Matrix::random(1, it.shape().num_elements(), self.count).scaled(size);
            values.tensor::<B, D>(it.dims(), &it.device())
        })
    }
}

impl<B: Backend> Net<B> {
    fn new(device: &B::Device) -> Self {
        let attention = MultiHeadAttentionConfig::new(WIDTH, 2).with_dropout(0.0);
        let block = |_| Block {
            norm: LayerNormConfig::new(WIDTH).init(device),
            attention: attention.init(device).into(),
            mix: LinearConfig::new(WIDTH, WIDTH).init(device).into(),
        };
        let net = Self {
            table: EmbeddingConfig::new(5, WIDTH).init(device).into(),
            blocks: (0..3).map(block).collect(),
            head: LinearConfig::new(WIDTH, 4).init(device).into(),
        };
        net.map(&mut Fixed { count: 0 })
    }

    /// The loss without segments.
    fn all(&self, texts: &Texts, device: &B::Device) -> Tensor<B, 1> {
        let x = self.table.forward(ids(texts, device));
        let x = self.blocks.iter().fold(x, |x, block| block.forward(x));
        self.head.forward(x).sin().sum()
    }
}

fn ids<B: Backend>(texts: &Texts, device: &B::Device) -> Tensor<B, 2, Int> {
    let values = TensorData::new(texts.as_flattened().to_vec(), [texts.len(), 5]);
    Tensor::from_data(values, device)
}

impl<B: Backend> Block<B> {
    fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let normed = self.norm.forward(x.clone());
        let x = x + self.attention.forward(LoraMhaInput::self_attn(normed)).context;
        x.clone() + self.mix.forward(x).tanh()
    }
}

impl<B: Backend> Blocks<B, 3, Texts> for Net<B> {
    type Context = Tensor<B, 2, Int>;

    fn blocks(&self) -> usize {
        self.blocks.len()
    }

    fn context(&self, texts: &Texts, device: &B::Device) -> Self::Context {
        ids(texts, device)
    }

    fn begin(&self, ids: &Self::Context) -> Tensor<B, 3> {
        self.table.forward(ids.clone())
    }

    fn block(&self, index: usize, x: Tensor<B, 3>, _: &Self::Context) -> Tensor<B, 3> {
        // With autodiff, what a block reads begins a graph, so that there is never more than one block's.
        assert!(x.is_require_grad() || !B::ad_enabled(&x.device()));
        self.blocks[index].forward(x)
    }

    fn parts(&self, _: &Self::Context) -> usize {
        5
    }

    fn loss(&self, part: usize, x: Tensor<B, 3>, _: &Self::Context) -> Tensor<B, 1> {
        self.head.forward(x.narrow(1, part, 1)).sin().sum()
    }
}

/// All gradients, by the path of their parameters.
#[derive(Default)]
struct Found {
    by_id: BTreeMap<ParamId, Vec<f64>>,
}

struct Finder<'a> {
    gradients: &'a GradientsParams,
    found: Found,
}

impl ModuleVisitor<Train> for Finder<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Train, D>>) {
        if let Some(gradient) = self.gradients.get::<Plain, D>(param.id) {
            self.found.by_id.insert(param.id, gradient.into_data().iter::<f64>().collect());
        }
    }
}

fn found<M: Module<Train>>(model: &M, step: &Backward) -> Found {
    let mut finder = Finder { gradients: &step.gradients, found: Found::default() };
    model.visit(&mut finder);
    assert_eq!(finder.found.by_id.len(), step.gradients.len(), "no other gradients");
    finder.found
}

/// Fails unless two steps are the same within rounding.
#[track_caller]
pub fn assert_same<M: Module<Train>>(model: &M, step: &Backward, expected: &Backward) {
    assert!((step.loss - expected.loss).abs() < 1e-4, "{} {}", step.loss, expected.loss);
    let (step, expected) = (found(model, step).by_id, found(model, expected).by_id);
    assert_eq!(Vec::from_iter(step.keys()), Vec::from_iter(expected.keys()));
    // The gradients of the keys' biases are zero.
    let large = |values: &Vec<f64>| values.iter().any(|value| value.abs() > 1e-3);
    let count = expected.values().filter(|values| large(values)).count();
    assert!(4 * count > 3 * expected.len(), "{expected:?}");
    for (id, values) in &expected {
        let largest = values.iter().fold(1.0, |largest: f64, value| largest.max(value.abs()));
        for (ours, value) in step[id].iter().zip(values) {
            assert!((ours - value).abs() < 1e-4 * largest, "{:?} {values:?}", step[id]);
        }
    }
}

fn config() -> LoraConfig {
    LoraConfig::new(2, 0.7).with_init(Init::RandomBoth)
}

/// Models of which all layers, a few layers, or everything trains.
fn models() -> Vec<Lora<Train, Net<Train>>> {
    let net = || Net::<Train>::new(&device::<Train>());
    let some =
        config().with_targets(["blocks.1.mix"]).with_modules_to_save(["head", "blocks.2.norm"]);
    vec![
        net().attach(&config()).unwrap(),
        net().attach(&some).unwrap(),
        net().train_only(&[".*"]).unwrap(),
    ]
}

fn plain(model: &Lora<Train, Net<Train>>) -> Backward {
    Backward::new(model, model.all(&TEXTS, &device::<Train>()))
}

#[test]
fn workers_give_the_gradients_of_the_whole_batch() {
    for model in models() {
        let expected = plain(&model);
        for count in [1, 2, 3] {
            let workers = Workers::new(count);
            assert_eq!(workers.count(), count);
            // A GPU backend has one worker in practice, and its software driver takes seconds for a pass.
            let sizes = if cfg!(feature = "wgpu") { &[2][..] } else { &[1, 2, 5] };
            for &size in sizes {
                let step = || {
                    let parts = TEXTS.chunks(size).collect();
                    workers.backward(&model, parts, |model, texts| {
                        Backward::new(model, model.all(texts, &device::<Train>()))
                    })
                };
                let (first, second) = (step(), step());
                assert_same(&model, &first, &expected);
                let bits = |step| {
                    let values = found(&model, step).by_id.into_values().flatten();
                    values.map(f64::to_bits).collect::<Vec<_>>()
                };
                assert_eq!(bits(&first), bits(&second));
            }
        }
    }
}

#[test]
fn workers_share_weights_that_nobody_used_yet() {
    let device = device::<Train>();
    let x = ids::<Train>(&TEXTS, &device).float();
    let model = LinearConfig::new(5, 4).init::<Train>(&device);
    let pass = |model: &Linear<Train>, x: Tensor<Train, 2>| {
        Backward::new(model, model.forward(x).square().sum())
    };
    let step = Workers::new(2).backward(&model, x.clone().chunk(2, 0), pass);
    assert_same(&model, &step, &pass(&model, x));
}

#[test]
fn workers_without_parts_give_nothing() {
    let model = &models()[0];
    let parts = Vec::<()>::new();
    let step = Workers::new(2).backward(model, parts, |_, ()| panic!("it is not called"));
    assert!(step.loss == 0.0 && step.gradients.is_empty());
}

#[test]
fn workers_compute_in_the_order_of_the_parts() {
    let model = &models()[0];
    let device = device::<Train>();
    let step = Workers::new(2).backward(model, vec![1e17, 3.0, -1e17], |model, part| {
        // In the order of the workers, 3 would be left.
        let zero = model.all(&TEXTS, &device) * 0.0;
        let loss = Backward::new(model, zero).loss + part;
        Backward { loss, gradients: GradientsParams::new() }
    });
    assert_eq!(step.loss, 0.0);
}

/// The message with which `action` panics.
fn panic_of(action: impl FnOnce()) -> String {
    let panic = std::panic::catch_unwind(AssertUnwindSafe(action)).expect_err("it panics");
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|it| (*it).to_owned())).unwrap()
}

#[test]
fn a_workers_panic_is_passed_on() {
    let model = &models()[0];
    let message = panic_of(|| {
        Workers::new(2).backward(model, vec![1, 2], |model, part| {
            assert!(part == 1, "part {part} is wrong");
            Backward::new(model, model.all(&TEXTS, &device::<Train>()))
        });
    });
    assert_eq!(message, "part 2 is wrong");
    assert!(panic_of(|| drop(Workers::new(0))).contains("at least one worker expected"));
}

#[test]
fn segments_give_the_gradients_of_a_plain_pass() {
    for model in models() {
        assert_same(&model, &segments(&model, &TEXTS[..]), &plain(&model));
    }
}

#[test]
fn workers_compute_in_segments() {
    let model = &models()[0];
    let parts = TEXTS.chunks(2).collect();
    let step =
        Workers::new(2).backward(model, parts, |model, texts: &Texts| segments(model, texts));
    assert_same(model, &step, &plain(model));
}

#[test]
fn segments_refuse_dropout() {
    let net = Net::<Train>::new(&device::<Train>());
    let model = net.attach(&config().with_dropout(0.5)).unwrap();
    let message = panic_of(|| drop(segments(&model, &TEXTS[..])));
    assert!(message.contains("segments allow neither dropout nor batch norms"), "{message}");
    let wild = LoraConfig::new(2, 1e38).with_init(Init::RandomBoth);
    // A loss that is no number is no matter of dropout.
    let model = Net::<Train>::new(&device::<Train>()).attach(&wild).unwrap();
    assert!(!segments(&model, &TEXTS[..]).loss.is_finite());
}

/// Stock layers, which the overlay adapts.
#[derive(Module, Debug)]
struct Stock<B: Backend> {
    layers: Vec<Linear<B>>,
    norm: Option<BatchNorm<B>>,
}

impl<B: Backend> Blocks<B, 2, Texts> for Stock<B> {
    type Context = Tensor<B, 2>;

    fn blocks(&self) -> usize {
        self.layers.len()
    }

    fn context(&self, texts: &Texts, device: &B::Device) -> Self::Context {
        ids(texts, device).float()
    }

    fn begin(&self, x: &Self::Context) -> Tensor<B, 2> {
        x.clone()
    }

    fn block(&self, index: usize, x: Tensor<B, 2>, _: &Self::Context) -> Tensor<B, 2> {
        let x = self.layers[index].forward(x).tanh();
        match &self.norm {
            Some(norm) => norm.forward(x),
            None => x,
        }
    }

    fn loss(&self, _: usize, x: Tensor<B, 2>, _: &Self::Context) -> Tensor<B, 1> {
        x.square().sum()
    }
}

fn stock(norm: bool) -> Stock<Train> {
    let device = device::<Train>();
    let layers: Vec<_> = (0..3).map(|_| LinearConfig::new(5, 5).init::<Train>(&device)).collect();
    for layer in &layers {
        let _ = layer.forward(Tensor::<Train, 2>::zeros([1, 5], &device));
    }
    Stock { layers, norm: norm.then(|| BatchNormConfig::new(5).init(&device)) }
}

#[test]
fn segments_see_the_adapters_of_the_overlay() {
    let model = Lora::overlay(stock(false)).attach(&config()).unwrap();
    let expected = model.with_adapters(|stock| {
        let x = ids::<Train>(&TEXTS, &device::<Train>()).float();
        let y = stock.layers.iter().fold(x, |x, layer| layer.forward(x).tanh());
        Backward::new(&model, y.square().sum())
    });
    let step = segments::<Train, _, Texts, 2>(&model, &TEXTS);
    assert_same(&model, &step, &expected);
    assert_eq!(step.gradients.len(), 6);
}

#[test]
fn segments_refuse_batch_norms() {
    let model = Lora::overlay(stock(true)).with_own_statistics().attach(&config()).unwrap();
    let message = panic_of(|| drop(segments::<Train, _, Texts, 2>(&model, &TEXTS)));
    assert!(message.contains("neither dropout nor batch norms"), "{message}");
}
