//! Matrices of GGUF files: what they hold, and what is computed from them.

use burn::{
    module::{AutodiffModule, Module, Param},
    nn::Embedding,
    record::{
        BinBytesRecorder, FullPrecisionSettings, HalfPrecisionSettings, NamedMpkBytesRecorder,
        Recorder,
    },
    tensor::{Int, Tensor, backend::Backend},
};
use burn_lora::{
    LoraLinear, LoraModule,
    nn::LoraEmbedding,
    quantize::{GgufType, QuantizedWeight},
};
use safetensors::SafeTensors;

use super::{config, fixtures, linear, matrix, random, results};
use crate::{
    model::{Plain, Train, device},
    oracle::{Matrix, assert_close, assert_identical, bits},
};

/// Types whose scales are held apart.
const APART: [GgufType; 3] = [GgufType::Q8_0, GgufType::Q4_0, GgufType::Q4_1];

/// Types that are held as the file has them, and where their blocks have numbers of 16 bits.
const TOGETHER: [(GgufType, &[usize]); 9] = [
    (GgufType::Q5_0, &[0]),
    (GgufType::Q5_1, &[0, 2]),
    (GgufType::Q4_K, &[0, 2]),
    (GgufType::Q5_K, &[0, 2]),
    (GgufType::Q6_K, &[208]),
    (GgufType::Q2_K, &[80, 82]),
    (GgufType::Q3_K, &[108]),
    (GgufType::IQ4_NL, &[0]),
    (GgufType::IQ4_XS, &[0]),
];

/// The bytes of a matrix, and the numbers in them.
struct Given {
    kind: GgufType,
    data: Vec<u8>,
    numbers: Matrix,
}

impl Given {
    fn new(kind: GgufType) -> Self {
        let bytes = match APART.contains(&kind) {
            true => fixtures(),
            false => std::fs::read("tests/quantized/fixtures/gguf.safetensors").unwrap(),
        };
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let data = tensors.tensor(&format!("{kind:?}.data")).unwrap().data().to_vec();
        Self { kind, data, numbers: matrix(&tensors, &format!("{kind:?}.numbers")) }
    }

    fn shape(&self) -> [usize; 2] {
        [self.numbers.rows, self.numbers.cols]
    }

    fn weight<B: Backend>(&self) -> QuantizedWeight<B> {
        QuantizedWeight::from_gguf(self.kind, self.shape(), &self.data, &device::<B>()).unwrap()
    }

    fn dense<B: Backend>(&self) -> Tensor<B, 2> {
        self.numbers.tensor(self.shape(), &device::<B>())
    }

    /// A layer that holds the matrix, and one that holds its numbers.
    fn pair(&self) -> [LoraLinear<Train>; 2] {
        let [rows, columns] = self.shape();
        let mut quantized = linear([columns, rows], true, 3);
        let mut dense = quantized.clone().no_grad();
        quantized.set_quantized(self.weight());
        // A GPU may have multiplied and added with one rounding.
        let numbers = quantized.quantized().unwrap().dense().detach();
        dense.base.weight = Param::from_tensor(numbers.transpose()).no_grad();
        [quantized, dense]
    }
}

fn all() -> impl Iterator<Item = Given> {
    APART.into_iter().chain(TOGETHER.map(|(kind, _)| kind)).map(Given::new)
}

#[test]
fn blocks_of_gguf_are_held_to_the_bit() {
    for given in all() {
        let (name, held) = (given.kind, given.weight::<Plain>());
        if cfg!(feature = "wgpu") {
            // A GPU may multiply and add with one rounding.
            assert_close(held.dense(), &given.numbers, 1e-7);
        } else {
            assert_identical(held.dense(), given.dense::<Plain>());
        }
        let numbers = given.kind.unpack(&given.data).into_iter().map(f64::from);
        assert_eq!(numbers.collect::<Vec<_>>(), given.numbers.data, "{name:?}");

        // Products, of few rows with the codes as they are, and of more.
        let [rows, columns] = given.shape();
        let mut layer = linear::<Plain>([columns, rows], false, 1);
        layer.set_quantized(held);
        for count in [1, 3, 4, 6] {
            let x = Matrix::random(count, columns, 8);
            let y = layer.forward(x.tensor([count, columns], &device::<Plain>()));
            assert_close(y, &x.times(&given.numbers.transpose()), 1e-5);
        }
    }
}

#[test]
fn what_is_no_matrix_is_refused() {
    for Given { kind, data, numbers } in all() {
        let from = |shape, data: &[u8]| {
            let weight = QuantizedWeight::<Plain>::from_gguf(kind, shape, data, &device::<Plain>());
            weight.unwrap_err().to_string()
        };
        let (block, [rows, columns]) = (kind.block()[0], [numbers.rows, numbers.cols]);
        for (shape, cut, expected) in [
            ([rows, columns - 1], 0, format!("{} columns are no blocks of {block}", columns - 1)),
            ([rows, columns], 1, format!("bytes cannot be {rows} x {columns} numbers")),
            ([rows + 1, columns], 0, "numbers".to_owned()),
            ([rows, columns + block], 0, "numbers".to_owned()),
            ([usize::MAX, columns], 0, "numbers".to_owned()),
            ([1, usize::MAX - (block - 1)], 0, "numbers".to_owned()),
            ([0, columns], data.len(), format!("0 bytes cannot be 0 x {columns} numbers")),
            ([rows, 0], data.len(), format!("0 bytes cannot be {rows} x 0 numbers")),
        ] {
            let error = from(shape, &data[cut..]);
            assert!(error.starts_with(&format!("a matrix of {kind:?}: ")), "{error}");
            assert!(error.contains(&expected), "{error}");
        }
    }
}

#[test]
fn a_scale_that_is_not_finite_is_refused() {
    let places = |kind| match kind {
        GgufType::Q4_1 => &[0, 2],
        kind => TOGETHER.iter().find(|it| it.0 == kind).map_or(&[0][..], |it| it.1),
    };
    for given in all() {
        let blocks = given.data.len() / given.kind.block()[1];
        for (block, &place) in
            (0..blocks).flat_map(|it| places(given.kind).iter().map(move |place| (it, place)))
        {
            for number in [0x7c00_u16, 0xfc00, 0x7e01] {
                let mut data = given.data.clone();
                let at = block * given.kind.block()[1] + place;
                data[at..at + 2].copy_from_slice(&number.to_le_bytes());
                let device = device::<Plain>();
                let found =
                    QuantizedWeight::<Plain>::from_gguf(given.kind, given.shape(), &data, &device);
                let expected = format!("a matrix of {:?}: a scale is not finite", given.kind);
                assert_eq!(found.unwrap_err().to_string(), expected);
            }
        }
    }
}

#[test]
fn they_take_the_bytes_of_the_file() {
    for (kind, _) in TOGETHER {
        let given = Given::new(kind);
        let [block, size] = kind.block();
        let [rows, columns] = given.shape();
        let weight = given.weight::<Plain>();
        assert_eq!(weight.num_bytes(), rows * (columns / block * size).next_multiple_of(4));
        assert_eq!(weight.to_string(), format!("{rows} x {columns}, {kind:?}"));
        let [layer, _] = given.pair();
        assert_eq!(layer.parameters().layers[0].quantized_bytes, weight.num_bytes());
    }
}

#[test]
fn outputs_and_gradients_are_those_of_the_numbers() {
    for given in all() {
        let columns = given.shape()[1];
        // Of fewer rows CPU backends add the products in another order.
        for adapted in [false, true] {
            let x = random([7, columns], 5);
            let [ours, expected] = given.pair().map(|layer| match adapted {
                true => results(&layer.attach(&config()).unwrap(), x.clone()),
                false => results(&layer, x.clone()),
            });
            assert_eq!(ours, expected, "{:?}", given.kind);
        }
    }
}

#[test]
fn merging_gives_the_numbers_and_the_update() {
    for given in all() {
        let [layer, dense] = given.pair().map(|it| it.attach(&config()).unwrap());
        let [merged, expected] = [&layer, &dense].map(|it| it.merge().unwrap());
        assert!(merged.quantized().is_none() && layer.quantized().is_some());
        let [merged, expected] = [merged, expected].map(|it| it.base.weight.val().inner());
        assert_identical(merged, expected);
        let plain = layer.detach().dequantize();
        assert!(plain.quantized().is_none());
        assert_identical(plain.base.weight.val(), dense.base.weight.val());
    }
}

#[test]
fn a_table_of_embeddings_is_looked_up_and_is_a_head() {
    for given in all() {
        let [rows, columns] = given.shape();
        let mut table = LoraEmbedding::<Train>::from(Embedding {
            weight: Param::from_tensor(random([rows, columns], 1)),
        });
        let mut dense = table.clone();
        let weight = given.weight::<Train>();
        dense.base.weight = Param::from_tensor(weight.dense().detach());
        table.set_quantized(weight);
        let ids = Tensor::<Train, 2, Int>::from_ints([[2, 0, 1], [1, 1, 2]], &device::<Train>());
        let x = random::<Train, 3>([2, 4, columns], 4);
        let [ours, expected] = [&table, &dense].map(|layer| {
            let x = x.clone().require_grad();
            let logits = layer.project(x.clone());
            let grads = logits.clone().sin().sum().backward();
            [layer.forward(ids.clone()).inner(), logits.inner(), x.grad(&grads).unwrap()].map(bits)
        });
        assert_eq!(ours, expected, "{:?}", given.kind);
    }
}

#[test]
fn trips_and_records_keep_every_bit() {
    for given in all() {
        let [mut layer, _] = given.pair();
        // It would be in half precision in one of them.
        layer.base.bias = None;
        let expected = bits(layer.quantized().unwrap().dense().inner());
        let check = |layer: &LoraLinear<Train>| {
            let weight = layer.quantized().unwrap();
            assert_eq!(bits(weight.dense().inner()), expected, "{:?}", given.kind);
            assert_eq!(weight.num_bytes(), given.weight::<Train>().num_bytes());
        };
        check(&layer.clone());
        check(&layer.clone().fork(&device::<Train>()));
        check(&LoraLinear::from_inner(layer.valid()));
        let blank = || {
            let mut layer = linear::<Train>([given.shape()[1], given.shape()[0]], false, 30);
            layer.base.bias = None;
            layer
        };
        let full = NamedMpkBytesRecorder::<FullPrecisionSettings>::new();
        let bytes = Recorder::<Train>::record(&full, layer.clone().into_record(), ()).unwrap();
        check(&blank().load_record(full.load(bytes, &device::<Train>()).unwrap()));
        let half = NamedMpkBytesRecorder::<HalfPrecisionSettings>::new();
        let bytes = Recorder::<Train>::record(&half, layer.clone().into_record(), ()).unwrap();
        check(&blank().load_record(half.load(bytes, &device::<Train>()).unwrap()));
        let binary = BinBytesRecorder::<FullPrecisionSettings>::new();
        let bytes = Recorder::<Train>::record(&binary, layer.clone().into_record(), ()).unwrap();
        check(&blank().load_record(binary.load(bytes, &device::<Train>()).unwrap()));
    }
}

#[test]
#[should_panic(expected = "143 bytes are no blocks of 144 in Q4_K")]
fn broken_blocks_are_not_unpacked() {
    GgufType::Q4_K.unpack(&[0; 143]);
}
