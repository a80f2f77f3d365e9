//! Operations on whole models: which layers get an adapter, what is counted, and what is refused.

use std::collections::BTreeSet;

use burn::{
    module::{Module, Param},
    nn::LinearConfig,
    optim::{AdamConfig, GradientsParams, Optimizer},
    tensor::{Tensor, backend::Backend},
};
use burn_lora::{
    Init, Lora, LoraAdapter, LoraAdapters, LoraConfig, LoraError, LoraLinear, LoraModule, Scaling,
};

use crate::{
    model::{Mlp, Plain, PlainMlp, Train, device},
    oracle::{Matrix, bits},
};

fn model() -> Mlp<Train> {
    Mlp::new(&device::<Train>())
}

/// The paths of the layers that have an adapter.
fn adapted(model: &Mlp<Train>) -> Vec<String> {
    let layers = model.parameters().layers.into_iter();
    layers.filter(|layer| layer.adapter.is_some()).map(|layer| layer.path).collect()
}

fn attach(config: &LoraConfig) -> Vec<String> {
    adapted(&model().attach(config).unwrap())
}

#[test]
fn targets_choose_layers() {
    let config = LoraConfig::new(2, 4.0);
    assert_eq!(attach(&config), ["blocks.0", "blocks.1", "head"]);
    assert_eq!(attach(&config.clone().with_targets(["head"])), ["head"]);
    assert_eq!(attach(&config.clone().with_targets([r"blocks\.\d"])), ["blocks.0", "blocks.1"]);
    assert_eq!(attach(&config.clone().with_targets(["1", "head"])), ["blocks.1", "head"]);
    assert_eq!(attach(&config.clone().with_excludes(["blocks.0"])), ["blocks.1", "head"]);
    let saved = config.with_modules_to_save(["head"]);
    assert_eq!(attach(&saved), ["blocks.0", "blocks.1"], "what trains in full is not adapted");
}

#[test]
fn patterns_set_rank_and_alpha_of_layers() {
    let config = LoraConfig::new(2, 4.0)
        .with_scaling(Scaling::AlphaOverRank)
        .with_rank_pattern([("head", 1)])
        .with_alpha_pattern([("blocks.1", 10.0)]);
    let layers = model().attach(&config).unwrap().parameters().layers;
    let adapters: Vec<_> = layers.into_iter().map(|layer| layer.adapter.unwrap()).collect();
    assert_eq!(adapters, [(2, 2.0), (2, 5.0), (1, 4.0)]);
}

#[test]
fn a_pattern_without_a_match_is_an_error_that_lists_the_paths() {
    let config = LoraConfig::new(2, 4.0);
    let refused = [
        (
            config.clone().with_targets(["head", "query", "value"]),
            "targets matched nothing: `query`, `value`; the model has: `blocks.0`, `blocks.1`, `head`",
        ),
        (config.clone().with_excludes(["query"]), "excludes matched nothing: `query`"),
        (config.clone().with_rank_pattern([("query", 1)]), "rank_pattern matched nothing: `query`"),
        (config.clone().with_alpha_pattern([("query", 1.0)]), "alpha_pattern matched nothing"),
        (
            config.clone().with_modules_to_save(["classifier"]),
            "modules_to_save matched nothing: `classifier`; the model has: `blocks.0.weight`",
        ),
        (
            config.clone().with_targets(["head"]).with_excludes(["head"]),
            "targets, without excludes and modules_to_save, matched nothing: `head`",
        ),
        (LoraConfig::new(0, 1.0), "`rank` is 0"),
        (
            config.clone().with_modules_to_save(["blocks.0.bias"]),
            "`modules_to_save` names `blocks.0.bias` of an adapted layer",
        ),
    ];
    for (config, message) in refused {
        let error = model().attach(&config).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
}

#[test]
fn attaching_twice_is_refused_but_other_layers_can_follow() {
    let config = LoraConfig::new(2, 4.0);
    let head = model().attach(&config.clone().with_targets(["head"])).unwrap();
    let error = head.attach(&config).unwrap_err();
    assert!(matches!(&error, LoraError::AlreadyAttached { paths } if paths == &["head"]));
    assert_eq!(error.to_string(), "already adapted: `head`; detach or merge the adapters first");
    let both = head.attach(&config.with_targets(["blocks.0"])).unwrap();
    assert_eq!(adapted(&both), ["blocks.0", "head"]);
}

#[test]
fn operations_leave_the_model_as_it_was() {
    let model = model();
    let adapted = model.attach(&LoraConfig::new(2, 4.0)).unwrap();
    assert!(model.head.adapter().is_none() && adapted.head.adapter().is_some());
    let trainable = model.parameters().trainable;
    assert_eq!(trainable, model.num_params(), "attaching froze another model");
    let _ = adapted.detach();
    assert!(adapted.head.adapter().is_some());
}

#[test]
fn only_adapters_and_modules_to_save_train() {
    let config = LoraConfig::new(2, 4.0).with_modules_to_save(["head", "norm.gamma"]);
    let model = model().attach(&config).unwrap();
    let x = Matrix::random(4, 6, 1).tensor::<Train, 2>([4, 6], &device::<Train>());
    let grads = model.forward(x).sin().sum().backward();
    assert!(model.norm.gamma.grad(&grads).is_some());
    assert!(model.norm.beta.as_ref().unwrap().grad(&grads).is_none());
    assert!(model.head.base.weight.grad(&grads).is_some());
    // A and B of two adapters, the head's weight, and the norm's gamma.
    assert_eq!(GradientsParams::from_grads(grads, &model).len(), 6);
    assert_eq!(model.parameters().trainable, 2 * (6 + 8) + 2 * (8 + 7) + 7 * 3 + 7);
}

#[test]
fn training_some_modules_only() {
    let model = model();
    let head = model.train_only(&["head"]).unwrap();
    assert_eq!(head.parameters().trainable, 7 * 3);
    assert_eq!(model.train_only(&[]).unwrap().parameters().trainable, 0);
    let everything = head.train_only(&[".*"]).unwrap();
    assert_eq!(everything.parameters().trainable, model.num_params());
    assert_eq!(everything.adapters().num_params(), model.num_params());
    let error = model.train_only(&["heat"]).unwrap_err().to_string();
    assert_eq!(error, "train_only matched nothing: `heat`; did you mean `head`?");

    let adapted = model.attach(&LoraConfig::new(2, 4.0).with_targets(["head"])).unwrap();
    let everything = adapted.train_only(&[".*"]).unwrap().parameters();
    let under_the_adapter = 7 * 3;
    assert_eq!(everything.trainable, everything.total - under_the_adapter + 2 * (7 + 3));
}

#[test]
fn a_layer_in_columns_that_was_never_used() {
    let config = LinearConfig::new(4, 8).with_layout(burn::nn::LinearLayout::Col);
    let layer = || config.init::<Plain>(&device::<Plain>());
    let adapted = LoraConfig::new(2, 4.0).init(layer());
    assert_eq!(adapted.adapter().unwrap().shape(), [4, 8]);
    let x = || Matrix::random(3, 4, 1).tensor::<Plain, 2>([3, 4], &device::<Plain>());
    assert_eq!(adapted.forward(x()).dims(), [3, 8]);
    assert_eq!(LoraLinear::from(layer()).forward(x()).dims(), [3, 8]);
}

#[test]
fn the_missions_example() {
    // LoRA on a weight of 5,000 by 10,000 with rank 8: 120,000 trainable parameters, 416 times fewer.
    let base = LinearConfig::new(5_000, 10_000).with_bias(false).init::<Plain>(&device::<Plain>());
    let report = LoraConfig::new(8, 16.0).init(base).parameters();
    assert_eq!((report.trainable, report.total), (120_000, 50_000_000));
    assert_eq!(report.total / report.trainable, 416);
    let text = report.to_string();
    assert!(text.ends_with("trainable 120,000 of 50,000,000 parameters (0.24 %)"), "{text}");
}

#[test]
fn the_report_counts_what_really_trains() {
    let config = LoraConfig::new(2, 4.0).with_targets(["blocks"]).with_modules_to_save(["norm"]);
    let config = config.with_targets(["blocks.0"]);
    let adapted = model().attach(&config).unwrap();
    let report = adapted.parameters();
    let rows = report.layers.iter();
    let rows: Vec<_> = rows.map(|row| (row.path.as_str(), row.trainable, row.total)).collect();
    let expected = [
        ("blocks.0", 2 * (6 + 8), 6 * 8 + 8),
        ("blocks.1", 0, 8 * 7 + 7),
        ("norm", 14, 14),
        ("head", 0, 7 * 3),
    ];
    assert_eq!(rows, expected);
    assert_eq!(report.trainable, rows.iter().map(|row| row.1).sum::<usize>());
    assert_eq!(report.total, rows.iter().map(|row| row.2).sum::<usize>());
    let text = report.to_string();
    let norm = text.lines().find(|line| line.starts_with("norm")).unwrap();
    assert_eq!(norm.split_whitespace().collect::<Vec<_>>(), ["norm", "14", "14", "100.00", "%"]);
    assert_eq!(adapted.clone().no_grad().parameters().trainable, 0);
    assert_eq!(adapted.into_inner().no_grad().parameters().trainable, 0);
}

#[test]
fn s14_a_target_that_holds_layers_says_what_means_them() {
    let config = LoraConfig::new(2, 4.0);
    let error = |config: LoraConfig| model().attach(&config).unwrap_err().to_string();
    let holds = r"`blocks` holds layers: `blocks\..*`";
    for (field, config) in [
        ("targets", config.clone().with_targets(["blocks"])),
        ("excludes", config.clone().with_excludes(["blocks"])),
        ("rank_pattern", config.clone().with_rank_pattern([("blocks", 1)])),
        ("targets", config.clone().with_targets(["blocks"]).with_excludes(["blocks"])),
    ] {
        assert_eq!(error(config), format!("{field} matched nothing: `blocks`; {holds}"));
    }
    // What it says is right.
    let whole = config.clone().with_targets([r"blocks\..*"]);
    assert_eq!(model().attach(&whole).unwrap().adapters().len(), 2);
    // Excluded targets are not misspelt.
    let excluded = error(config.clone().with_targets(["head"]).with_excludes(["head"]));
    assert!(excluded.ends_with("excludes and modules_to_save leave out `head`"), "{excluded}");
    let all = error(config.clone().with_excludes([".*"]));
    assert!(all.ends_with("leave out `blocks.0`, `blocks.1`, `head`"), "{all}");
    // What is no layer, and a container of stock layers.
    let norm = error(config.clone().with_targets(["norm"]));
    assert!(norm.contains("`targets` names `norm.gamma`, which is no weight matrix"), "{norm}");
    let stock = PlainMlp::<Train>::new(&device::<Train>());
    let error = stock.attach(&config.clone().with_targets(["blocks"])).unwrap_err().to_string();
    assert!(error.starts_with("`blocks.0`, `blocks.1` cannot carry adapters"), "{error}");
}

#[test]
fn s14_the_first_table_has_the_names_that_targets_take() {
    let text = model().parameters().to_string();
    let (layers, others) = text.split_once("trains, is no target").unwrap();
    let names = |table: &str| -> Vec<String> {
        let rows = table.lines().skip_while(|line| !line.starts_with("---")).skip(1);
        let names = rows.filter_map(|line| line.split_whitespace().next());
        names.take_while(|name| *name != "trainable").map(str::to_owned).collect()
    };
    assert_eq!(names(layers), ["blocks.0", "blocks.1", "head"]);
    assert_eq!(names(others), ["norm"]);
    for name in names(layers) {
        model().attach(&LoraConfig::new(2, 4.0).with_targets([name])).unwrap();
    }
}

#[test]
fn s16_an_adapter_that_is_a_field_of_a_layer_of_ones_own_is_an_error() {
    #[derive(Module, Debug)]
    struct Own<B: Backend> {
        weight: Param<Tensor<B, 2>>,
        update: LoraAdapter<B>,
    }
    #[derive(Module, Debug)]
    struct Net<B: Backend> {
        own: Own<B>,
        head: LoraLinear<B>,
    }
    let device = device::<Train>();
    let full = |shape| Tensor::<Train, 2>::full(shape, 0.5, &device);
    let update = LoraAdapter::new(full([3, 2]), full([2, 4]), 1.0, Scaling::Alpha);
    let own = Own { weight: Param::from_tensor(full([3, 4])), update };
    let net = Net { own: own.clone(), head: LinearConfig::new(4, 2).init(&device).into() };
    let config = LoraConfig::new(2, 4.0);
    let error = net.attach(&config).unwrap_err();
    assert!(matches!(&error, LoraError::LooseAdapters { paths } if paths == &["own.update"]));
    for part in ["`own.update`", "`LoraLinear`", "docs/layers.md"] {
        assert!(error.to_string().contains(part), "{error}");
    }
    let whole = net.attach(&config.clone().with_modules_to_save(["own"])).unwrap_err();
    assert!(matches!(whole, LoraError::LooseAdapters { .. }), "{whole}");
    // Of a model without any layer of this crate, and through the overlay, too.
    let alone = own.attach(&config).unwrap_err();
    assert!(matches!(&alone, LoraError::LooseAdapters { paths } if paths == &["update"]));
    let overlay = Lora::overlay(own).attach(&config).unwrap_err();
    assert!(matches!(overlay, LoraError::LooseAdapters { .. }), "{overlay}");
    let set = LoraAdapters::new(
        [("head", LoraConfig::new(2, 4.0).init(net.head.base.clone()))]
            .map(|(path, layer)| (path, layer.adapter().unwrap().clone())),
    );
    assert!(matches!(net.switch(&set).unwrap_err(), LoraError::LooseAdapters { .. }));
}

#[test]
fn a_batch_norms_statistics_are_not_counted() {
    #[derive(Module, Debug)]
    struct Normed<B: Backend> {
        linear: LoraLinear<B>,
        norm: burn::nn::BatchNorm<B>,
    }
    let device = device::<Train>();
    let model: Normed<Train> = Normed {
        linear: LinearConfig::new(3, 4).init(&device).into(),
        norm: burn::nn::BatchNormConfig::new(4).init(&device),
    };
    let config = LoraConfig::new(2, 4.0).with_modules_to_save(["norm"]);
    let model = model.with_own_statistics().attach(&config).unwrap();
    assert!(model.switch(&model.adapters()).is_ok());
    let report = model.parameters();
    assert_eq!((report.trainable, report.total), (2 * (3 + 4) + 8, 3 * 4 + 4 + 8));
    let x = Matrix::random(5, 3, 1).tensor::<Train, 2>([5, 3], &device);
    let y: Tensor<Train, 2> = model.norm.forward(model.linear.forward(x));
    let grads = y.sin().sum().backward();
    assert_eq!(GradientsParams::from_grads(grads, &model).len(), 4);
}

/// One optimizer state for two parameters would move both by the wrong amount.
#[test]
fn clones_of_an_adapted_layer_train_as_if_made_apart() {
    let device = device::<Train>();
    let config = LoraConfig::new(2, 3.0).with_init(Init::RandomBoth);
    let layer: LoraLinear<Train> = config.init(LinearConfig::new(4, 4).init(&device));
    let apart = config.init(layer.base.clone());
    let pair = vec![layer.clone(), layer.clone()];
    let again = vec![layer, apart];
    let ids = |model: &Vec<LoraLinear<Train>>| {
        let adapters = model.iter().map(|it| it.adapter().unwrap());
        adapters.flat_map(|it| [it.a.id, it.b.id]).collect::<BTreeSet<_>>()
    };
    let train = |mut model: Lora<Train, Vec<LoraLinear<Train>>>| {
        assert_eq!(ids(&model).len(), 4);
        let mut optimizer = AdamConfig::new().init();
        for _ in 0..3 {
            let x = Matrix::random(5, 4, 2).tensor::<Train, 2>([5, 4], &device);
            let y = model.iter().fold(x, |x, layer| layer.forward(x).sin());
            let grads = GradientsParams::from_grads(y.sum().backward(), &model);
            assert_eq!(grads.len(), 4);
            model = optimizer.step(0.1, model, grads);
        }
        let values = |layer: &LoraLinear<Train>| bits(layer.adapter().unwrap().a.val());
        model.iter().map(values).collect::<Vec<_>>()
    };
    let expected = train(Lora::new(again));
    assert_eq!(train(Lora::new(pair.clone())), expected);
    // A set that holds one adapter twice.
    let twice =
        LoraAdapters::new([0, 1].map(|it| (it.to_string(), pair[0].adapter().unwrap().clone())));
    let bare = pair.iter().map(|layer| LoraLinear::from(layer.base.clone())).collect::<Vec<_>>();
    assert_eq!(train(bare.switch(&twice).unwrap()), expected);
}
