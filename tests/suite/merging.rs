//! Merging adds the update to a copy of the base, in full precision, or fails.

use burn::{
    module::Module,
    nn::LinearConfig,
    tensor::{Tensor, backend::Backend},
};
use burn_lora::{Init, Lora, LoraAdapter, LoraConfig, LoraError, LoraModule, Scaling};

use crate::{
    model::{Mlp, Plain, Train, device},
    oracle::{Matrix, assert_close, assert_identical},
};

fn config() -> LoraConfig {
    LoraConfig::new(2, 3.0).with_init(Init::RandomBoth).with_bias(true)
}

fn input<B: Backend>() -> Tensor<B, 2> {
    Matrix::random(4, 6, 1).tensor([4, 6], &device::<B>())
}

fn as_matrix<B: Backend>(tensor: Tensor<B, 2>) -> Matrix {
    let [rows, cols] = tensor.dims();
    Matrix { rows, cols, data: tensor.into_data().convert::<f64>().to_vec().unwrap() }
}

fn check_model<B: Backend>(model: Mlp<B>) {
    let adapted = model.attach(&config()).unwrap();
    let expected = adapted.forward(input());
    let merged = adapted.merge().unwrap();
    assert!(merged.blocks[0].adapter().is_none());
    assert_close(merged.forward(input()), &as_matrix(expected.clone()), 1e-5);

    // The head had no bias. It now has the adapter's.
    assert!(merged.head.base.bias.is_some() && adapted.head.base.bias.is_none());
    // Merging does not change the adapted model.
    assert_identical(adapted.forward(input()), expected);
    // Merging a merged model again changes nothing.
    let again = Lora::new(merged.clone()).merge().unwrap();
    assert_identical(again.forward(input()), merged.forward(input()));
}

#[test]
fn a_merged_model_gives_the_same_output() {
    check_model(Mlp::<Plain>::new(&device::<Plain>()));
    check_model(Mlp::<Train>::new(&device::<Train>()));
}

#[test]
fn a_merged_model_is_off_the_graph_and_frozen() {
    let adapted = Mlp::<Train>::new(&device::<Train>()).attach(&config()).unwrap();
    let merged = adapted.merge().unwrap();
    assert_eq!(merged.parameters().trainable, 0);
    let x = input::<Train>().require_grad();
    let grads = merged.forward(x.clone()).sum().backward();
    assert!(x.grad(&grads).is_some());
    assert!(adapted.head.adapter().unwrap().a.grad(&grads).is_none());
    // A merged model is a plain model, and can be trained.
    let trained = merged.train_only(&[".*"]).unwrap();
    assert_eq!(trained.parameters().trainable, trained.num_params());
}

#[test]
fn detaching_restores_the_base_exactly() {
    let model = Mlp::<Train>::new(&device::<Train>());
    let expected = model.forward(input());
    let adapted = model.attach(&config()).unwrap();
    assert_ne!(as_matrix(adapted.forward(input())), as_matrix(expected.clone()));
    assert_identical(adapted.detach().forward(input()), expected);
}

#[test]
fn a_diverged_adapter_is_not_merged() {
    for bad in [f32::NAN, f32::INFINITY] {
        let device = device::<Plain>();
        let base = LinearConfig::new(3, 2).init::<Plain>(&device);
        let a = Tensor::from_floats([[1.0], [bad], [1.0]], &device);
        let mut layer = LoraConfig::new(1, 1.0).init(base);
        let b = Tensor::from_floats([[1.0, 2.0]], &device);
        layer.set_adapter(Some(LoraAdapter::new(a, b, 1.0, Scaling::Alpha)));
        let before = layer.base.weight.val();
        let error = Lora::new(layer.clone()).merge().unwrap_err();
        assert!(matches!(error, LoraError::NotFinite { path } if path.is_empty()));
        assert!(layer.adapter().is_some());
        assert_identical(layer.base.weight.val(), before);
    }
}

#[test]
fn one_diverged_layer_stops_the_whole_merge_and_is_named() {
    let model = Mlp::<Plain>::new(&device::<Plain>()).attach(&config()).unwrap();
    let mut model = model.into_inner();
    let mut adapter = model.blocks[1].adapter().unwrap().clone();
    adapter.alpha = f64::MAX;
    model.blocks[1].set_adapter(Some(adapter));
    let error = Lora::new(model).merge().unwrap_err().to_string();
    assert_eq!(
        error,
        "merging `blocks.1` would produce NaN or infinite weights; nothing was merged"
    );
}
