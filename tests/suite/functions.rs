//! The functions for models compute the plain formulas in double precision, and their gradients are its slopes.

use burn::{
    module::Param,
    nn::{EmbeddingConfig, GroupNormConfig, LayerNormConfig, LinearConfig, RmsNormConfig},
    tensor::{Int, Tensor, TensorData, backend::Backend},
};
use burn_lora::{
    LoraLinear,
    nn::{LoraEmbedding, geglu, group_norm, layer_norm, rms_norm, rotate, swiglu},
};

use crate::{
    model::{Plain, Train, device},
    oracle::Matrix,
};

/// A function of numbers in rows, which it gives shapes of its own.
trait Function {
    fn apply<B: Backend>(&self, inputs: &[Tensor<B, 1>]) -> Tensor<B, 1>;

    fn oracle(&self, inputs: &[Vec<f64>]) -> Vec<f64>;
}

fn numbers(counts: &[usize]) -> Vec<Vec<f64>> {
    let random = |(seed, &count)| Matrix::random(1, count, seed).scaled(1.5).data;
    (10..).zip(counts).map(random).collect()
}

fn tensors<B: Backend>(inputs: &[Vec<f64>]) -> Vec<Tensor<B, 1>> {
    let data =
        |it: &Vec<f64>| TensorData::from(&*it.iter().map(|&it| it as f32).collect::<Vec<_>>());
    inputs.iter().map(|it| Tensor::from_data(data(it), &device::<B>())).collect()
}

#[track_caller]
fn close(of: &str, found: impl Iterator<Item = f64>, expected: &[f64], tolerance: f64) {
    let size = expected.iter().fold(1.0_f64, |size, it| size.max(it.abs()));
    for (index, (found, expected)) in found.zip(expected).enumerate() {
        let error = (found - expected).abs();
        assert!(error < tolerance * size, "{of}, {index}: {found}, {expected}");
    }
}

/// Checks the output with and without autodiff, and the gradients of some numbers of each input.
#[track_caller]
fn check<F: Function>(function: &F, counts: &[usize]) {
    let mut inputs = numbers(counts);
    let expected = function.oracle(&inputs);
    let plain = function.apply(&tensors::<Plain>(&inputs));
    close("y", plain.into_data().iter::<f64>(), &expected, 2e-6);

    let leaves: Vec<_> = tensors::<Train>(&inputs).into_iter().map(Tensor::require_grad).collect();
    let y = function.apply(&leaves);
    assert_eq!(y.dims(), [expected.len()]);
    close("y with autodiff", y.clone().into_data().iter::<f64>(), &expected, 2e-6);
    let dy = Matrix::random(1, expected.len(), 9);
    let grads = (y * dy.tensor([expected.len()], &device::<Train>())).sum().backward();
    for (which, leaf) in leaves.iter().enumerate() {
        let found = leaf.grad(&grads).expect("it has a gradient").into_data();
        let found: Vec<_> = found.iter::<f64>().collect();
        let count = found.len();
        // Not all of many, but of all parts.
        let chosen: Vec<_> = (0..count).step_by(count / 70 * 2 + 1).collect();
        let mut slope = |index: usize| {
            let mut at = |step: f64| {
                inputs[which][index] += step;
                let y = function.oracle(&inputs);
                inputs[which][index] -= step;
                y.iter().zip(&dy.data).map(|(y, dy)| y * dy).sum::<f64>()
            };
            (at(1e-4) - at(-1e-4)) / 2e-4
        };
        let slopes: Vec<_> = chosen.iter().map(|&it| slope(it)).collect();
        let found = chosen.iter().map(|&it| found[it]);
        close(&format!("the gradient of input {which}"), found, &slopes, 5e-6);
    }
}

struct Rotation {
    shape: [usize; 4],
    pairs: usize,
    texts: usize,
}

impl Rotation {
    fn angle(&self, text: usize, token: usize, pair: usize) -> f64 {
        (text % self.texts * 7 + token) as f64 * 0.8_f64.powi(pair as i32)
    }
}

impl Function for Rotation {
    fn apply<B: Backend>(&self, inputs: &[Tensor<B, 1>]) -> Tensor<B, 1> {
        let [_, length, ..] = self.shape;
        let table = |of: fn(f64) -> f64| {
            let places = (0..self.texts * length).map(|it| (it / length, it % length));
            let values = places.flat_map(|(text, token)| {
                (0..self.pairs).map(move |pair| of(self.angle(text, token, pair)) as f32)
            });
            let shape = [self.texts, length, self.pairs];
            Tensor::from_data(TensorData::new(values.collect(), shape), &device::<B>())
        };
        rotate(inputs[0].clone().reshape(self.shape), table(f64::cos), table(f64::sin))
            .flatten(0, 3)
    }

    fn oracle(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let [_, length, heads, size] = self.shape;
        let mut y = inputs[0].clone();
        for (index, head) in y.chunks_mut(size).enumerate() {
            let (text, token) = (index / heads / length, index / heads % length);
            for pair in 0..self.pairs {
                let (sin, cos) = self.angle(text, token, pair).sin_cos();
                let (a, b) = (head[pair], head[pair + self.pairs]);
                (head[pair], head[pair + self.pairs]) = (a * cos - b * sin, a * sin + b * cos);
            }
        }
        y
    }
}

#[test]
fn rotary_embeddings() {
    for (shape, pairs, texts) in [
        ([2, 5, 3, 8], 4, 1),
        ([3, 40, 2, 10], 5, 3),
        // Only a part of each head is turned.
        ([2, 20, 1, 12], 4, 2),
        ([1, 1, 1, 2], 1, 1),
    ] {
        check(&Rotation { shape, pairs, texts }, &[shape.iter().product()]);
    }
}

struct Gate;

impl Function for Gate {
    fn apply<B: Backend>(&self, inputs: &[Tensor<B, 1>]) -> Tensor<B, 1> {
        swiglu(inputs[0].clone() * 6.0, inputs[1].clone())
    }

    fn oracle(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let gates = inputs[0].iter().map(|it| 6.0 * it);
        gates.zip(&inputs[1]).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect()
    }
}

/// Gemma's, with the plain approximation of GELU.
struct GeluGate;

impl Function for GeluGate {
    fn apply<B: Backend>(&self, inputs: &[Tensor<B, 1>]) -> Tensor<B, 1> {
        geglu(inputs[0].clone() * 2.5, inputs[1].clone())
    }

    fn oracle(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let root = (2.0 / std::f64::consts::PI).sqrt();
        let gelu = |x: f64| x / 2.0 * (1.0 + (root * (x + 0.044715 * x.powi(3))).tanh());
        inputs[0].iter().zip(&inputs[1]).map(|(gate, up)| gelu(2.5 * gate) * up).collect()
    }
}

#[test]
fn gates_by_gelu() {
    check(&GeluGate, &[1, 1]);
    check(&GeluGate, &[333, 333]);
    check(&GeluGate, &[20_000, 20_000]);
}

#[test]
fn gates() {
    check(&Gate, &[1, 1]);
    check(&Gate, &[333, 333]);
    // So many that several threads share them.
    check(&Gate, &[20_000, 20_000]);
}

/// A norm. Of one group, each row of `channels · spread` numbers is one.
struct Norm {
    groups: usize,
    channels: usize,
    spread: usize,
    centered: bool,
    moved: bool,
    epsilon: f64,
}

impl Function for Norm {
    fn apply<B: Backend>(&self, inputs: &[Tensor<B, 1>]) -> Tensor<B, 1> {
        let (channels, device) = (self.channels, device::<B>());
        // With a parent that is a parameter itself, its gradient is that of the leaf.
        let param = |index: usize| Param::from_tensor(inputs[index].clone());
        let x = inputs[0].clone();
        if self.spread > 1 {
            let mut norm = GroupNormConfig::new(self.groups, channels)
                .with_epsilon(self.epsilon)
                .with_affine(self.moved)
                .init(&device);
            if self.moved {
                (norm.gamma, norm.beta) = (Some(param(1)), Some(param(2)));
            }
            let x = x.reshape([-1, channels as i32, self.spread as i32 / 2, 2]);
            return group_norm(&norm, x).flatten(0, 3);
        }
        let x = x.reshape([-1, 1, channels as i32]);
        if self.centered {
            let mut norm = LayerNormConfig::new(channels).with_epsilon(self.epsilon).init(&device);
            norm.gamma = param(1);
            norm.beta = self.moved.then(|| param(2));
            return layer_norm(&norm, x).flatten(0, 2);
        }
        let mut norm = RmsNormConfig::new(channels).with_epsilon(self.epsilon).init(&device);
        norm.gamma = param(1);
        rms_norm(&norm, x).flatten(0, 2)
    }

    fn oracle(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let width = self.channels / self.groups * self.spread;
        let mut y = inputs[0].clone();
        for (row, numbers) in y.chunks_mut(width).enumerate() {
            let mean = numbers.iter().sum::<f64>() / width as f64;
            let mean = if self.centered { mean } else { 0.0 };
            let square = |it: &f64| (it - mean) * (it - mean);
            let variance = numbers.iter().map(square).sum::<f64>() / width as f64;
            for (index, it) in numbers.iter_mut().enumerate() {
                let channel = (row * width + index) / self.spread % self.channels;
                let of =
                    |which: usize, other: f64| inputs.get(which).map_or(other, |it| it[channel]);
                *it = (*it - mean) / (variance + self.epsilon).sqrt() * of(1, 1.0) + of(2, 0.0);
            }
        }
        y
    }
}

#[test]
fn rms_norms() {
    for (rows, channels) in [(1, 1), (3, 7), (5, 32), (4, 576), (100, 130)] {
        let norm =
            Norm { groups: 1, channels, spread: 1, centered: false, moved: false, epsilon: 1e-3 };
        check(&norm, &[rows * channels, channels]);
    }
}

#[test]
fn layer_norms() {
    for (rows, channels, moved) in [(2, 2, true), (3, 7, false), (5, 32, true), (90, 130, true)] {
        for epsilon in [1e-3, 0.3] {
            let norm = Norm { groups: 1, channels, spread: 1, centered: true, moved, epsilon };
            let affine = if moved { vec![channels; 2] } else { vec![channels] };
            check(&norm, &[vec![rows * channels], affine].concat());
        }
    }
}

#[test]
fn group_norms() {
    for (batch, groups, channels, spread) in
        [(1, 1, 3, 4), (2, 2, 4, 6), (3, 8, 32, 50), (2, 5, 5, 2)]
    {
        for moved in [true, false] {
            let norm = Norm { groups, channels, spread, centered: true, moved, epsilon: 1e-2 };
            let affine = if moved { vec![channels; 2] } else { vec![] };
            check(&norm, &[vec![batch * channels * spread], affine].concat());
        }
    }
}

#[test]
fn layer_norms_have_the_epsilon_of_burns() {
    // Numbers so alike that it counts.
    let x = Matrix::random(3, 8, 1).scaled(1e-4).tensor::<Plain, 2>([3, 8], &device::<Plain>());
    for epsilon in [1e-12, 1e-9, 1e-5] {
        let norm = LayerNormConfig::new(8).with_epsilon(epsilon).init(&device::<Plain>());
        let [own, burns] = [layer_norm(&norm, x.clone()), norm.forward(x.clone())];
        let burns: Vec<_> = burns.into_data().iter::<f64>().collect();
        close(&format!("epsilon {epsilon}"), own.into_data().iter::<f64>(), &burns, 1e-5);
    }
}

/// The cross-entropy of a head of 5 inputs and 300 classes, tied or not.
struct CrossEntropy {
    tied: bool,
    soft_cap: Option<f64>,
}

const WIDTH: usize = 5;
const CLASSES: usize = 300;

fn target(row: usize) -> usize {
    row * 37 % CLASSES
}

fn weight(tied: bool) -> Matrix {
    let weight = Matrix::random(WIDTH, CLASSES, 3).scaled(2.0);
    if tied { weight.transpose() } else { weight }
}

impl Function for CrossEntropy {
    fn apply<B: Backend>(&self, inputs: &[Tensor<B, 1>]) -> Tensor<B, 1> {
        let x = inputs[0].clone().reshape([-1, WIDTH as i32]);
        let targets: Vec<_> = (0..x.dims()[0]).map(|row| target(row) as i32).collect();
        let targets = Tensor::<B, 1, Int>::from_ints(&*targets, &device::<B>());
        let weight = |shape| weight(self.tied).tensor(shape, &device::<B>());
        if self.tied {
            let mut table = EmbeddingConfig::new(CLASSES, WIDTH).init(&device::<B>());
            table.weight = Param::from_tensor(weight([CLASSES, WIDTH])).set_require_grad(false);
            let table = LoraEmbedding::from(table);
            return match self.soft_cap {
                None => table.cross_entropy(x, targets),
                cap => table.capped_cross_entropy(x, targets, cap),
            };
        }
        let mut head = LinearConfig::new(WIDTH, CLASSES).with_bias(false).init(&device::<B>());
        head.weight = Param::from_tensor(weight([WIDTH, CLASSES])).set_require_grad(false);
        let head = LoraLinear::from(head);
        match self.soft_cap {
            None => head.cross_entropy(x, targets),
            cap => head.capped_cross_entropy(x, targets, cap),
        }
    }

    fn oracle(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let x = Matrix { rows: inputs[0].len() / WIDTH, cols: WIDTH, data: inputs[0].clone() };
        let mut scores = x.times(&weight(false));
        if let Some(cap) = self.soft_cap {
            scores.data.iter_mut().for_each(|it| *it = cap * (*it / cap).tanh());
        }
        let rows = scores.data.chunks(CLASSES).enumerate();
        let losses = rows.map(|(row, scores)| {
            scores.iter().map(|it| it.exp()).sum::<f64>().ln() - scores[target(row)]
        });
        vec![losses.sum()]
    }
}

#[test]
fn cross_entropies() {
    for rows in [1, 2, 70] {
        for tied in [false, true] {
            for soft_cap in [None, Some(1.5)] {
                check(&CrossEntropy { tied, soft_cap }, &[rows * WIDTH]);
            }
        }
    }
}

#[test]
fn a_head_that_trains_has_gradients() {
    let mut head =
        LinearConfig::new(WIDTH, CLASSES).with_bias(false).init::<Train>(&device::<Train>());
    head.weight = Param::from_tensor(weight(false).tensor([WIDTH, CLASSES], &device::<Train>()));
    let head = LoraLinear::from(head);
    let x = Matrix::random(1, WIDTH, 4);
    let targets = Tensor::<Train, 1, Int>::from_ints([7], &device::<Train>());
    let loss = head.cross_entropy(x.tensor([1, WIDTH], &device::<Train>()), targets);
    let gradient = head.base.weight.grad(&loss.backward()).expect("it trains");
    let scores: Vec<_> = x.times(&weight(false)).data.iter().map(|it| it.exp()).collect();
    let sum: f64 = scores.iter().sum();
    let expected = Matrix::from_fn(WIDTH, CLASSES, |row, class| {
        x.at(0, row) * (scores[class] / sum - if class == 7 { 1.0 } else { 0.0 })
    });
    close("the gradient", gradient.into_data().iter::<f64>(), &expected.data, 2e-6);
}
