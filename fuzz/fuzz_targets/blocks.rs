//! Takes random bytes for a matrix in one of the types of GGUF files, unpacks it and multiplies with it.
//!
//! ```text
//! cargo +nightly fuzz run blocks
//! ```

#![no_main]

use burn::{backend::Flex, module::Param, nn::Linear, tensor::Tensor};
use burn_lora::{
    LoraLinear, LoraModule,
    error::LoraError,
    nn::Precision,
    quantize::{GgufType, QuantizedWeight},
};
use burn_lora_kernels::{BlockFormat, Dots, Vector8};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let [kind, rows, columns, data @ ..] = bytes else { return };
    let kind = GgufType::ALL[usize::from(*kind) % GgufType::ALL.len()];
    let [block, size] = kind.block();
    // Nearly all shapes would be refused otherwise.
    let (rows, width) = (usize::from(*rows) % 5, usize::from(*columns) % 4 * block);
    let fits = rows * (width / block) * size;
    let data = data.get(..fits).unwrap_or(data);
    let shape = [rows, width + usize::from(*columns >= 250)];
    let weight = match QuantizedWeight::<Flex>::from_gguf(kind, shape, data, &Default::default()) {
        Ok(weight) => weight,
        Err(LoraError::InvalidFile { .. }) => return,
        Err(error) => panic!("{error}"),
    };
    let numbers: Vec<f32> = weight.dense().into_data().iter().collect();
    assert_eq!(numbers.len(), rows * width);
    assert!(numbers.iter().all(|it| it.is_finite()));
    assert!(numbers.iter().zip(kind.unpack(data)).all(|(found, expected)| *found == expected));

    // Few rows are multiplied in another way than more of them.
    let weight_of =
        |shape: [usize; 2]| Param::from_tensor(Tensor::zeros(shape, &Default::default()));
    let mut layer =
        LoraLinear::from(Linear::<Flex> { weight: weight_of([width, rows]), bias: None });
    layer.set_quantized(weight);
    for count in [1, 2, 6] {
        let x = Tensor::<Flex, 2>::ones([count, width], &Default::default());
        for precision in [Precision::F32, Precision::Bf16] {
            let y = layer.with_precision(precision).forward(x.clone());
            assert_eq!(y.dims(), [count, rows]);
        }
    }

    let Some(format) =
        BlockFormat::ALL.into_iter().find(|it| format!("{it:?}") == format!("{kind:?}"))
    else {
        return;
    };
    let x = Vector8::new(&numbers[..width]);
    for row in data.chunks_exact(format.row_bytes(width)) {
        let there = Dots::ALL.into_iter().filter(|it| it.are_there());
        let mut products = there.map(|by| format.dot(by, row, &x).to_bits());
        let first = products.next();
        assert!(products.all(|it| Some(it) == first));
    }
});
