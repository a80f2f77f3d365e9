//! Weights that are held in bf16: each number is held by itself, and is what the file or the rounding made of it.

use burn::{
    module::{AutodiffModule, Module, Param},
    nn::Embedding,
    record::{
        BinBytesRecorder, FullPrecisionSettings, HalfPrecisionSettings, NamedMpkBytesRecorder,
        NamedMpkGzFileRecorder, PrettyJsonFileRecorder, Recorder,
    },
    tensor::{Int, Tensor, TensorData, backend::Backend},
};
use burn_lora::{
    Init, LoraConfig, LoraLinear, LoraModule,
    nn::{LoraEmbedding, Precision},
    quantize::{GgufType, Quantization, QuantizedWeight},
};
use half::{bf16, f16};

use super::{Near, THERE, assert_near, random, to_bf16};
use crate::{
    model::{Mlp, Plain, Train, device, filled},
    oracle::{Matrix, assert_close, assert_identical, bits},
};

fn gguf<B: Backend>(shape: [usize; 2], numbers: &[bf16]) -> QuantizedWeight<B> {
    let data: Vec<_> = numbers.iter().flat_map(|it| it.to_le_bytes()).collect();
    QuantizedWeight::from_gguf(GgufType::BF16, shape, &data, &device::<B>()).unwrap()
}

fn in_f16<B: Backend>(shape: [usize; 2], numbers: &[f16]) -> QuantizedWeight<B> {
    let data: Vec<_> = numbers.iter().flat_map(|it| it.to_le_bytes()).collect();
    QuantizedWeight::from_gguf(GgufType::F16, shape, &data, &device::<B>()).unwrap()
}

fn rounded<B: Backend>(matrix: &Matrix) -> QuantizedWeight<B> {
    let matrix = matrix.tensor([matrix.rows, matrix.cols], &device::<B>());
    QuantizedWeight::new(matrix, Quantization::Bf16)
}

fn linear<B: Backend>([d_input, d_output]: [usize; 2]) -> LoraLinear<B> {
    let weight = Param::from_tensor(random([d_input, d_output], 1));
    let bias = Some(Param::from_tensor(random([d_output], 2)));
    burn::nn::Linear { weight, bias }.into()
}

const SHAPES: [[usize; 2]; 7] = [[1, 1], [1, 2], [3, 1], [5, 7], [4, 32], [6, 65], [70, 130]];

#[test]
fn numbers_in_bf16_are_held_to_the_bit() {
    for [rows, columns] in SHAPES {
        let numbers: Vec<_> = Matrix::random(rows, columns, 3).data;
        let numbers: Vec<_> = numbers.iter().map(|&it| bf16::from_f32(it as f32)).collect();
        let expected: Vec<_> = numbers.iter().map(|it| it.to_f32().to_bits()).collect();
        let held = gguf::<Plain>([rows, columns], &numbers);
        assert_eq!(held.shape(), [rows, columns]);
        assert_eq!(held.num_bytes(), rows * columns.next_multiple_of(2) * 2);
        assert_eq!(bits(held.dense()), expected);
        assert_eq!(bits(gguf::<Train>([rows, columns], &numbers).dense()), expected);
        // To round them changes nothing.
        let again = QuantizedWeight::new(held.dense(), Quantization::Bf16);
        assert_eq!(bits(again.dense()), expected);
    }
}

#[test]
fn others_are_rounded_to_the_nearest() {
    for [rows, columns] in SHAPES {
        let numbers = Matrix::random(rows, columns, 4).scaled(3.0);
        let expected = numbers.map(to_bf16);
        let found: Vec<_> = rounded::<Plain>(&numbers).dense().into_data().iter::<f64>().collect();
        assert_eq!(found, expected.data);
    }
    // Ties go to the even one.
    let step = 1.0 / 128.0;
    let ties = [1.0 + step / 2.0, 1.0 + 1.5 * step, -1.0 - step / 2.0, -1.0 - 1.5 * step];
    let found = rounded::<Plain>(&Matrix { rows: 2, cols: 2, data: ties.to_vec() }).dense();
    let found: Vec<_> = found.into_data().iter::<f64>().collect();
    assert_eq!(found, [1.0, 1.0 + 2.0 * step, -1.0, -1.0 - 2.0 * step]);
}

#[test]
fn extreme_numbers_are_held() {
    // The largest, the smallest normal, the zeros, and the subnormal ones, which a GPU may take for zeros.
    let numbers = [0x7f7f, 0xff7f, 0x0080, 0x8080, 0x0000, 0x8000, 0x0001, 0x8001, 0x007f];
    let numbers = numbers.map(bf16::from_bits);
    let numbers = if THERE { &numbers[..] } else { &numbers[..6] };
    let held = gguf::<Plain>([3, numbers.len() / 3], numbers);
    let expected: Vec<_> = numbers.iter().map(|it| it.to_f32().to_bits()).collect();
    assert_eq!(bits(held.dense()), expected);
}

#[test]
fn the_largest_numbers_in_f32_become_the_largest_ones() {
    // The nearest ones without a bound are infinite, which no weight may be.
    let numbers = [f32::MAX, f32::MIN, 1.0];
    let numbers = Tensor::<Plain, 2>::from_data([numbers], &device::<Plain>());
    let held = QuantizedWeight::new(numbers, Quantization::Bf16);
    let found: Vec<_> = held.dense().into_data().iter::<f32>().collect();
    assert_eq!(found, [bf16::MAX.to_f32(), bf16::MIN.to_f32(), 1.0]);
}

#[test]
fn numbers_in_f16_are_held_to_the_bit() {
    // All that are finite, in rows of an odd number of them.
    let numbers = (0..=u16::MAX).map(f16::from_bits).filter(|it| it.is_finite());
    let numbers: Vec<_> = numbers.take(249 * 253).collect();
    let expected: Vec<_> = numbers.iter().map(|it| it.to_f32().to_bits()).collect();
    let held = in_f16::<Plain>([249, 253], &numbers);
    assert_eq!(held.num_bytes(), 249 * 254 * 2);
    assert_eq!(bits(held.dense()), expected);
    assert_eq!(bits(in_f16::<Train>([249, 253], &numbers).dense()), expected);
}

#[test]
fn products_with_numbers_in_f16_are_those_of_the_numbers() {
    for [rows, columns] in SHAPES {
        let numbers: Vec<_> = Matrix::random(rows, columns, 3).data;
        let numbers: Vec<_> = numbers.iter().map(|&it| f16::from_f32(it as f32)).collect();
        let mut layer = linear::<Plain>([columns, rows]);
        layer.base.bias = None;
        layer.set_quantized(in_f16([rows, columns], &numbers));
        let data = numbers.iter().map(|it| f64::from(it.to_f32())).collect();
        let weight = Matrix { rows, cols: columns, data }.transpose();
        for count in [1, 3, 6] {
            let x = Matrix::random(count, columns, 8);
            let y = layer.forward(x.tensor([count, columns], &device::<Plain>()));
            assert_close(y, &x.times(&weight), 1e-5);
        }
    }
}

#[test]
fn what_is_no_matrix_is_refused() {
    let from_as = |kind, shape, data: &[u8]| {
        let weight = QuantizedWeight::<Plain>::from_gguf(kind, shape, data, &device::<Plain>());
        weight.unwrap_err().to_string()
    };
    let from = |shape, data: &[u8]| from_as(GgufType::BF16, shape, data);
    for broken in [0x7c00_u16, 0xfc00, 0x7e00] {
        let error = from_as(GgufType::F16, [1, 1], &broken.to_le_bytes());
        assert!(error.ends_with("a matrix of F16: a number is not finite"), "{error}");
    }
    for (shape, bytes) in [
        ([3, 5], 29),
        ([3, 5], 31),
        ([3, 5], 60),
        ([0, 5], 0),
        ([3, 0], 0),
        ([usize::MAX, 5], 30),
        ([3, usize::MAX], 30),
        ([1 << 63, 1], 0),
    ] {
        let [rows, columns] = shape;
        let expected =
            format!("a matrix of BF16: {bytes} bytes cannot be {rows} x {columns} numbers");
        let error = from(shape, &vec![0; bytes]);
        assert!(error.ends_with(&expected), "{error}");
    }
    for broken in [0x7f80_u16, 0xff80, 0x7fc0, 0x7f81] {
        let mut data = vec![0; 30];
        data[28..].copy_from_slice(&broken.to_le_bytes());
        let error = from([3, 5], &data);
        assert!(error.ends_with("a matrix of BF16: a number is not finite"), "{error}");
    }
}

#[test]
#[should_panic(expected = "the matrix must be finite")]
fn what_is_not_finite_is_not_rounded() {
    rounded::<Plain>(&Matrix { rows: 1, cols: 2, data: vec![1.0, f64::NAN] });
}

#[test]
#[should_panic(expected = "the matrix must not be empty, got [0, 3]")]
fn nothing_is_not_rounded() {
    let empty = Tensor::<Plain, 2>::zeros([0, 3], &device::<Plain>());
    QuantizedWeight::new(empty, Quantization::Bf16);
}

#[test]
fn records_keep_every_bit() {
    let directory = tempfile::tempdir().unwrap();
    let device = device::<Train>();
    for size in [[33, 8], [7, 5], [1, 1]] {
        // Its bias would be in half precision in some of them.
        let mut layer = linear::<Train>(size);
        layer.base.bias = None;
        let (layer, _) = layer.quantize(Quantization::Bf16).unwrap();
        let layer = layer.with_precision(Precision::Bf16);
        let expected = bits(layer.quantized().unwrap().dense().inner());
        let blank = || linear::<Train>(size).quantize(Quantization::Int8).unwrap().0;
        let check = |record| {
            // The precision is no part of a record.
            for precision in [Precision::F32, Precision::Bf16] {
                let found = blank().with_precision(precision);
                let found = found.load_record(Clone::clone(&record));
                assert_eq!(bits(found.quantized().unwrap().dense().inner()), expected);
                assert_eq!(found.precision(), precision);
                assert_eq!(
                    found.quantized().unwrap().num_bytes(),
                    size[1] * size[0].next_multiple_of(2) * 2
                );
                let x = random::<Train, 2>([6, size[0]], 3);
                let [ours, other] = [&found, &layer].map(|it| it.with_precision(Precision::Bf16));
                assert_identical(ours.forward(x.clone()).inner(), other.forward(x).inner());
            }
        };
        check(layer.clone().into_record());
        let named = NamedMpkBytesRecorder::<FullPrecisionSettings>::new();
        let bytes = Recorder::<Train>::record(&named, layer.clone().into_record(), ()).unwrap();
        check(named.load(bytes, &device).unwrap());
        let half = NamedMpkBytesRecorder::<HalfPrecisionSettings>::new();
        let bytes = Recorder::<Train>::record(&half, layer.clone().into_record(), ()).unwrap();
        check(half.load(bytes, &device).unwrap());
        let binary = BinBytesRecorder::<FullPrecisionSettings>::new();
        let bytes = Recorder::<Train>::record(&binary, layer.clone().into_record(), ()).unwrap();
        check(binary.load(bytes, &device).unwrap());
        let (packed, json) = (directory.path().join("packed"), directory.path().join("json"));
        let gz = NamedMpkGzFileRecorder::<FullPrecisionSettings>::new();
        Recorder::<Train>::record(&gz, layer.clone().into_record(), packed.clone()).unwrap();
        check(gz.load(packed, &device).unwrap());
        let pretty = PrettyJsonFileRecorder::<FullPrecisionSettings>::new();
        Recorder::<Train>::record(&pretty, layer.clone().into_record(), json.clone()).unwrap();
        check(pretty.load(json, &device).unwrap());
    }
}

#[test]
fn trips_keep_every_bit() {
    let (layer, _) = linear::<Train>([33, 7]).quantize(Quantization::Bf16).unwrap();
    let expected = bits(layer.quantized().unwrap().dense().inner());
    let check = |layer: &LoraLinear<Train>| {
        assert_eq!(bits(layer.quantized().unwrap().dense().inner()), expected);
    };
    check(&layer.clone());
    check(&layer.clone().fork(&device::<Train>()));
    check(&layer.clone().to_device(&device::<Train>()));
    check(&LoraLinear::from_inner(layer.valid()));
    check(&layer.clone().no_grad());
    assert_eq!(bits(layer.valid().quantized().unwrap().dense()), expected);
    assert_eq!(layer.valid().to_string(), "LoraLinear {weight: 7 x 33, Bf16, params: 7}");
}

#[test]
fn a_model_takes_half_of_the_bytes() {
    let base = filled(Mlp::<Train>::new(&device::<Train>()));
    let (model, report) = base.quantize(Quantization::Bf16).unwrap();
    assert_eq!(report.layers.len(), 3);
    for (layer, before) in report.layers.iter().zip([&base.blocks[0], &base.blocks[1], &base.head])
    {
        let weight = before.base.weight.val();
        let [d_input, d_output] = weight.dims();
        assert_eq!(layer.bytes_before, 4 * d_input * d_output);
        // A row of an odd number of inputs takes one more.
        assert_eq!(layer.bytes, 2 * d_input.next_multiple_of(2) * d_output);
        let numbers: Vec<_> = weight.into_data().iter::<f64>().collect();
        let norm =
            |it: &dyn Fn(f64) -> f64| numbers.iter().map(|&x| it(x).powi(2)).sum::<f64>().sqrt();
        let error = norm(&|x| to_bf16(x) - x) / norm(&|x| x);
        assert!((layer.error - error).abs() < 1e-6, "{} and {error}", layer.error);
        assert!(layer.error > 5e-4 && layer.error < 4e-3);
    }
    let whole = linear::<Train>([64, 10]).quantize(Quantization::Bf16).unwrap().1;
    assert_eq!(2 * whole.bytes(), whole.bytes_before());
    // Of numbers in bf16 nothing is lost.
    let again = model.dequantize().quantize(Quantization::Bf16).unwrap().1;
    assert!(again.layers.iter().all(|it| it.error == 0.0));
    let twice = model.quantize(Quantization::Bf16).err().unwrap().to_string();
    assert_eq!(twice, "`blocks.0` cannot be quantized: its weight is quantized already");
}

#[test]
fn embeddings_look_up_what_is_held() {
    for width in [1, 6, 33] {
        let numbers = Matrix::random(11, width, 1);
        let weight =
            Param::from_tensor(numbers.tensor::<Plain, 2>([11, width], &device::<Plain>()));
        let layer = LoraEmbedding::from(Embedding { weight });
        let (layer, _) = layer.quantize(Quantization::Bf16).unwrap();
        let ids = [[3_i32, 10, 0, 3]];
        let y = layer.forward(Tensor::<Plain, 2, Int>::from_ints(ids, &device::<Plain>()));
        assert_eq!(y.dims(), [1, 4, width]);
        let row = |id: i32| numbers.data[id as usize * width..][..width].to_vec();
        let expected = ids[0].into_iter().flat_map(row).map(to_bf16).collect::<Vec<_>>();
        assert_eq!(y.into_data().iter::<f64>().collect::<Vec<_>>(), expected);
    }
}

#[test]
fn rows_of_subnormal_numbers_are_multiplied_by_few() {
    // A product in `f32` takes them as they are, or as zero, which is as near as any sum of others is.
    let numbers = [0x0001, 0x3f80, 0x8001, 0xbf00, 0x007f, 0x4000].map(bf16::from_bits);
    let mut layer = linear::<Plain>([3, 2]);
    layer.base.bias = None;
    layer.set_quantized(gguf([2, 3], &numbers));
    let values = numbers.iter().map(|it| f64::from(it.to_f32())).collect();
    let weight = Matrix { rows: 2, cols: 3, data: values }.transpose();
    for rows in 1..9 {
        let x = Matrix::random(rows, 3, 5);
        let y = layer.forward(x.tensor([rows, 3], &device::<Plain>()));
        assert_near("y", y, &Near::exact(&x).times(&Near::exact(&weight)));
    }
}

#[test]
fn merging_gives_a_layer_in_full() {
    let (layer, _) = linear::<Train>([33, 7]).quantize(Quantization::Bf16).unwrap();
    let config = LoraConfig::new(3, 7.0).with_init(Init::RandomBoth).with_seed(5);
    let model = layer.attach(&config).unwrap();
    let merged = model.merge().unwrap();
    assert!(merged.quantized().is_none() && model.quantized().is_some());
    let delta = model.adapter().unwrap().delta();
    let weight = model.quantized().unwrap().dense().transpose() + delta;
    assert_identical(merged.base.weight.val().inner(), weight.inner());
    let x = random::<Train, 2>([6, 33], 2);
    let expected = model.forward(x.clone()).into_data().iter::<f64>().collect();
    let expected = Matrix { rows: 6, cols: 7, data: expected };
    assert_close(merged.forward(x).inner(), &expected, 1e-5);
}

#[test]
fn weights_from_files_are_put_where_they_belong() {
    let numbers = |shape: [usize; 2], seed| {
        let numbers = Matrix::random(shape[0], shape[1], seed).data;
        numbers.into_iter().map(|it| bf16::from_f32(it as f32)).collect::<Vec<_>>()
    };
    let base = Mlp::<Train>::new(&device::<Train>());
    let first = numbers([8, 6], 1);
    let weights = [("blocks.0".to_owned(), gguf([8, 6], &first))];
    let model = base.with_precision(Precision::Bf16).with_quantized(weights.into()).unwrap();
    assert_eq!(model.blocks[0].precision(), Precision::Bf16);
    let held = model.blocks[0].quantized().unwrap().dense();
    let data = TensorData::new(first.iter().map(|it| it.to_f32()).collect::<Vec<_>>(), [8, 6]);
    assert_identical(held.inner(), Tensor::<Plain, 2>::from_data(data, &device::<Plain>()));
    let wrong = [("head".to_owned(), gguf([7, 3], &numbers([7, 3], 2)))];
    let error = model.with_quantized(wrong.into()).err().unwrap().to_string();
    assert!(error.contains("head (expected [7, 3], found [3, 7])"), "{error}");
}
