//! Attention with adapters computes what Burn's own attention computes with the merged weights.

use burn::{
    module::AutodiffModule,
    nn::attention::{
        MhaCache, MhaInput, MultiHeadAttention, MultiHeadAttentionConfig,
        generate_autoregressive_mask,
    },
    tensor::{Bool, Tensor, backend::Backend},
};
use burn_lora::{Init, Lora, LoraConfig, LoraMhaCache, LoraMhaInput, LoraMultiHeadAttention};

use crate::{
    model::{Plain, Train, device},
    oracle::{Matrix, assert_close, assert_identical},
};

const TOLERANCE: f64 = 1e-5;

fn base(quiet: bool) -> MultiHeadAttention<Plain> {
    let config = MultiHeadAttentionConfig::new(6, 2).with_quiet_softmax(quiet);
    let base = config.with_dropout(0.0).init(&device::<Plain>());
    // The first use draws the weights. Clones of an unused layer would each draw their own.
    let _ = base.forward(MhaInput::self_attn(input(1, 1, 1)));
    base
}

fn config() -> LoraConfig {
    LoraConfig::new(2, 3.0).with_init(Init::RandomBoth)
}

fn everywhere() -> LoraConfig {
    config().with_targets(["query", "key", "value", "output"]).with_bias(true)
}

fn input<B: Backend>(batch: usize, length: usize, seed: u64) -> Tensor<B, 3> {
    Matrix::random(batch * length, 6, seed).tensor([batch, length, 6], &device::<B>())
}

fn values<const D: usize>(tensor: Tensor<Plain, D>) -> Matrix {
    let data = tensor.into_data().convert::<f64>().to_vec().unwrap();
    Matrix { rows: 1, cols: data.len(), data }
}

/// Burn's layer with the adapters merged into its weights.
fn merged(
    layer: &LoraMultiHeadAttention<Plain>,
    like: &MultiHeadAttention<Plain>,
) -> MultiHeadAttention<Plain> {
    let plain = Lora::new(layer.clone()).merge().unwrap();
    MultiHeadAttention {
        query: plain.query.base,
        key: plain.key.base,
        value: plain.value.base,
        output: plain.output.base,
        ..like.clone()
    }
}

fn padding() -> Tensor<Plain, 2, Bool> {
    let rows = [[false, false, false, true], [false, true, false, true]];
    Tensor::from_data(rows, &device::<Plain>())
}

#[test]
fn masks_and_quiet_softmax() {
    for quiet in [false, true] {
        let base = base(quiet);
        let layer = everywhere().init_attention(base.clone());
        let plain = merged(&layer, &base);
        let (x, y, z) = (input(2, 3, 1), input(2, 4, 2), input(2, 4, 3));
        let causal = generate_autoregressive_mask::<Plain>(2, 4, &device::<Plain>());
        let square = || input::<Plain>(2, 4, 4);
        let cases = [
            (
                LoraMhaInput::self_attn(square()).mask_attn(causal.clone()),
                MhaInput::self_attn(square()).mask_attn(causal),
            ),
            (
                LoraMhaInput::self_attn(square()).mask_pad(padding()),
                MhaInput::self_attn(square()).mask_pad(padding()),
            ),
            (
                LoraMhaInput::new(x.clone(), y.clone(), z.clone()).mask_pad(padding()),
                MhaInput::new(x, y, z).mask_pad(padding()),
            ),
        ];
        for (ours, burns) in cases {
            let (ours, burns) = (layer.forward(ours), plain.forward(burns));
            assert_close(ours.context, &values(burns.context), TOLERANCE);
            assert_close(ours.weights, &values(burns.weights), TOLERANCE);
        }
    }
}

#[test]
fn without_adapters_it_is_the_base() {
    let base = base(false);
    let layer = LoraMultiHeadAttention::from(base.clone());
    let ours = layer.forward(LoraMhaInput::self_attn(input(2, 4, 1))).context;
    let burns = base.forward(MhaInput::self_attn(input(2, 4, 1))).context;
    assert_close(ours, &values(burns), 1e-6);
}

#[test]
fn caches() {
    let base = base(false);
    let layer = everywhere().init_attention(base.clone());
    let plain = merged(&layer, &base);
    let (mut ours, mut burns) = (LoraMhaCache::autoregressive(), MhaCache::autoregressive());
    let memory = || input::<Plain>(2, 4, 9);
    let mut our_cross = LoraMhaCache::autoregressive_cross_attention();
    let mut burns_cross = MhaCache::autoregressive_cross_attention();
    let whole = input::<Plain>(2, 5, 1);
    for length in 1..=5 {
        let x = whole.clone().narrow(1, 0, length);
        let a = layer.forward_cache(LoraMhaInput::self_attn(x.clone()), &mut ours);
        let b = plain.forward_cache(MhaInput::self_attn(x.clone()), &mut burns);
        assert_close(a.context, &values(b.context), TOLERANCE);
        let input = LoraMhaInput::new(x.clone(), memory(), memory());
        let a = layer.forward_cache(input, &mut our_cross);
        let b = plain.forward_cache(MhaInput::new(x, memory(), memory()), &mut burns_cross);
        assert_close(a.context, &values(b.context), TOLERANCE);
    }
}

#[test]
fn queries_and_values_are_the_default() {
    let chosen = |config: LoraConfig| {
        let layer = config.init_attention(base(false));
        [&layer.query, &layer.key, &layer.value, &layer.output].map(|it| it.adapter().is_some())
    };
    assert_eq!(chosen(config()), [true, false, true, false]);
    assert_eq!(chosen(config().with_targets(["key", "output"])), [false, true, false, true]);
}

#[test]
fn only_the_adapters_get_gradients() {
    let base: MultiHeadAttention<Train> =
        MultiHeadAttentionConfig::new(6, 2).with_dropout(0.0).init(&device::<Train>());
    let layer = config().init_attention(base);
    let x = input::<Train>(2, 4, 1).require_grad();
    let y = layer.forward(LoraMhaInput::self_attn(x.clone())).context;
    let grads = y.sin().sum().backward();
    for projection in [&layer.query, &layer.key, &layer.value, &layer.output] {
        assert!(projection.base.weight.grad(&grads).is_none());
        if let Some(adapter) = projection.adapter() {
            assert!(adapter.a.grad(&grads).is_some() && adapter.b.grad(&grads).is_some());
        }
    }
    assert!(x.grad(&grads).is_some());
    let again = layer.valid().forward(LoraMhaInput::self_attn(x.inner())).context;
    assert_eq!(again.dims(), [2, 4, 6]);
}

#[test]
fn a_record_of_burns_attention_loads() {
    use burn::{
        module::Module,
        record::{FullPrecisionSettings, NamedMpkBytesRecorder, Recorder},
    };
    let plain = base(false);
    let recorder = NamedMpkBytesRecorder::<FullPrecisionSettings>::new();
    let bytes = recorder.record(plain.clone().into_record(), ()).unwrap();
    let layer = LoraMultiHeadAttention::from(base(false));
    let layer = layer.load_record(recorder.load(bytes, &device::<Plain>()).unwrap());
    assert_identical(layer.query.base.weight.val(), plain.query.weight.val());
}
