//! Quantized bases that are multiplied in bf16: their numbers are unpacked, and rounded to bf16.

use burn::{
    module::Param,
    nn::Linear,
    tensor::{Tensor, TensorData, backend::Backend},
};
use burn_lora::{
    LoraAdapter, LoraLinear, LoraModule, Scaling,
    nn::Precision,
    quantize::{GgufType, Quantization, QuantizedWeight},
};

use super::{FEW, Formula, Near, assert_near, backward, problem};
use crate::{
    model::{Plain, Train, device},
    oracle::{Matrix, Problem, bits},
};

/// How a weight is held.
#[derive(Clone, Copy, Debug)]
enum Held {
    Rounded(Quantization),
    Gguf(GgufType),
}

use Held::{Gguf, Rounded};

const ALL: [Held; 17] = [
    Rounded(Quantization::Int8),
    Rounded(Quantization::Nf4),
    Rounded(Quantization::Bf16),
    Gguf(GgufType::Q8_0),
    Gguf(GgufType::Q4_0),
    Gguf(GgufType::Q4_1),
    Gguf(GgufType::BF16),
    Gguf(GgufType::Q5_0),
    Gguf(GgufType::Q5_1),
    Gguf(GgufType::Q4_K),
    Gguf(GgufType::Q5_K),
    Gguf(GgufType::Q6_K),
    Gguf(GgufType::Q2_K),
    Gguf(GgufType::Q3_K),
    Gguf(GgufType::IQ4_NL),
    Gguf(GgufType::IQ4_XS),
    Gguf(GgufType::F16),
];

impl Held {
    /// What the inputs of a layer must be whole blocks of.
    fn block(self) -> usize {
        match self {
            Rounded(_) => 1,
            Gguf(kind) => kind.block()[0],
        }
    }

    fn weight<B: Backend>(self, numbers: &Matrix) -> QuantizedWeight<B> {
        let (shape, device) = ([numbers.rows, numbers.cols], device::<B>());
        let kind = match self {
            Rounded(to) => return QuantizedWeight::new(numbers.tensor(shape, &device), to),
            Gguf(kind) => kind,
        };
        let mut data = Vec::new();
        if kind == GgufType::BF16 {
            let numbers = numbers.data.iter().map(|&it| half::bf16::from_f32(it as f32));
            data.extend(numbers.flat_map(half::bf16::to_le_bytes));
            return QuantizedWeight::from_gguf(kind, shape, &data, &device).unwrap();
        }
        if kind == GgufType::F16 {
            let numbers = numbers.data.iter().map(|&it| half::f16::from_f32(it as f32));
            data.extend(numbers.flat_map(half::f16::to_le_bytes));
            return QuantizedWeight::from_gguf(kind, shape, &data, &device).unwrap();
        }
        let [block, size] = kind.block();
        // Any codes are some numbers.
        let codes = Matrix::random(1, numbers.data.len() / block * size, 77);
        data.extend(codes.data.into_iter().map(|it| (it * 128.0 + 128.0) as u8));
        // Scales are between 1/16 and 1/8, and the smallest number of a block is -1. If parts of blocks have scales of
        // their own, which multiply these, they are a 64th of that.
        let (places, shift): (&[usize], u8) = match kind {
            GgufType::Q4_1 | GgufType::Q5_1 => (&[0, 2], 0),
            GgufType::Q4_K | GgufType::Q5_K => (&[0, 2], 6),
            GgufType::Q2_K => (&[80, 82], 6),
            GgufType::Q3_K => (&[108], 6),
            GgufType::Q6_K => (&[208], 6),
            GgufType::IQ4_NL | GgufType::IQ4_XS => (&[0], 6),
            _ => (&[0], 0),
        };
        for (number, block) in data.chunks_exact_mut(size).enumerate() {
            let both = [[(number * 37 % 256) as u8, 0x2c - 4 * shift], [0, 0xbc - 4 * shift]];
            for (&place, bytes) in places.iter().zip(both) {
                block[place..place + 2].copy_from_slice(&bytes);
            }
        }
        QuantizedWeight::from_gguf(kind, shape, &data, &device).unwrap()
    }
}

/// The layer on such a weight, and its formula with the numbers that this holds.
fn layer<B: Backend>(held: Held, problem: &mut Problem, adapted: bool) -> LoraLinear<B> {
    let device = device::<B>();
    let [d_input, d_output] = [problem.w.rows, problem.w.cols];
    let bias = problem.bias.as_ref();
    let base = Linear {
        weight: Param::from_tensor(Tensor::zeros([d_input, d_output], &device)),
        bias: bias.map(|it| Param::from_tensor(it.tensor([d_output], &device))),
    };
    let mut layer = LoraLinear::from(base);
    let weight = held.weight::<B>(&problem.w.transpose());
    let data = weight.dense().into_data().iter::<f64>().collect();
    problem.w = Matrix { rows: d_output, cols: d_input, data }.transpose();
    layer.set_quantized(weight);
    if adapted {
        let [a, b] = [&problem.a, &problem.b].map(|it| it.tensor([it.rows, it.cols], &device));
        layer.set_adapter(Some(LoraAdapter::new(a, b, problem.scale, Scaling::Alpha)));
    }
    layer.with_precision(Precision::Bf16)
}

/// Inputs and outputs.
const SIZES: [[usize; 2]; 6] = [[1, 1], [31, 6], [33, 40], [65, 33], [96, 7], [130, 37]];

fn sizes(held: Held) -> impl Iterator<Item = [usize; 2]> {
    let fits = move |it: &[usize; 2]| it[0].is_multiple_of(held.block());
    // The last one has more inputs than are unpacked at once.
    let block = held.block().max(32);
    let large = if block == 256 { [512, 9] } else { [288, 40] };
    SIZES.into_iter().filter(fits).chain([[block, 5], large])
}

#[test]
fn outputs_and_gradients_are_the_formula_of_rounded_factors() {
    for held in ALL {
        for size in sizes(held) {
            for rows in [FEW + 1, 37] {
                let mut problem = problem(rows, size, 3, 4);
                let adapted = layer::<Train>(held, &mut problem, true);
                let of = format!("{rows} rows, {held:?} of {size:?}");
                let formula = Formula::of(&problem);
                let dy = Matrix::random(rows, size[1], 98);
                let tensor =
                    |it: &Matrix| it.tensor::<Train, 2>([it.rows, it.cols], &device::<Train>());
                let (y, dx, grads) =
                    backward(tensor(&problem.x), tensor(&dy), |x| adapted.forward(x));
                assert_near(&of, y, &formula.output());
                assert_near(&of, dx, &formula.dx_of_base(&dy).plus(&formula.dx_of_update(&dy)));
                let adapter = adapted.adapter().unwrap();
                let [da, db] =
                    [&adapter.a, &adapter.b].map(|it| it.val().grad(&grads).expect("it trains"));
                assert_near(&of, da, &formula.da(&problem.x, &dy));
                assert_near(&of, db, &formula.db(&problem.x, &dy));

                let mut plain = adapted;
                plain.set_adapter(None);
                let (y, dx, _) = backward(tensor(&problem.x), tensor(&dy), |x| plain.forward(x));
                assert_near(&of, y, &formula.with_bias(formula.base()));
                assert_near(&of, dx, &formula.dx_of_base(&dy));
            }
        }
    }
}

#[test]
fn few_rows_are_multiplied_in_f32() {
    for held in ALL {
        for size in sizes(held) {
            for rows in 1..=FEW {
                for adapted in [false, true] {
                    let mut problem = problem(rows, size, 3, 5);
                    let layer = layer::<Plain>(held, &mut problem, adapted);
                    let x = problem.x.tensor::<Plain, 2>([rows, size[0]], &device::<Plain>());
                    let y = layer.forward(x.clone());
                    let formula = Formula::of(&problem);
                    let base = formula.base();
                    let sum = if adapted { base.plus(&formula.update(&problem.x)) } else { base };
                    let of = format!("{rows} rows, {held:?} of {size:?}");
                    // Products with codes, of which the scale and the smallest number are taken later, have larger
                    // parts than the numbers.
                    let loose = |it: Near| {
                        let more = problem.x.map(f64::abs).times(&problem.w.map(|_| 2e-6));
                        Near { errors: it.errors.plus(&more), ..it }
                    };
                    assert_near(&of, y.clone(), &loose(formula.with_bias(sum)));
                    let full = layer.with_precision(Precision::F32).forward(x);
                    assert_eq!(bits(y), bits(full), "{of}");
                }
            }
        }
    }
}

#[test]
fn a_large_weight_is_shared_by_threads() {
    for held in [Rounded(Quantization::Nf4), Rounded(Quantization::Bf16)] {
        let (rows, size) = (6, [700, 300]);
        let mut problem = problem(rows, size, 3, 6);
        let layer = layer::<Train>(held, &mut problem, false);
        let dy = Matrix::random(rows, size[1], 98);
        let tensor = |it: &Matrix| it.tensor::<Train, 2>([it.rows, it.cols], &device::<Train>());
        let (y, dx, _) = backward(tensor(&problem.x), tensor(&dy), |x| layer.forward(x));
        let formula = Formula::of(&problem);
        assert_near("y", y, &formula.with_bias(formula.base()));
        assert_near("dx", dx, &formula.dx_of_base(&dy));
    }
}

#[test]
fn a_base_that_holds_bf16_gives_what_the_same_numbers_in_f32_give() {
    let mut problem = problem(20, [45, 14], 3, 7);
    problem.w = problem.w.map(super::to_bf16);
    let full = problem.w.clone();
    let held = layer::<Train>(Rounded(Quantization::Bf16), &mut problem, true);
    assert_eq!(problem.w, full);
    let mut dense = held.clone();
    dense = dense.dequantize();
    assert!(dense.quantized().is_none());
    for precision in [Precision::Bf16, Precision::F32] {
        let run = |layer: &LoraLinear<Train>| {
            let x = problem.x.tensor::<Train, 2>([20, 45], &device::<Train>());
            let dy = super::random::<Train, 2>([20, 14], 3);
            let layer = layer.with_precision(precision);
            let (y, dx, grads) = backward(x, dy, |x| layer.forward(x));
            let adapter = layer.adapter().unwrap();
            let of = |it: &Param<Tensor<Train, 2>>| bits(it.val().grad(&grads).unwrap());
            [bits(y), bits(dx), of(&adapter.a), of(&adapter.b)]
        };
        assert_eq!(run(&held), run(&dense), "{precision}");
    }
}

#[test]
fn what_is_not_finite_stays_in_its_row() {
    if !super::THERE {
        // A GPU may take all numbers for finite ones.
        return;
    }
    for held in ALL {
        let width = held.block().max(64);
        let mut problem = problem(9, [width, 11], 3, 8);
        let layer = layer::<Plain>(held, &mut problem, true);
        let forward =
            |x: &Matrix| layer.forward(x.tensor::<Plain, 2>([9, width], &device::<Plain>()));
        let expected = forward(&problem.x);
        problem.x.data[4 * width + 40] = f64::NAN;
        let y = forward(&problem.x);
        let row: Vec<_> = y.clone().narrow(0, 4, 1).into_data().iter::<f32>().collect();
        assert!(row.iter().all(|it| it.is_nan()), "{held:?}");
        for (start, count) in [(0, 4), (5, 4)] {
            let [y, expected] = [&y, &expected].map(|it| bits(it.clone().narrow(0, start, count)));
            assert_eq!(y, expected, "{held:?}");
        }
    }
}

#[test]
fn zeros_are_zeros() {
    for to in [Quantization::Int8, Quantization::Nf4, Quantization::Bf16] {
        let zeros = TensorData::new(vec![0.0f32; 7 * 40], [7, 40]);
        let zeros = Tensor::<Plain, 2>::from_data(zeros, &device::<Plain>());
        let mut problem = problem(6, [40, 7], 3, 9);
        problem.bias = None;
        let mut layer = layer::<Plain>(Rounded(to), &mut problem, false);
        layer.set_quantized(QuantizedWeight::new(zeros, to));
        let y = layer.forward(problem.x.tensor::<Plain, 2>([6, 40], &device::<Plain>()));
        assert!(y.into_data().iter::<f32>().all(|it| it == 0.0), "{to:?}");
    }
}
