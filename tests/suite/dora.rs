//! Adapters with the magnitudes of DoRA: outputs and gradients against the formula, where the norms count as
//! constants, for every kind of layer.

use burn::{
    module::{Module, Param},
    nn::{
        Embedding, Linear, PaddingConfig1d, PaddingConfig2d,
        conv::{
            Conv1d, Conv1dConfig, Conv2d, Conv2dConfig, ConvTranspose2d, ConvTranspose2dConfig,
        },
    },
    tensor::{Int, Tensor, TensorData, backend::Backend},
};
use burn_lora::{
    Init, Lora, LoraAdapter, LoraAdapters, LoraConfig, LoraError, LoraLinear, LoraModule, Scaling,
    adapters::Combination,
    nn::{LoraConv1d, LoraConv2d, LoraConvTranspose2d, LoraEmbedding},
    quantize::Quantization,
    serve::MultiLora,
};

use crate::{
    model::{Mlp, Plain, Train, device, filled},
    oracle::{Matrix, Problem, assert_close, assert_identical, differences},
};

const TOLERANCE: f64 = 1e-5;
const ALPHA: f64 = 1.7;

/// A layer with its adapter, an input and magnitudes.
#[derive(Clone)]
struct Dora {
    plain: Problem,
    magnitude: Matrix,
    alpha: f64,
    /// The norms, if they are to stay as they are while other values move.
    norms: Option<Matrix>,
}

fn values<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Vec<f64> {
    tensor.into_data().convert::<f64>().to_vec().unwrap()
}

fn norms(weight: &Matrix) -> Matrix {
    weight.map(|it| it * it).sum_rows().map(f64::sqrt)
}

/// Each column of `matrix` times the number in `row`.
fn columns_times(matrix: &Matrix, row: &Matrix) -> Matrix {
    Matrix::from_fn(matrix.rows, matrix.cols, |r, c| matrix.at(r, c) * row.at(0, c))
}

impl Dora {
    fn new([rows, d_input, rank, d_output]: [usize; 4], bias: bool) -> Self {
        let plain = Problem {
            x: Matrix::random(rows, d_input, 1),
            w: Matrix::random(d_input, d_output, 2),
            bias: bias.then(|| Matrix::random(1, d_output, 3)),
            a: Matrix::random(d_input, rank, 4),
            b: Matrix::random(rank, d_output, 5),
            adapter_bias: None,
            scale: ALPHA / rank as f64,
        };
        let magnitude = Matrix::random(1, d_output, 6).map(|it| 1.5 + it);
        Self { plain, magnitude, alpha: ALPHA, norms: None }
    }

    /// A problem whose update leaves the share `e` of every other column. In `f32` the sum of the weight and the update
    /// is exact there, while their sums of squares are not.
    fn canceling(shape: [usize; 2], e: f64) -> Self {
        let [d_input, d_output] = shape;
        let mut dora = Self::new([4, d_input, 1, d_output], true);
        let plain = &mut dora.plain;
        plain.a = Matrix::from_fn(d_input, 1, |row, _| [1.0, -0.5, 2.0][row % 3]);
        let (a, b) = (&plain.a, &mut plain.b);
        for column in (0..d_output).step_by(2) {
            b.data[column] = f64::from((e - 1.0) as f32 / 2.0);
            (0..d_input).for_each(|row| plain.w.data[row * d_output + column] = a.data[row]);
        }
        (plain.scale, dora.alpha) = (2.0, 2.0);
        dora
    }

    fn gain(&self) -> Matrix {
        let norms =
            self.norms.clone().unwrap_or_else(|| norms(&self.plain.w.plus(&self.plain.delta())));
        Matrix::from_fn(1, norms.cols, |_, c| self.magnitude.at(0, c) / norms.at(0, c))
    }

    fn weight(&self) -> Matrix {
        columns_times(&self.plain.w.plus(&self.plain.delta()), &self.gain())
    }

    fn output(&self) -> Matrix {
        let y = self.plain.x.times(&self.weight());
        self.plain.bias.as_ref().map_or(y.clone(), |bias| y.plus_row(bias))
    }

    fn loss(&self) -> f64 {
        self.output().data.iter().map(|y| y.sin()).sum()
    }

    fn adapter<B: Backend>(&self) -> LoraAdapter<B> {
        let (device, Problem { a, b, .. }) = (device::<B>(), &self.plain);
        let [a, b] = [a, b].map(|it| it.tensor([it.rows, it.cols], &device));
        let mut adapter = LoraAdapter::new(a, b, self.alpha, Scaling::AlphaOverRank);
        let magnitude = self.magnitude.tensor([self.magnitude.cols], &device);
        adapter.magnitude = Some(Param::from_tensor(magnitude));
        adapter
    }

    fn layer<B: Backend>(&self) -> LoraLinear<B> {
        let (device, w) = (device::<B>(), &self.plain.w);
        let weight = Param::from_tensor(w.tensor([w.rows, w.cols], &device));
        let bias = self.plain.bias.as_ref();
        let bias = bias.map(|it| Param::from_tensor(it.tensor([it.cols], &device)));
        let mut layer = LoraLinear::from(Linear { weight, bias });
        layer.set_adapter(Some(self.adapter()));
        layer
    }
}

fn check<const D: usize>(dora: &Dora, shape: [usize; D]) {
    let layer = dora.layer::<Train>();
    let x: Tensor<Train, D> = dora.plain.x.tensor(shape, &device::<Train>()).require_grad();
    let y = layer.forward(x.clone());
    assert_close(y.clone(), &dora.output(), TOLERANCE);
    let grads = y.sin().sum().backward();

    let dy = dora.output().map(f64::cos);
    let behind = dora.plain.gradients_from(&columns_times(&dy, &dora.gain()));
    let raw = dora.plain.x.times(&dora.plain.w.plus(&dora.plain.delta()));
    let norms = norms(&dora.plain.w.plus(&dora.plain.delta()));
    let magnitude =
        Matrix::from_fn(dy.rows, dy.cols, |r, c| dy.at(r, c) * raw.at(r, c) / norms.at(0, c));
    let adapter = layer.adapter().unwrap();
    let of_magnitude = adapter.magnitude.as_ref().unwrap().grad(&grads).unwrap();
    assert_close(x.grad(&grads).unwrap(), &behind.x, TOLERANCE);
    assert_close(adapter.a.grad(&grads).unwrap(), &behind.a, TOLERANCE);
    assert_close(adapter.b.grad(&grads).unwrap(), &behind.b, TOLERANCE);
    assert_close(of_magnitude, &magnitude.sum_rows(), TOLERANCE);
    assert!(layer.base.weight.grad(&grads).is_none(), "the weight is frozen");
    assert!(layer.base.bias.is_none_or(|it| it.grad(&grads).is_none()), "the bias is frozen");
}

#[test]
fn outputs_and_gradients_of_linear_layers() {
    for bias in [true, false] {
        for rank in [1, 3, 5] {
            let dora = Dora::new([12, 7, rank, 5], bias);
            check::<2>(&dora, [12, 7]);
            check::<3>(&dora, [3, 4, 7]);
            check::<1>(&Dora::new([1, 7, rank, 5], bias), [7]);
        }
    }
}

const SHARES: [f64; 5] = [1e-2, 1e-3, 1e-4, 1e-5, 1e-6];

/// On a GPU, where the library does not ask whether a column cancels, the product of an input with the weight is rounded
/// before that with the update is added, as in PEFT. There the inputs are such that nothing is rounded.
fn asks() -> bool {
    crate::backend::NAME != "wgpu" && std::env::var_os("BURN_LORA_PORTABLE").is_none()
}

#[test]
fn s1_what_an_update_leaves_of_a_column_keeps_its_digits() {
    for e in SHARES {
        let mut dora = Dora::canceling([7, 5], e);
        if asks() {
            check::<2>(&dora, [4, 7]);
            check::<3>(&dora, [2, 2, 7]);
        }
        let merged = Lora::new(dora.layer::<Plain>()).merge().unwrap();
        assert_close(merged.base.weight.val(), &dora.weight(), TOLERANCE);
        dora.plain.x = Matrix::from_fn(7, 7, |row, column| f64::from(u8::from(row == column)));
        let x = dora.plain.x.tensor::<Plain, 2>([7, 7], &device::<Plain>());
        assert_close(dora.layer::<Plain>().forward(x), &dora.output(), TOLERANCE);
    }
}

#[test]
fn s1_dropout_leaves_the_digits_of_a_canceled_column() {
    let dora = Dora::canceling([7, 5], 1e-6);
    let mut layer = dora.layer::<Train>();
    let mut adapter = layer.adapter().unwrap().clone();
    // So rarely drops anything that these inputs are whole.
    adapter.dropout.prob = 1e-9;
    layer.set_adapter(Some(adapter));
    let x = dora.plain.x.tensor::<Train, 2>([4, 7], &device::<Train>());
    if asks() {
        assert_close(layer.forward(x), &dora.output(), TOLERANCE);
    }
}

#[test]
fn s1_a_canceled_column_of_a_quantized_base_keeps_its_digits() {
    let signs =
        Matrix::from_fn(32, 4, |row, column| if (row + column) % 3 == 0 { -1.0 } else { 1.0 });
    let device = device::<Plain>();
    let weight = Param::from_tensor(signs.tensor([32, 4], &device));
    let base = LoraLinear::from(Linear::<Plain> { weight, bias: None });
    let (base, _) = base.quantize(Quantization::Int8).unwrap();
    let held = values(base.quantized().unwrap().dense());
    let mut dora = Dora::new([5, 32, 4, 4], false);
    (dora.alpha, dora.plain.scale) = (4.0, 1.0);
    dora.plain.w = Matrix { rows: 4, cols: 32, data: held }.transpose();
    dora.plain.a = signs;
    let left = |row| dora.plain.w.at(0, row).abs() * (1e-6 - 1.0);
    let b = Matrix::from_fn(4, 4, |row, column| if row == column { left(row) } else { 0.0 });
    dora.plain.b = b.map(|it| f64::from(it as f32));
    if !asks() {
        dora.plain.x = Matrix::from_fn(5, 32, |row, column| f64::from(u8::from(row == column)));
    }
    let mut layer = base;
    layer.set_adapter(Some(dora.adapter()));
    let x = dora.plain.x.tensor::<Plain, 2>([5, 32], &device);
    assert_close(layer.forward(x), &dora.output(), TOLERANCE);
    let merged = Lora::new(layer).merge().unwrap();
    assert_close(merged.base.weight.val(), &dora.weight(), TOLERANCE);
}

#[test]
fn gradients_agree_with_finite_differences_at_constant_norms() {
    let mut dora = Dora::new([4, 5, 2, 3], true);
    dora.norms = Some(norms(&dora.plain.w.plus(&dora.plain.delta())));
    let layer = dora.layer::<Train>();
    let x: Tensor<Train, 2> = dora.plain.x.tensor([4, 5], &device::<Train>()).require_grad();
    let grads = layer.forward(x.clone()).sin().sum().backward();
    let expected = |of: fn(&mut Dora) -> &mut Matrix| differences(&dora, of, Dora::loss);
    let adapter = layer.adapter().unwrap();
    let magnitude = adapter.magnitude.as_ref().unwrap();
    assert_close(x.grad(&grads).unwrap(), &expected(|it| &mut it.plain.x), TOLERANCE);
    assert_close(adapter.a.grad(&grads).unwrap(), &expected(|it| &mut it.plain.a), TOLERANCE);
    assert_close(adapter.b.grad(&grads).unwrap(), &expected(|it| &mut it.plain.b), TOLERANCE);
    assert_close(magnitude.grad(&grads).unwrap(), &expected(|it| &mut it.magnitude), TOLERANCE);
}

#[test]
fn merging_gives_the_weight_of_the_formula() {
    let dora = Dora::new([4, 7, 3, 5], true);
    let lora = Lora::new(dora.layer::<Plain>());
    let merged = lora.merge().unwrap();
    assert_close(merged.base.weight.val(), &dora.weight(), 1e-6);
    let x = dora.plain.x.tensor::<Plain, 2>([4, 7], &device::<Plain>());
    assert_close(merged.forward(x), &dora.output(), TOLERANCE);
    assert_identical(
        lora.detach().base.weight.val(),
        dora.plain.w.tensor::<Plain, 2>([7, 5], &device::<Plain>()),
    );
}

#[test]
fn a_column_of_zeros_stays_one() {
    let mut dora = Dora::new([4, 7, 3, 5], true);
    for matrix in [&mut dora.plain.w, &mut dora.plain.b] {
        (0..matrix.rows).for_each(|row| matrix.data[row * matrix.cols + 2] = 0.0);
    }
    dora.norms = Some(norms(&dora.plain.w.plus(&dora.plain.delta())).map(|it| it.max(1e-9)));
    let layer = dora.layer::<Train>();
    let x: Tensor<Train, 2> = dora.plain.x.tensor([4, 7], &device::<Train>());
    let y = layer.forward(x);
    assert_close(y.clone(), &dora.output(), TOLERANCE);
    let grads = y.sum().backward();
    let gradient = layer.adapter().unwrap().magnitude.as_ref().unwrap().grad(&grads).unwrap();
    assert!(values(gradient).iter().all(|it| it.is_finite()));
}

#[test]
fn a_quantized_base_gives_what_its_values_give() {
    let config = LoraConfig::new(2, 3.0).with_init(Init::RandomBoth).with_dora(true);
    let base = filled(Mlp::<Plain>::new(&device::<Plain>()));
    let (quantized, _) = base.quantize(Quantization::Int8).unwrap();
    let dense = quantized.clone().dequantize();
    let x = || Matrix::random(10, 6, 5).tensor::<Plain, 2>([10, 6], &device::<Plain>());
    let [quantized, dense] = [quantized, dense].map(|it| it.attach(&config).unwrap().forward(x()));
    quantized
        .into_data()
        .assert_approx_eq::<f32>(&dense.into_data(), burn::tensor::Tolerance::rel_abs(1e-5, 1e-5));
}

/// With one input per row, a row is dropped or not. What is dropped does not concern the base.
#[test]
fn dropout_concerns_what_the_adapter_changes() {
    let dora = Dora::new([400, 1, 1, 3], true);
    let mut layer = dora.layer::<Train>();
    let mut adapter = layer.adapter().unwrap().clone();
    adapter.dropout.prob = 0.5;
    layer.set_adapter(Some(adapter));
    let x: Tensor<Train, 2> = dora.plain.x.tensor([400, 1], &device::<Train>()).require_grad();
    let y: Vec<f32> = layer.forward(x).into_data().to_vec().unwrap();
    let (w, weight) = (&dora.plain.w, dora.weight());
    let mut dropped = 0;
    for row in 0..400 {
        let x = dora.plain.x.at(row, 0);
        let is_at = |read: f64| {
            (0..3).all(|c| {
                let base = x * w.at(0, c) + dora.plain.bias.as_ref().unwrap().at(0, c);
                let expected = base + read * (weight.at(0, c) - w.at(0, c));
                (f64::from(y[row * 3 + c]) - expected).abs() < 1e-4
            })
        };
        assert!(is_at(0.0) || is_at(2.0 * x), "row {row}");
        dropped += usize::from(is_at(0.0));
    }
    assert!((130..270).contains(&dropped), "{dropped} of 400 were dropped");
    let plain = dora.plain.x.tensor::<Plain, 2>([400, 1], &device::<Plain>());
    let valid = burn::module::AutodiffModule::valid(&layer);
    assert_close(valid.forward(plain), &dora.output(), TOLERANCE);
}

/// The weight of the formula, made of Burn's operations: the kernel as a matrix with a column per channel.
fn composed(adapter: &LoraAdapter<Train>, weight: Tensor<Train, 2>) -> Tensor<Train, 2> {
    let product = adapter.a.val().matmul(adapter.b.val()).mul_scalar(adapter.scale());
    let sum = weight + product;
    let norms = (sum.clone().detach() * sum.clone().detach()).sum_dim(0).sqrt().detach();
    let magnitude = adapter.magnitude.as_ref().unwrap().val().unsqueeze_dim::<2>(0);
    sum * (magnitude / norms.set_require_grad(false))
}

/// An adapter for a weight of this shape, with values that are not those of a fresh one.
fn trained(shape: [usize; 2]) -> LoraAdapter<Train> {
    Dora::new([1, shape[0], 2, shape[1]], false).adapter()
}

/// Compares what the layer computes, and the gradients that reach its adapter, with those of `expected`, which
/// uses the same adapter.
#[track_caller]
fn assert_same<const D: usize>(
    adapter: &LoraAdapter<Train>,
    found: Tensor<Train, D>,
    expected: Tensor<Train, D>,
) {
    let tolerance = burn::tensor::Tolerance::<f32>::rel_abs(2e-4, 2e-5);
    found.to_data().assert_approx_eq::<f32>(&expected.to_data(), tolerance);
    let gradients = |y: Tensor<Train, D>| {
        let grads = y.sin().sum().backward();
        let magnitude = adapter.magnitude.as_ref().unwrap().grad(&grads).unwrap();
        [
            adapter.a.grad(&grads).unwrap().into_data(),
            adapter.b.grad(&grads).unwrap().into_data(),
            magnitude.into_data(),
        ]
    };
    for (found, expected) in gradients(found).iter().zip(&gradients(expected)) {
        found.assert_approx_eq::<f32>(expected, tolerance);
    }
}

fn input<const D: usize>(shape: [usize; D]) -> Tensor<Train, D> {
    let count = shape.iter().product();
    Matrix::random(1, count, 9).tensor(shape, &device::<Train>())
}

#[test]
fn convolutions_are_those_of_the_composed_kernel() {
    let device = device::<Train>();
    for groups in [1, 2] {
        let config = Conv2dConfig::new([4, 6], [3, 2]).with_stride([1, 2]).with_groups(groups);
        let config = config.with_padding(PaddingConfig2d::Explicit(1, 0, 1, 0));
        let base: Conv2d<Train> = filled(config.init(&device)).no_grad();
        let d_input = 4 / groups * 6;
        let mut layer = LoraConv2d::from(base.clone());
        layer.set_adapter(Some(trained([d_input, 6])));
        let adapter = layer.adapter().unwrap();
        let matrix = base.weight.val().reshape([6, d_input]).transpose();
        let kernel = composed(adapter, matrix).transpose().reshape([6, 4 / groups, 3, 2]);
        let x = input([2, 4, 5, 6]);
        let options = burn::tensor::ops::ConvOptions::new([1, 2], [1, 0], [1, 1], groups);
        let bias = base.bias.as_ref().map(|it| it.val());
        let expected = burn::tensor::module::conv2d(x.clone(), kernel, bias, options);
        assert_same(adapter, layer.forward(x.clone()), expected.clone());
        let whole = Lora::new(layer).merge().unwrap().forward(x);
        let tolerance = burn::tensor::Tolerance::<f32>::rel_abs(1e-4, 1e-5);
        whole.into_data().assert_approx_eq::<f32>(&expected.into_data(), tolerance);
    }
}

#[test]
fn convolutions_of_one_dimension_are_those_of_the_composed_kernel() {
    let config = Conv1dConfig::new(3, 5, 2).with_padding(PaddingConfig1d::Explicit(1, 1));
    let base: Conv1d<Train> = filled(config.init(&device::<Train>())).no_grad();
    let mut layer = LoraConv1d::from(base.clone());
    layer.set_adapter(Some(trained([6, 5])));
    let adapter = layer.adapter().unwrap();
    let matrix = base.weight.val().reshape([5, 6]).transpose();
    let kernel = composed(adapter, matrix).transpose().reshape([5, 3, 2]);
    let x = input([2, 3, 7]);
    let options = burn::tensor::ops::ConvOptions::new([1], [1], [1], 1);
    let bias = base.bias.as_ref().map(|it| it.val());
    let expected = burn::tensor::module::conv1d(x.clone(), kernel, bias, options);
    assert_same(adapter, layer.forward(x), expected);
}

#[test]
fn transposed_convolutions_are_those_of_the_composed_kernel() {
    for groups in [1, 2] {
        let config = ConvTranspose2dConfig::new([4, 6], [2, 3]).with_groups(groups);
        let base: ConvTranspose2d<Train> = filled(config.init(&device::<Train>())).no_grad();
        let columns = 6 / groups;
        let mut layer = LoraConvTranspose2d::from(base.clone());
        layer.set_adapter(Some(trained([4 * 6, columns])));
        let adapter = layer.adapter().unwrap();
        let kernel = base.weight.val().reshape([4, columns, 6]).swap_dims(1, 2);
        let kernel = composed(adapter, kernel.reshape([24, columns])).reshape([4, 6, columns]);
        let kernel = kernel.swap_dims(1, 2).reshape([4, columns, 2, 3]);
        let x = input([2, 4, 3, 4]);
        let options =
            burn::tensor::ops::ConvTransposeOptions::new([1, 1], [0, 0], [0, 0], [1, 1], groups);
        let bias = base.bias.as_ref().map(|it| it.val());
        let expected = burn::tensor::module::conv_transpose2d(x.clone(), kernel, bias, options);
        assert_same(adapter, layer.forward(x), expected);
    }
}

#[test]
fn embeddings_look_up_and_project_the_composed_table() {
    let device = device::<Train>();
    let w = Matrix::random(9, 5, 8);
    let weight = Param::from_tensor(w.tensor::<Train, 2>([9, 5], &device)).no_grad();
    let mut layer = LoraEmbedding::from(Embedding { weight });
    layer.set_adapter(Some(trained([9, 5])));
    let adapter = layer.adapter().unwrap();
    let table = || composed(adapter, w.tensor([9, 5], &device));
    let indices = TensorData::new(vec![3i64, 1, 4, 1, 5, 0], [2, 3]);
    let indices: Tensor<Train, 2, Int> = Tensor::from_data(indices, &device);
    let rows = table().select(0, indices.clone().reshape([6])).reshape([2, 3, 5]);
    assert_same(adapter, layer.forward(indices.clone()), rows);
    let hidden = input([2, 3, 5]);
    let logits = hidden.clone().reshape([6, 5]).matmul(table().transpose()).reshape([2, 3, 9]);
    assert_same(adapter, layer.project(hidden.clone()), logits.clone());
    let merged = Lora::new(layer).merge().unwrap();
    let tolerance = burn::tensor::Tolerance::<f32>::rel_abs(1e-4, 1e-5);
    merged.project(hidden).into_data().assert_approx_eq::<f32>(&logits.into_data(), tolerance);
}

#[test]
fn an_overlay_computes_what_the_layer_does() {
    let dora = Dora::new([4, 7, 3, 5], true);
    let layer = dora.layer::<Train>();
    let overlay = Lora::overlay(layer.base.clone());
    let overlay = overlay.switch(&LoraAdapters::new([("", layer.adapter().unwrap().clone())]));
    let overlay = overlay.unwrap();
    let x: Tensor<Train, 2> = dora.plain.x.tensor([4, 7], &device::<Train>());
    let y = overlay.with_adapters(|linear| linear.forward(x.clone()));
    assert_close(y.clone(), &dora.output(), TOLERANCE);
    let set = overlay.adapters();
    assert_same(
        set.get("").unwrap(),
        y,
        layer_with(&layer, set.get("").unwrap()).forward(x.clone()),
    );
    let merged: Linear<_> = overlay.merge().unwrap();
    assert_close(merged.weight.val(), &dora.weight(), 1e-6);
}

fn layer_with(layer: &LoraLinear<Train>, adapter: &LoraAdapter<Train>) -> LoraLinear<Train> {
    let mut layer = layer.clone();
    layer.set_adapter(Some(adapter.clone()));
    layer
}

#[test]
fn sets_that_started_in_the_weight_are_added_like_others() {
    let base = filled(Mlp::<Plain>::new(&device::<Plain>()));
    let set = |init| {
        let config = LoraConfig::new(2, 3.0).with_init(init);
        base.clone().attach(&config).unwrap().adapters()
    };
    let (taken, plain) = (set(Init::Olora), set(Init::RandomBoth));
    let sum = |how| LoraAdapters::combine(&[(&taken, 1.0), (&plain, 0.5)], how);
    // Fresh, the first one changes nothing.
    let exact = sum(Combination::Concatenate).unwrap();
    let delta = |set: &LoraAdapters<Plain>| set.get("head").unwrap().delta().into_data();
    let tolerance = burn::tensor::Tolerance::<f32>::rel_abs(1e-4, 1e-5);
    delta(&exact).assert_approx_eq::<f32>(&delta(&plain.scaled(0.5)), tolerance);
    let error = sum(Combination::Linear).unwrap_err().to_string();
    assert!(error.contains("ranks differ: (4, 2)"), "{error}");
}

#[test]
#[should_panic = "the adapter must have 5 magnitudes, one for each output, and no bias with them, got Some(4)"]
fn magnitudes_of_another_width_are_refused() {
    let dora = Dora::new([4, 7, 3, 5], true);
    let mut layer = dora.layer::<Plain>();
    let mut adapter = layer.adapter().unwrap().clone();
    adapter.magnitude = Some(Param::from_tensor(Tensor::ones([4], &device::<Plain>())));
    layer.set_adapter(Some(adapter));
}

#[test]
fn what_cannot_be_mixed_or_added_is_refused() {
    let base = filled(Mlp::<Plain>::new(&device::<Plain>()));
    let config = LoraConfig::new(2, 3.0).with_dora(true);
    let set = base.clone().attach(&config).unwrap().adapters();
    let error = LoraAdapters::combine(&[(&set, 1.0)], Combination::Concatenate).unwrap_err();
    assert!(error.to_string().contains("DoRA's magnitudes"), "{error}");
    let error = MultiLora::new(base.clone()).unwrap().insert("one", &set).unwrap_err();
    assert!(matches!(error, LoraError::NotMixable { .. }), "{error}");
    assert!(error.to_string().contains("magnitudes"), "{error}");
    let error = base.attach(&config.with_bias(true)).unwrap_err();
    assert!(error.to_string().contains("`bias` is set, and adapters with DoRA's"), "{error}");
}

/// A kernel of this shape, seen as the matrix of a problem that cancels columns, and its adapter.
fn canceling(shape: [usize; 2]) -> (Tensor<Train, 2>, LoraAdapter<Train>) {
    let dora = Dora::canceling(shape, 1e-6);
    (dora.plain.w.tensor(shape, &device::<Train>()), dora.adapter())
}

#[test]
fn s1_canceled_columns_of_convolutions_keep_their_digits() {
    if !asks() {
        return;
    }
    let device = device::<Train>();
    for groups in [1, 2] {
        let d_input = 4 / groups * 6;
        let (matrix, adapter) = canceling([d_input, 6]);
        let mut base: Conv2d<Train> =
            filled(Conv2dConfig::new([4, 6], [3, 2]).with_groups(groups).init(&device)).no_grad();
        base.weight =
            Param::from_tensor(matrix.clone().transpose().reshape([6, 4 / groups, 3, 2])).no_grad();
        let mut layer = LoraConv2d::from(base.clone());
        layer.set_adapter(Some(adapter));
        let adapter = layer.adapter().unwrap();
        let kernel = composed(adapter, matrix).transpose().reshape([6, 4 / groups, 3, 2]);
        let x = input([2, 4, 5, 6]);
        let options = burn::tensor::ops::ConvOptions::new([1, 1], [0, 0], [1, 1], groups);
        let bias = base.bias.as_ref().map(|it| it.val());
        let expected = burn::tensor::module::conv2d(x.clone(), kernel, bias, options);
        assert_same(adapter, layer.forward(x), expected);
    }
}

#[test]
fn s1_canceled_columns_in_one_dimension_keep_their_digits() {
    if !asks() {
        return;
    }
    let device = device::<Train>();
    let (matrix, adapter) = canceling([6, 5]);
    let mut base: Conv1d<Train> = filled(Conv1dConfig::new(3, 5, 2).init(&device)).no_grad();
    base.weight = Param::from_tensor(matrix.clone().transpose().reshape([5, 3, 2])).no_grad();
    let mut layer = LoraConv1d::from(base.clone());
    layer.set_adapter(Some(adapter));
    let adapter = layer.adapter().unwrap();
    let kernel = composed(adapter, matrix).transpose().reshape([5, 3, 2]);
    let options = burn::tensor::ops::ConvOptions::new([1], [0], [1], 1);
    let bias = base.bias.as_ref().map(|it| it.val());
    let expected = burn::tensor::module::conv1d(input([2, 3, 7]), kernel, bias, options);
    assert_same(adapter, layer.forward(input([2, 3, 7])), expected);
}

#[test]
fn s1_canceled_columns_of_transposed_convolutions_keep_their_digits() {
    if !asks() {
        return;
    }
    let device = device::<Train>();
    let (matrix, adapter) = canceling([24, 3]);
    let as_kernel =
        |it: Tensor<Train, 2>| it.reshape([4, 6, 3]).swap_dims(1, 2).reshape([4, 3, 2, 3]);
    let mut base: ConvTranspose2d<Train> =
        filled(ConvTranspose2dConfig::new([4, 3], [2, 3]).init(&device)).no_grad();
    base.weight = Param::from_tensor(as_kernel(matrix.clone())).no_grad();
    let mut layer = LoraConvTranspose2d::from(base.clone());
    layer.set_adapter(Some(adapter));
    let adapter = layer.adapter().unwrap();
    let kernel = as_kernel(composed(adapter, matrix));
    let options = burn::tensor::ops::ConvTransposeOptions::new([1, 1], [0, 0], [0, 0], [1, 1], 1);
    let bias = base.bias.as_ref().map(|it| it.val());
    let x = input([2, 4, 3, 4]);
    let expected = burn::tensor::module::conv_transpose2d(x.clone(), kernel, bias, options);
    assert_same(adapter, layer.forward(x), expected);
}

#[test]
fn s1_canceled_columns_of_tables_keep_their_digits() {
    if !asks() {
        return;
    }
    let device = device::<Train>();
    let (matrix, adapter) = canceling([9, 5]);
    let weight = Param::from_tensor(matrix.clone()).no_grad();
    let mut layer = LoraEmbedding::from(Embedding { weight });
    layer.set_adapter(Some(adapter));
    let adapter = layer.adapter().unwrap();
    let table = || composed(adapter, matrix.clone());
    let indices = TensorData::new(vec![3i64, 1, 4, 1, 5, 0], [2, 3]);
    let indices: Tensor<Train, 2, Int> = Tensor::from_data(indices, &device);
    let rows = table().select(0, indices.clone().reshape([6])).reshape([2, 3, 5]);
    assert_same(adapter, layer.forward(indices), rows);
    let hidden = input([2, 3, 5]);
    let logits = hidden.clone().reshape([6, 5]).matmul(table().transpose()).reshape([2, 3, 9]);
    assert_same(adapter, layer.project(hidden), logits);
}
