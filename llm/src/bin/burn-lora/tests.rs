//! Tests, and what they share: small models, their texts, and a tokenizer of words.

mod answers;
mod relatives;
mod texts;
mod training;

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
};

use burn::{
    module::AutodiffModule,
    optim::GradientsParams,
    tensor::{Tensor, TensorData},
};
use burn_lora::{
    LoraConfig, LoraModule,
    train::{Alone, Replicas, ThreadReplica},
};
use burn_lora_llm::{
    chat::Chat,
    cli::replicas::Counted,
    config::LlamaConfig,
    data::{self, Batch, Reading, Text, Texts, deal, deal_to, pack, tokens},
    generate::{Options, Sampling, generate},
    gguf::tokens as tokens_of_gguf,
    llama::Llama,
    loss::{cross_entropy, evaluate},
    merged, pretrained,
};

use crate::{
    backend::{Plain, Train},
    generated,
    remembered::Remembered,
    reviews,
    train::{History, Keeping, Recipe, clip, norm, train},
};
use rand::{SeedableRng, rngs::StdRng};
use serde::Deserialize;
use serde_json::json;
use tempfile::TempDir;
use tokenizers::{
    Tokenizer, models::wordlevel::WordLevel, pre_tokenizers::whitespace::WhitespaceSplit,
};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/llama/fixtures").join(name)
}

fn tiny<B: burn::tensor::backend::Backend>(name: &str) -> Llama<B> {
    pretrained::load(&fixture(name), None, &Default::default()).unwrap().llama
}

const WORDS: [&str; 11] =
    ["<end>", "user:", "assistant:", "a", "b", "c", "d", "e", "f", "negative", "positive"];

/// A tokenizer of words, and a template.
fn chat() -> (TempDir, Chat) {
    let dir = tempfile::tempdir().unwrap();
    let words = WORDS.iter().zip(0..).map(|(word, id)| (word.to_string(), id));
    let words: HashMap<_, _> = words.collect();
    let model = WordLevel::builder().vocab(words.into_iter().collect()).unk_token("f".to_owned());
    let mut tokenizer = Tokenizer::new(model.build().unwrap());
    tokenizer.with_pre_tokenizer(Some(WhitespaceSplit));
    tokenizer.save(dir.path().join("tokenizer.json"), false).unwrap();
    let template = "{% for it in messages %}{{ it.role }}: {{ it.content.strip() }} <end> {% endfor %}\
                    {% if add_generation_prompt %}assistant: {% endif %}";
    let settings = json!({"eos_token": {"content": "<end>"}, "chat_template": template});
    fs::write(dir.path().join("tokenizer_config.json"), settings.to_string()).unwrap();
    let chat = Chat::read(dir.path()).unwrap();
    (dir, chat)
}

/// Texts of a fixture, and the logarithms of the probabilities that Python gives their next tokens.
fn texts_of(name: &str) -> (Vec<Text>, Vec<Vec<f64>>) {
    #[derive(Deserialize)]
    struct Expected {
        ids: Vec<Vec<u32>>,
        logits: Vec<Vec<f64>>,
    }
    let json = fs::read(fixture(name).join("expected.json")).unwrap();
    let expected: Expected = serde_json::from_slice(&json).unwrap();
    let length = expected.ids[0].len();
    let of_next = |text: usize, at: usize| {
        let row = &expected.logits[text * length + at];
        let sum: f64 = row.iter().map(|score| score.exp()).sum();
        row[expected.ids[text][at + 1] as usize] - sum.ln()
    };
    let probabilities =
        (0..2).map(|text| (0..length - 1).map(|at| of_next(text, at)).collect()).collect();
    let texts = expected.ids.into_iter().map(|ids| Text { ids, given: 0 }).collect();
    (texts, probabilities)
}

#[track_caller]
fn assert_near(found: f64, expected: f64) {
    assert!((found - expected).abs() <= 1e-4 * expected.abs(), "{found}, not {expected}");
}
