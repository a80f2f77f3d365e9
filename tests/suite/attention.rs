//! Attention with adapters computes what Burn's own attention computes with the merged weights.

use burn::{
    module::{AutodiffModule, Module, Param},
    nn::{
        Linear,
        attention::{
            MhaCache, MhaInput, MultiHeadAttention, MultiHeadAttentionConfig,
            generate_autoregressive_mask,
        },
    },
    tensor::{Bool, Tensor, TensorData, backend::Backend},
};
use burn_lora::{
    Init, Lora, LoraConfig, LoraLinear,
    nn::{LoraMhaCache, LoraMhaInput, LoraMultiHeadAttention, swap_heads},
};
use proptest::prelude::*;

use crate::{
    model::{Plain, Train, device, random_cases},
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
            let context = layer.context(ours.clone());
            let (ours, burns) = (layer.forward(ours), plain.forward(burns));
            let expected = values(burns.context);
            assert_close(context, &expected, TOLERANCE);
            assert_close(ours.context, &expected, TOLERANCE);
            assert_close(ours.weights, &values(burns.weights), TOLERANCE);
        }
    }
}

#[test]
fn a_context_with_any_mask() {
    let layer = everywhere().init_attention(base(false));
    let mask = |hidden: fn(usize) -> bool| {
        let hidden: Vec<_> = (0..2 * 4 * 4).map(hidden).collect();
        Tensor::<Plain, 3, Bool>::from_data(TensorData::new(hidden, [2, 4, 4]), &device::<Plain>())
    };
    let masks: [fn(usize) -> bool; 4] = [
        // Runs of keys that begin and end anywhere.
        |it| it % 4 < it / 4 % 4 / 2,
        // Holes.
        |it| it % 3 == 1,
        // Some queries see nothing.
        |it| it / 4 == 2,
        |_| true,
    ];
    for hidden in masks {
        let input = LoraMhaInput::self_attn(input(2, 4, 3)).mask_attn(mask(hidden));
        let expected = values(layer.forward(input.clone()).context);
        assert_close(layer.context(input.clone()), &expected, TOLERANCE);
        let expected = values(layer.forward(input.clone().mask_pad(padding())).context);
        assert_close(layer.context(input.mask_pad(padding())), &expected, TOLERANCE);
    }
    let nothing =
        layer.context(LoraMhaInput::self_attn(Tensor::zeros([2, 0, 6], &device::<Plain>())));
    assert_eq!(nothing.dims(), [2, 0, 6]);
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

/// The sizes of a layer and its inputs, and which of its projections have adapters.
#[derive(Clone, Debug)]
struct Case {
    heads: usize,
    width: usize,
    batch: usize,
    /// The numbers of queries, and of keys and values.
    lengths: [usize; 2],
    rank: usize,
    targets: Vec<&'static str>,
}

fn cases() -> impl Strategy<Value = Case> {
    let sizes = (1..=3usize, 1..=4usize, 1..=2usize, [1..=4usize, 1..=4], 1..=4usize);
    let targets = proptest::sample::subsequence(vec!["query", "key", "value", "output"], 1..=4);
    (sizes, targets).prop_map(|((heads, size, batch, lengths, rank), targets)| Case {
        heads,
        width: heads * size,
        batch,
        lengths,
        rank,
        targets,
    })
}

/// The projection with its adapter in a weight that trains.
fn dense(projection: &LoraLinear<Train>) -> Linear<Train> {
    let plain = Lora::new(projection.clone()).merge().unwrap().base.clone();
    let trains = |value: Tensor<Train, 2>| Param::from_tensor(value.detach().require_grad());
    let bias = plain.bias.map(|it| Param::from_tensor(it.val().detach().require_grad()));
    Linear { weight: trains(plain.weight.val()), bias }
}

fn matrix(tensor: Tensor<Plain, 2>) -> Matrix {
    let [rows, cols] = tensor.dims();
    Matrix { rows, cols, ..values(tensor) }
}

/// Burn's own gradients of dense weights give those of A, B and the bias, by the chain rule.
fn check(case: &Case) {
    let device = device::<Train>();
    let config = MultiHeadAttentionConfig::new(case.width, case.heads).with_dropout(0.0);
    let base: MultiHeadAttention<Train> = config.init(&device);
    let lora = LoraConfig::new(case.rank, 3.0).with_init(Init::RandomBoth).with_bias(true);
    let targets = case.targets.iter().copied();
    // The first use draws the weights.
    let _ = base.forward(MhaInput::self_attn(Tensor::zeros([1, 1, case.width], &device)));
    let layer = lora.with_targets(targets).init_attention(base.clone());
    let [query, key, value, output] =
        [&layer.query, &layer.key, &layer.value, &layer.output].map(dense);
    let plain = MultiHeadAttention { query, key, value, output, ..base };

    let [queries, keys] = case.lengths;
    let input = |length: usize, seed| {
        let shape = [case.batch, length, case.width];
        let values = Matrix::random(case.batch * length, case.width, seed);
        values.tensor::<Train, 3>(shape, &device).require_grad()
    };
    let inputs = || [input(queries, 1), input(keys, 2), input(keys, 3)];
    let (ours, burns) = (inputs(), inputs());
    let [q, k, v] = ours.clone();
    let our_output = layer.forward(LoraMhaInput::new(q, k, v)).context;
    let [q, k, v] = burns.clone();
    let burns_output = plain.forward(MhaInput::new(q, k, v)).context;
    assert_close(our_output.clone(), &values(burns_output.clone().inner()), TOLERANCE);

    let our_grads = our_output.sin().sum().backward();
    let burns_grads = burns_output.sin().sum().backward();
    for (ours, burns) in ours.iter().zip(&burns) {
        let expected = values(burns.grad(&burns_grads).unwrap());
        assert_close(ours.grad(&our_grads).unwrap(), &expected, 2.0 * TOLERANCE);
    }
    let scale = 3.0;
    for (lora, dense) in [
        (&layer.query, &plain.query),
        (&layer.key, &plain.key),
        (&layer.value, &plain.value),
        (&layer.output, &plain.output),
    ] {
        let Some(adapter) = lora.adapter() else { continue };
        let d_weight = matrix(dense.weight.grad(&burns_grads).unwrap());
        let [a, b] = [&adapter.a, &adapter.b].map(|it| matrix(it.val().inner()));
        let d_a = d_weight.times(&b.transpose()).scaled(scale);
        let d_b = a.transpose().times(&d_weight).scaled(scale);
        assert_close(adapter.a.grad(&our_grads).unwrap(), &d_a, 2.0 * TOLERANCE);
        assert_close(adapter.b.grad(&our_grads).unwrap(), &d_b, 2.0 * TOLERANCE);
        let d_bias = dense.bias.as_ref().unwrap().grad(&burns_grads).unwrap();
        let bias = adapter.bias.as_ref().unwrap().grad(&our_grads).unwrap();
        assert_close(bias, &values(d_bias).scaled(scale), 2.0 * TOLERANCE);
    }
}

proptest! {
    #![proptest_config(random_cases(16))]

    #[test]
    fn outputs_and_gradients_of_layers_of_any_size(case in cases()) {
        check(&case);
    }
}

#[test]
fn swapped_heads_and_their_gradients_are_those_of_burn() {
    fn random<B: Backend>(shape: [usize; 4], seed: u64) -> Tensor<B, 4> {
        Matrix::random(shape[..3].iter().product(), shape[3], seed).tensor(shape, &device::<B>())
    }
    for shape in
        [[2, 3, 4, 5], [1, 1, 3, 2], [3, 4, 1, 1], [2, 1, 1, 7], [1, 6, 2, 16], [2, 0, 3, 4]]
    {
        let plain = random::<Plain>(shape, 1);
        assert_identical(swap_heads(plain.clone()), plain.clone().swap_dims(1, 2));
        assert_identical(swap_heads(swap_heads(plain.clone())), plain);

        if shape.contains(&0) {
            // Burn's wgpu backend has no products of empty tensors.
            continue;
        }
        // Also of a view, and for a gradient that is a view.
        let swap = |way: fn(Tensor<Train, 4>) -> Tensor<Train, 4>| {
            let x = random::<Train>(shape, 1).require_grad();
            let y = way(x.clone().swap_dims(2, 3)).swap_dims(1, 3);
            let [a, b, c, d] = y.dims();
            let grads = (y * random::<Train>([a, b, c, d], 2)).sum().backward();
            values(x.grad(&grads).unwrap())
        };
        assert_eq!(swap(swap_heads).data, swap(|x| x.swap_dims(1, 2)).data);
    }
}

#[test]
fn a_record_of_burns_attention_loads() {
    use burn::record::{FullPrecisionSettings, NamedMpkBytesRecorder, Recorder};
    let plain = base(false);
    let recorder = NamedMpkBytesRecorder::<FullPrecisionSettings>::new();
    let bytes = recorder.record(plain.clone().into_record(), ()).unwrap();
    let layer = LoraMultiHeadAttention::from(base(false));
    let layer = layer.load_record(recorder.load(bytes, &device::<Plain>()).unwrap());
    assert_identical(layer.query.base.weight.val(), plain.query.weight.val());
}
