//! LoRA+: B has its own learning rate, and everything else has the other, with any optimizer.

use burn::{
    module::Module,
    nn::{Embedding, EmbeddingConfig, Linear, LinearConfig},
    optim::{
        AdamWConfig, GradientsParams, MultiGradientsParams, Optimizer, SgdConfig,
        momentum::MomentumConfig,
    },
    tensor::{
        Int, Tensor,
        backend::{Backend, DeviceOps},
    },
};
use burn_lora::{
    Init, Lora, LoraConfig, LoraLinear, LoraModule, nn::LoraEmbedding, overlay::Overlay,
    train::LoraPlus,
};

use crate::{
    model::{Plain, Train, device},
    oracle::{Matrix, assert_close, assert_identical},
};

/// An embedding and a layer with adapters, and a head that trains in full.
#[derive(Module, Debug)]
struct Net<B: Backend> {
    table: LoraEmbedding<B>,
    fc: LoraLinear<B>,
    head: Linear<B>,
}

impl<B: Backend> Net<B> {
    fn loss(&self) -> Tensor<B, 1> {
        let ids = Tensor::<B, 2, Int>::from_ints([[1, 3, 0], [2, 2, 4]], &device::<B>());
        self.head.forward(self.fc.forward(self.table.forward(ids))).square().mean()
    }
}

fn net() -> Net<Train> {
    let device = device::<Train>();
    let net = Net {
        table: EmbeddingConfig::new(5, 6).init(&device).into(),
        fc: LinearConfig::new(6, 4).init(&device).into(),
        head: LinearConfig::new(4, 3).init(&device),
    };
    let config = LoraConfig::new(2, 3.0).with_init(Init::RandomBoth);
    let mut net = net.attach(&config.with_modules_to_save(["head"])).unwrap().into_inner();
    // The bias has the learning rate of its B. Embeddings cannot have a bias.
    let mut adapter = net.fc.adapter().unwrap().clone();
    let bias = Matrix::random(1, 4, 2).tensor([4], &device);
    adapter.bias = Some(burn::module::Param::from_tensor(bias));
    net.fc.set_adapter(Some(adapter));
    net
}

/// All trainable tensors, as matrices.
fn values(net: &Net<Train>) -> [(&'static str, Tensor<Plain, 2>); 7] {
    let (table, fc) = (net.table.adapter().unwrap(), net.fc.adapter().unwrap());
    let head = &net.head;
    [
        ("table.a", table.a.val().inner()),
        ("table.b", table.b.val().inner()),
        ("fc.a", fc.a.val().inner()),
        ("fc.b", fc.b.val().inner()),
        ("fc.bias", fc.bias.as_ref().unwrap().val().inner().unsqueeze()),
        ("head.weight", head.weight.val().inner()),
        ("head.bias", head.bias.as_ref().unwrap().val().inner().unsqueeze()),
    ]
}

fn grads(net: &Net<Train>) -> GradientsParams {
    GradientsParams::from_grads(net.loss().backward(), net)
}

/// The network after `steps` steps of the optimizer.
fn trained(
    mut net: Net<Train>,
    mut optimizer: impl Optimizer<Net<Train>, Train>,
    lr: f64,
    steps: usize,
) -> Net<Train> {
    for _ in 0..steps {
        let grads = grads(&net);
        net = optimizer.step(lr, net, grads);
    }
    net
}

#[test]
fn b_moves_by_the_ratio_further_and_all_else_as_before() {
    let net = net();
    let sgd = SgdConfig::new().init::<Train, Net<Train>>();
    let plain = trained(net.clone(), sgd.clone(), 0.1, 1);
    let plus = trained(net.clone(), LoraPlus::new(sgd, 5.0), 0.1, 1);
    let (before, plain, plus) = (values(&net), values(&plain), values(&plus));
    for ((before, plain), plus) in before.into_iter().zip(plain).zip(plus) {
        let factor = if ["fc.b", "fc.bias"].contains(&before.0) { 5.0 } else { 1.0 };
        let [rows, cols] = before.1.dims();
        let data = |tensor: Tensor<Plain, 2>| {
            let data = tensor.into_data().iter::<f64>().collect();
            Matrix { rows, cols, data }
        };
        let (before, plain) = (data(before.1), data(plain.1));
        let moved = plain.plus(&before.scaled(-1.0));
        assert!(moved.data.iter().any(|it| it.abs() > 1e-5), "{}", plus.0);
        assert_close(plus.1, &before.plus(&moved.scaled(factor)), 1e-6);
    }
}

#[test]
fn a_ratio_of_one_changes_nothing_with_any_optimizer() {
    let net = net();
    let adamw = AdamWConfig::new().with_weight_decay(0.1).init::<Train, Net<Train>>();
    let momentum = SgdConfig::new().with_momentum(Some(MomentumConfig::new()));
    let momentum = momentum.init::<Train, Net<Train>>();
    let pairs = [
        (
            trained(net.clone(), adamw.clone(), 0.1, 4),
            trained(net.clone(), LoraPlus::new(adamw, 1.0), 0.1, 4),
        ),
        (
            trained(net.clone(), momentum.clone(), 0.1, 4),
            trained(net, LoraPlus::new(momentum, 1.0), 0.1, 4),
        ),
    ];
    for (plain, plus) in pairs {
        for (plain, plus) in values(&plain).into_iter().zip(values(&plus)) {
            assert_identical(plain.1, plus.1);
        }
    }
}

#[test]
fn its_state_is_saved_and_loaded_exactly() {
    let new = || LoraPlus::new(AdamWConfig::new().init::<Train, Net<Train>>(), 8.0);
    let (mut net, mut optimizer) = (net(), new());
    for _ in 0..3 {
        let grads = grads(&net);
        net = optimizer.step(0.05, net, grads);
    }
    let record = Optimizer::<Net<Train>, Train>::to_record(&optimizer);
    let resumed = Optimizer::<Net<Train>, Train>::load_record(new(), record);
    let straight = trained(net.clone(), optimizer, 0.05, 3);
    let again = trained(net.clone(), resumed, 0.05, 3);
    let forgetful = trained(net, new(), 0.05, 3);
    let b = |net: &Net<Train>| net.fc.adapter().unwrap().b.val().inner();
    for (straight, again) in values(&straight).into_iter().zip(values(&again)) {
        assert_identical(straight.1, again.1);
    }
    let differ = b(&straight).not_equal(b(&forgetful)).any().into_scalar();
    assert!(burn::tensor::cast::ToElement::to_bool(&differ), "without its state it goes elsewhere");
}

#[test]
fn gradients_from_several_devices_are_split_too() {
    let net = net();
    let sgd = SgdConfig::new().init::<Train, Net<Train>>();
    let mut plus = LoraPlus::new(sgd.clone(), 5.0);
    let twice = trained(net.clone(), LoraPlus::new(sgd, 5.0), 0.2, 1);
    let id = device::<Train>().id();
    let both = MultiGradientsParams { grads: vec![(grads(&net), id), (grads(&net), id)] };
    let summed = plus.step_multi(0.1, net, both);
    for (twice, summed) in values(&twice).into_iter().zip(values(&summed)) {
        let [rows, cols] = twice.1.dims();
        let data = twice.1.into_data().iter::<f64>().collect();
        assert_close(summed.1, &Matrix { rows, cols, data }, 1e-6);
    }
}

#[test]
fn the_overlay_is_split_as_the_layers_are() {
    #[derive(Module, Debug)]
    struct Stock<B: Backend> {
        table: Embedding<B>,
        fc: Linear<B>,
    }
    let device = device::<Train>();
    let stock = Stock {
        table: EmbeddingConfig::new(5, 6).init(&device),
        fc: LinearConfig::new(6, 4).init(&device),
    };
    let config = LoraConfig::new(2, 3.0).with_init(Init::RandomBoth);
    let model = Lora::overlay(stock).attach(&config).unwrap();
    let loss = |model: &Lora<Train, Overlay<Train, Stock<Train>>>| {
        let ids = Tensor::<Train, 2, Int>::from_ints([[1, 3, 0]], &Default::default());
        model.with_adapters(|it| it.fc.forward(it.table.forward(ids))).square().mean()
    };
    let grads = || GradientsParams::from_grads(loss(&model).backward(), &model);
    let sgd = SgdConfig::new().init::<Train, Lora<Train, Overlay<Train, Stock<Train>>>>();
    let plain = sgd.clone().step(0.1, model.clone(), grads());
    let plus = LoraPlus::new(sgd, 5.0).step(0.1, model.clone(), grads());
    let moves = |after: &Lora<Train, Overlay<Train, Stock<Train>>>| {
        let after = after.adapters();
        let before = model.adapters();
        let moved = |path: &str, b: bool| {
            let [after, before] = [&after, &before].map(|set| {
                let adapter = set.get(path).unwrap();
                if b { adapter.b.val().inner() } else { adapter.a.val().inner() }
            });
            (after - before).abs().sum().into_data().iter::<f64>().sum::<f64>()
        };
        [moved("table", false), moved("table", true), moved("fc", false), moved("fc", true)]
    };
    let moves = moves(&plain).into_iter().zip(moves(&plus));
    for ((plain, plus), factor) in moves.zip([1.0, 1.0, 1.0, 5.0]) {
        assert!(plain > 1e-4 && (plus / plain - factor).abs() < 1e-2, "{plain} {plus} {factor}");
    }
}

#[test]
#[should_panic(expected = "a finite number above 0, got -1")]
fn a_ratio_below_zero_is_refused() {
    LoraPlus::new(SgdConfig::new().init::<Train, Net<Train>>(), -1.0);
}
