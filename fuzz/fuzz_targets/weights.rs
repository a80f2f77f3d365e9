//! Reads random bytes as `adapter_model.safetensors`, and as mlx-lm's `adapters.safetensors`, with
//! configurations that accept many tensors.
//!
//! ```text
//! cargo +nightly fuzz run weights fuzz/corpus/weights fuzz/seeds/weights
//! ```

#![no_main]

use burn::backend::Flex;
use burn_lora::LoraAdapters;
use libfuzzer_sys::fuzz_target;

const CONFIGS: [&str; 3] = [
    r#"{"peft_type": "LORA", "r": 1, "lora_bias": true, "target_modules": ["a", "fc1"]}"#,
    r#"{"peft_type": "LORA", "r": 4, "bias": "all", "rank_pattern": {"fc1": 2},
        "modules_to_save": ["head", "norm"], "target_modules": "fc.*"}"#,
    // mlx-lm's.
    r#"{"lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.1}}"#,
];

fuzz_target!(|bytes: &[u8]| {
    for config in CONFIGS {
        if let Ok(set) =
            LoraAdapters::<Flex>::from_bytes(config.as_bytes(), bytes, &Default::default())
        {
            // A set that was read can be used.
            assert!(!set.is_empty() && set.num_params() > 0);
            assert!(!set.to_string().is_empty());
            for (_, adapter) in set.iter() {
                let [d_input, d_output] = adapter.shape();
                assert!(adapter.rank() > 0 && d_input > 0 && d_output > 0);
            }
        }
    }
});
