//! Layers on slices compute the formula, however weights are held, and a row's result depends on no other row.

mod functions;
mod tables;

use burn::{
    module::Param,
    nn::Linear as BurnLinear,
    tensor::{Tensor, TensorData},
};
use burn_lora::{
    Init, LoraAdapter, LoraConfig, LoraLinear, Scaling,
    decode::{self, Inputs, Linear, Update},
    quantize::{GgufType, Quantization, QuantizedWeight},
};

use crate::{
    model::{Plain, device},
    oracle::Matrix,
};

/// Whether the backend of the tests has layers on slices.
static HAS_OWN: bool = !cfg!(feature = "wgpu");

const RANKS: [usize; 2] = [3, 8];

/// An adapter whose update is not small, and whose scale is no power of two.
fn adapter(
    [d_input, d_output]: [usize; 2],
    rank: usize,
    bias: bool,
    seed: u64,
) -> LoraAdapter<Plain> {
    let device = device::<Plain>();
    let a = Matrix::random(d_input, rank, seed).scaled(0.01).tensor([d_input, rank], &device);
    let b = Matrix::random(rank, d_output, seed + 1).tensor([rank, d_output], &device);
    let mut adapter = LoraAdapter::new(a, b, 7.0, Scaling::AlphaOverRank);
    let bias = bias.then(|| Matrix::random(1, d_output, seed + 2).tensor([d_output], &device));
    adapter.bias = bias.map(Param::from_tensor);
    adapter
}

fn matrix<const D: usize>(tensor: Tensor<Plain, D>, rows: usize) -> Matrix {
    let data: Vec<f64> = tensor.into_data().iter().collect();
    Matrix { rows, cols: data.len() / rows, data }
}

/// What an adapter adds, by plain loops.
fn update(adapter: &LoraAdapter<Plain>, x: &Matrix) -> Matrix {
    let [d_input, d_output] = adapter.shape();
    let (a, b) = (matrix(adapter.a.val(), d_input), matrix(adapter.b.val(), adapter.rank()));
    let y = x.times(&a).times(&b);
    let y = match &adapter.bias {
        Some(bias) => y.plus_row(&matrix(bias.val(), 1)),
        None => y,
    };
    assert_eq!(y.cols, d_output);
    y.scaled(adapter.scale())
}

/// A layer without an adapter, and its weight, `[d_input, d_output]`.
struct Case {
    name: String,
    layer: LoraLinear<Plain>,
    weight: Matrix,
    /// Whether it is held in at most 8 bits, and the largest difference between a level and a multiple of 1/127.
    rounded: Option<f64>,
}

/// All ways to hold a weight.
fn cases(bias: bool) -> Vec<Case> {
    let device = device::<Plain>();
    let case = |name: String, layer: LoraLinear<Plain>, rounded| {
        let [d_input, _] = layer.weight_shape();
        let weight = match layer.quantized() {
            Some(weight) => weight.dense().transpose(),
            None => layer.base.weight.val(),
        };
        Case { name, weight: matrix(weight, d_input), layer, rounded }
    };
    let linear = |weight: Tensor<Plain, 2>| -> LoraLinear<Plain> {
        let [_, d_output] = weight.dims();
        let bias = bias.then(|| Matrix::random(1, d_output, 9).tensor([d_output], &device));
        BurnLinear { weight: Param::from_tensor(weight), bias: bias.map(Param::from_tensor) }.into()
    };
    let random = |shape: [usize; 2]| Matrix::random(shape[0], shape[1], 1).tensor(shape, &device);
    let mut cases = vec![
        case("by row".into(), linear(random([130, 77])), None),
        case("wide".into(), linear(random([40, 300])), None),
    ];
    for shape in [[12, 20], [20, 12], [12, 4], [70, 1], [12, 12], [1100, 40], [2500, 70]] {
        let [d_input, d_output] = shape;
        cases.push(case(format!("by row: {shape:?}"), linear(random(shape)), None));
        let weight = random([d_output, d_input]).transpose();
        cases.push(case(format!("by column: {shape:?}"), linear(weight), None));
    }
    for to in [Quantization::Int8, Quantization::Nf4, Quantization::Bf16] {
        let mut layer = linear(random([130, 77]));
        layer.set_quantized(QuantizedWeight::new(random([77, 130]), to));
        let rounded = match to {
            Quantization::Bf16 => None,
            Quantization::Nf4 => Some(0.0037),
            _ => Some(0.0),
        };
        cases.push(case(format!("{to:?}"), layer, rounded));
    }
    for kind in GgufType::ALL {
        let ([block, size], d_output) = (kind.block(), 37);
        let blocks = 1024 / block;
        let numbers = Matrix::random(1, d_output * 1024, 5).data.into_iter().map(|it| it as f32);
        let data = kind.pack(&numbers.collect::<Vec<_>>()).unwrap_or_else(|| {
            (0..d_output * blocks * size).map(|it| (it * 37 % 123) as u8).collect()
        });
        let shape = [d_output, 1024];
        let weight = QuantizedWeight::from_gguf(kind, shape, &data, &device).unwrap();
        let rounded = (!weight.has_16_bits()).then_some(0.0);
        let mut layer = linear(random([1024, d_output]));
        layer.set_quantized(weight);
        cases.push(case(format!("{kind:?}"), layer, rounded));
    }
    cases
}

/// The outputs of some rows, of which the first are few.
fn forward(
    layer: &Linear,
    x: &Matrix,
    few: usize,
    rounds: bool,
    updates: &[Option<&Update>],
) -> Vec<f32> {
    let [_, d_output] = layer.dims();
    let mut inputs = Inputs::new(x.rows, x.cols);
    let numbers = inputs.numbers_mut().iter_mut();
    numbers.zip(&x.data).for_each(|(to, number)| *to = *number as f32);
    inputs.prepare(few, rounds);
    let mut y = vec![f32::NAN; x.rows * d_output];
    decode::forward([layer], &inputs, |_, row| updates[row % updates.len()], [&mut y]);
    y
}

/// By how much a product may be off if each 32 numbers of x are rounded to multiples of 1/127 of the largest.
fn rounding(x: &Matrix, weight: &Matrix, levels: f64) -> Matrix {
    let largest_weight = weight.data.iter().fold(0.0_f64, |max, it| max.max(it.abs()));
    Matrix::from_fn(x.rows, weight.cols, |row, output| {
        let blocks = (0..x.cols).collect::<Vec<_>>();
        let of_block = |block: &[usize]| {
            let largest = block.iter().fold(0.0_f64, |max, it| max.max(x.at(row, *it).abs()));
            let weights: f64 = block.iter().map(|it| weight.at(*it, output).abs()).sum();
            let of_levels = levels * largest_weight * block.len() as f64 * largest * 1.01;
            largest / 254.0 * 1.001 * weights + of_levels
        };
        blocks.chunks(32).map(of_block).sum()
    })
}

#[track_caller]
fn assert_near(found: &[f32], expected: &Matrix, allowed: &Matrix, what: &str) {
    assert_eq!(found.len(), expected.data.len(), "{what}");
    let largest = expected.data.iter().fold(1.0_f64, |max, it| max.max(it.abs()));
    for ((found, expected), allowed) in found.iter().zip(&expected.data).zip(&allowed.data) {
        let error = (f64::from(*found) - expected).abs();
        assert!(error <= allowed + 3e-6 * largest, "{what}: {found} and not {expected}");
    }
}

#[test]
fn layers_compute_the_formula_however_their_weights_are_held() {
    if !HAS_OWN {
        return;
    }
    for bias in [false, true] {
        for Case { name, mut layer, weight, rounded } in cases(bias) {
            let shape @ [d_input, d_output] = layer.weight_shape();
            let sets = [(RANKS[0], false, 20), (RANKS[1], true, 30)]
                .map(|(rank, bias, seed)| adapter(shape, rank, bias, seed));
            let own = adapter(shape, 2, false, 40);
            let x = Matrix::random(7, d_input, 50);
            let mut expected = x.times(&weight);
            if let Some(bias) = &layer.base.bias {
                expected = expected.plus_row(&matrix(bias.val(), 1));
            }
            expected = expected.plus(&update(&own, &x));
            layer.set_adapter(Some(own));
            // Rows with one set, the other, and none, in turn.
            let by_set = sets.each_ref().map(|set| update(set, &x));
            let expected = Matrix::from_fn(7, d_output, |row, col| {
                let more = by_set.get(row % 3).map_or(0.0, |set| set.at(row, col));
                expected.at(row, col) + more
            });
            let none = Matrix::from_fn(7, d_output, |_, _| 0.0);
            for halves in [false, true] {
                let host = Linear::of(&layer, halves).unwrap();
                assert_eq!(host.dims(), shape);
                let updates = sets.each_ref().map(|set| Update::of(set, halves).unwrap());
                let updates = [Some(&updates[0]), Some(&updates[1]), None];
                // Each product of factors is off by at most twice what half precision rounds away.
                let of_halves =
                    Matrix::from_fn(7, d_output, |_, _| if halves { 0.02 } else { 0.0 });
                for few in [0, 3, 7] {
                    let what = format!("{name}, {few} few, halves: {halves}");
                    assert_near(
                        &forward(&host, &x, few, false, &updates),
                        &expected,
                        &of_halves,
                        &what,
                    );
                    let found = forward(&host, &x, few, true, &updates);
                    let allowed = match rounded {
                        Some(levels) => rounding(&x, &weight, levels).plus(&of_halves),
                        None => none.plus(&of_halves),
                    };
                    assert_near(&found, &expected, &allowed, &what);
                }
            }
        }
    }
}

#[test]
fn rounding_is_only_where_weights_are_in_few_bits() {
    if !HAS_OWN {
        return;
    }
    for Case { name, layer, rounded, .. } in cases(false) {
        let host = Linear::of(&layer, false).unwrap();
        let x = Matrix::random(1, host.dims()[0], 3);
        let [exact, fast] = [false, true].map(|rounds| forward(&host, &x, 1, rounds, &[None]));
        assert_eq!(exact == fast, rounded.is_none(), "{name}");
    }
}

/// To the bit: whatever else is in a step, and however a prompt is divided.
#[test]
fn a_row_does_not_depend_on_others() {
    if !HAS_OWN {
        return;
    }
    for Case { name, layer, .. } in cases(true) {
        let shape @ [d_input, d_output] = layer.weight_shape();
        let host = Linear::of(&layer, false).unwrap();
        let updates = [2, 5].map(|rank| Update::of(&adapter(shape, rank, true, 8), false).unwrap());
        let updates = [Some(&updates[0]), None, Some(&updates[1])];
        let rows = 140;
        let x = Matrix::random(rows, d_input, 60);
        let part = |rows: std::ops::Range<usize>| {
            let data = x.data[rows.start * d_input..rows.end * d_input].to_vec();
            Matrix { rows: rows.len(), cols: d_input, data }
        };
        let of = |start: usize| [0, 1, 2].map(|row| updates[(start + row) % 3]);
        for rounds in [false, true] {
            for are_few in [true, false] {
                let few = |count: usize| if are_few { count } else { 0 };
                let all = forward(&host, &x, few(rows), rounds, &of(0));
                for rows in [0..1, 1..3, 3..8, 8..17, 17..33, 33..34, 34..51, 51..91, 91..140] {
                    let (start, end) = (rows.start, rows.end);
                    let found = forward(&host, &part(rows), few(end - start), rounds, &of(start));
                    let expected = &all[start * d_output..end * d_output];
                    assert!(found == expected, "{name}: rows {start} to {end}, few: {are_few}");
                }
            }
        }
        // Few rows beside many.
        let [few, many] = [rows, 0].map(|few| forward(&host, &x, few, true, &of(0)));
        let both = forward(&host, &x, 9, true, &of(0));
        let (first, rest) = both.split_at(9 * d_output);
        assert!(first == &few[..first.len()] && rest == &many[first.len()..], "{name}");
    }
}

#[test]
fn several_layers_at_once_give_what_each_gives() {
    if !HAS_OWN {
        return;
    }
    let all = cases(true);
    let wide: Vec<_> = all.iter().filter(|it| it.layer.weight_shape()[0] == 1024).collect();
    for three in wide.chunks_exact(3) {
        let layers: Vec<_> = three.iter().map(|it| Linear::of(&it.layer, false).unwrap()).collect();
        let updates: Vec<_> = [4, 2, 7]
            .map(|rank| Update::of(&adapter([1024, 37], rank, true, 70), false).unwrap())
            .into();
        let x = Matrix::random(5, 1024, 80);
        let expected: Vec<_> = (0..3)
            .map(|place| forward(&layers[place], &x, 4, true, &[Some(&updates[place])]))
            .collect();
        let mut inputs = Inputs::new(5, 1024);
        inputs.numbers_mut().iter_mut().zip(&x.data).for_each(|(to, it)| *to = *it as f32);
        inputs.prepare(4, true);
        let mut found = [(); 3].map(|()| vec![0.0; 5 * 37]);
        let [one, two, three] = found.each_mut().map(|it| &mut it[..]);
        let layers = [&layers[0], &layers[1], &layers[2]];
        decode::forward(layers, &inputs, |layer, _| Some(&updates[layer]), [one, two, three]);
        assert!(found.to_vec() == expected);
    }
}

/// An adapter that starts from the weight holds what is taken away at first, beside its factors.
#[test]
fn adapters_that_start_from_the_weight_are_what_they_are_on_tensors() {
    if !HAS_OWN {
        return;
    }
    let (device, shape) = (device::<Plain>(), [60, 44]);
    let weight: Tensor<Plain, 2> = Matrix::random(60, 44, 1).tensor(shape, &device);
    let base = BurnLinear { weight: Param::from_tensor(weight), bias: None };
    let mut adapted: LoraLinear<Plain> = LoraConfig::new(4, 6.0).with_init(Init::Pissa).init(base);
    let mut adapter = adapted.adapter().unwrap().clone();
    // It has learned something.
    adapter.b = adapter.b.map(|b: Tensor<Plain, 2>| b * 1.5);
    adapted.set_adapter(Some(adapter));
    let x = Matrix::random(3, 60, 2);
    let expected = matrix(adapted.forward(x.tensor::<Plain, 2>([3, 60], &device)), 3);
    let none = Matrix::from_fn(3, 44, |_, _| 0.0);
    let host = Linear::of(&adapted, false).unwrap();
    for few in [0, 2] {
        assert_near(&forward(&host, &x, few, false, &[None]), &expected, &none, "PiSSA");
    }
}

#[test]
fn what_cannot_be_on_slices_is_none() {
    let weight = Matrix::random(6, 4, 1).tensor([6, 4], &device::<Plain>());
    let mut layer: LoraLinear<Plain> =
        BurnLinear { weight: Param::from_tensor(weight), bias: None }.into();
    assert_eq!(Linear::of(&layer, false).is_some(), HAS_OWN);
    let mut with_magnitude = adapter([6, 4], 2, false, 3);
    let magnitude = Tensor::from_data(TensorData::new(vec![1.0_f32; 4], [4]), &device::<Plain>());
    with_magnitude.magnitude = Some(Param::from_tensor(magnitude));
    assert!(Update::of(&with_magnitude, false).is_none());
    layer.set_adapter(Some(with_magnitude));
    assert!(Linear::of(&layer, false).is_none());
}

#[test]
#[should_panic(expected = "an update for [1024, 37] expected, got [6, 4]")]
fn an_update_of_another_layer_is_refused() {
    let update = Update::of(&adapter([6, 4], 2, false, 3), false).unwrap();
    assert!(HAS_OWN, "an update for [1024, 37] expected, got [6, 4]");
    let case = cases(false).pop().unwrap();
    let x = Matrix::random(1, 1024, 3);
    forward(&Linear::of(&case.layer, false).unwrap(), &x, 1, false, &[Some(&update)]);
}

#[test]
#[should_panic(expected = "the layer takes [2, 1024] to [2, 37], got 6 numbers to a row")]
fn rows_of_another_width_are_refused() {
    assert!(HAS_OWN, "the layer takes [2, 1024] to [2, 37], got 6 numbers to a row");
    let case = cases(false).pop().unwrap();
    forward(&Linear::of(&case.layer, false).unwrap(), &Matrix::random(2, 6, 3), 1, false, &[None]);
}
