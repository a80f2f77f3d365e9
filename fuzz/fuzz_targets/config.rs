//! Reads random bytes as `adapter_config.json`, PEFT's and mlx-lm's, with tensors that fit many
//! configurations.
//!
//! ```text
//! cargo +nightly fuzz run config fuzz/corpus/config fuzz/seeds/config
//! ```

#![no_main]

use burn::{backend::Flex, module::Module, nn::LinearConfig, tensor::backend::Backend};
use burn_lora::{LoraAdapters, LoraLinear, LoraModule};
use libfuzzer_sys::fuzz_target;

#[derive(Module, Debug)]
struct Model<B: Backend> {
    layers: Vec<Block<B>>,
}

#[derive(Module, Debug)]
struct Block<B: Backend> {
    fc: LoraLinear<B>,
}

/// Three blocks. There are adapters for two of them. The configuration says whether the third needs one.
fn model() -> Model<Flex> {
    let block = || Block { fc: LinearConfig::new(2, 3).init(&Default::default()).into() };
    Model { layers: vec![block(), block(), block()] }
}

/// PEFT's keys for adapters of rank 1 on two linear layers.
const PEFT: [(&str, [usize; 2]); 4] = [
    ("base_model.model.layers.0.fc.lora_A.weight", [1, 2]),
    ("base_model.model.layers.0.fc.lora_B.weight", [3, 1]),
    ("base_model.model.layers.1.fc.lora_A.weight", [1, 2]),
    ("base_model.model.layers.1.fc.lora_B.weight", [3, 1]),
];

/// mlx-lm's.
const MLX: [(&str, [usize; 2]); 4] = [
    ("layers.0.fc.lora_a", [2, 1]),
    ("layers.0.fc.lora_b", [1, 3]),
    ("layers.1.fc.lora_a", [2, 1]),
    ("layers.1.fc.lora_b", [1, 3]),
];

/// A file of zeros.
fn weights(tensors: [(&str, [usize; 2]); 4]) -> Vec<u8> {
    let mut header = String::from("{");
    let mut end = 0;
    for (key, shape) in tensors {
        let start = end;
        end += 4 * shape[0] * shape[1];
        let comma = if start == 0 { "" } else { "," };
        header += &format!(
            r#"{comma}"{key}": {{"dtype": "F32", "shape": {shape:?},
            "data_offsets": [{start}, {end}]}}"#
        );
    }
    header += "}";
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + end, 0);
    bytes
}

fuzz_target!(|bytes: &[u8]| {
    for tensors in [PEFT, MLX] {
        let weights = weights(tensors);
        let Ok(set) = LoraAdapters::<Flex>::from_bytes(bytes, &weights, &Default::default()) else {
            continue;
        };
        assert_eq!(set.len(), 2);
        assert!(set.iter().all(|(_, adapter)| adapter.alpha.is_finite()));
        if let Ok(adapted) = model().switch(&set) {
            assert!(adapted.parameters().trainable > 0);
        }
    }
});
