//! Reads random JSON as the fields of a GGUF file, and has the tokenizer that they describe divide texts.
//!
//! ```text
//! cargo +nightly fuzz run tokens fuzz/corpus/tokens fuzz/seeds/tokens
//! ```

#![no_main]

use std::path::Path;

use burn_lora_llm::gguf::tokens;
use libfuzzer_sys::fuzz_target;
use serde_json::{Map, Value};

const TEXTS: [&str; 5] =
    ["", " ab  ab\n", "<s>it's 1,234<|im_end|> \u{2581}\u{2581}", "ß 猫 \u{1f600}\u{0}", "</s></s>"];

fuzz_target!(|bytes: &[u8]| {
    let Ok(fields) = serde_json::from_slice::<Map<String, Value>>(bytes) else { return };
    let Ok(tokenizer) = tokens::tokenizer(&fields, Path::new("missing/x.gguf")) else { return };
    let ends = tokens::ends(&fields, &tokenizer);
    assert!(ends.iter().all(|&id| tokenizer.id_to_token(id).is_some()));
    for text in TEXTS {
        for special in [false, true] {
            // Without bytes and a token for what is unknown, there may be no tokens of a text.
            let Ok(encoding) = tokenizer.encode(text, special) else { continue };
            let ids = encoding.get_ids();
            assert!(ids.iter().all(|&id| tokenizer.id_to_token(id).is_some()));
            tokenizer.decode(ids, !special).expect("they are its tokens");
        }
    }
    // What was read can be saved.
    tokenizer.to_string(false).expect("it can be written");
});
