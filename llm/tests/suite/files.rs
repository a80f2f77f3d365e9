//! What the files of language models may be like. The models are made here, of weights that are only noise.

mod broken;
mod gguf;
mod headers;
mod merging;
mod split;
mod table;
mod texts;
mod tokens;
mod variants;

use std::{collections::BTreeMap, fs, path::Path};

use burn::tensor::{Int, Tensor, TensorData};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokenizers::{
    AddedToken, Tokenizer, models::wordlevel::WordLevel,
    pre_tokenizers::whitespace::WhitespaceSplit,
};

use burn_lora_llm::{
    chat::{Chat, Message},
    data::{self, Reading, Text},
    llama::Llama,
    pretrained,
};

use crate::{backend::Plain, oracle::device};

const CHATML: &str = "{% for it in messages %}<|im_start|> {{ it.role }} {{ it.content }} <|im_end|> {% endfor %}\
                      {% if add_generation_prompt %}<|im_start|> assistant {% endif %}";

/// The special ones come first.
const WORDS: [&str; 13] = [
    "<s>",
    "<|im_start|>",
    "<|im_end|>",
    "</s>",
    "user",
    "assistant",
    "the",
    "dog",
    "lives",
    "in",
    "a",
    "house",
    "?",
];

/// A small model, before it is written.
pub struct Made {
    config: Value,
    /// `tokenizer_config.json`, unless it is `null`.
    settings: Value,
    tokenizer: Tokenizer,
    tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl Made {
    /// A decoder of Llama's with two layers, whose table of embeddings is the head.
    pub fn new() -> Self {
        let config = json!({
            "model_type": "llama", "vocab_size": WORDS.len(), "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 64, "tie_word_embeddings": true, "hidden_act": "silu",
            "rope_theta": 10000.0, "dtype": "float32",
        });
        let settings = json!({
            "bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}, "chat_template": CHATML,
        });
        let words = WORDS.iter().zip(0..).map(|(word, id)| (word.to_string(), id));
        let model = WordLevel::builder().vocab(words.collect()).unk_token("?".to_owned()).build();
        let mut tokenizer = Tokenizer::new(model.unwrap());
        tokenizer.with_pre_tokenizer(Some(WhitespaceSplit));
        tokenizer.add_special_tokens(&WORDS.map(|it| AddedToken::from(it, true))[..4]);
        let mut tensors = BTreeMap::new();
        let mut add = |name: String, shape: &[usize]| {
            let numbers = noise(shape.iter().product(), tensors.len());
            tensors.insert(name, (shape.to_vec(), numbers));
        };
        add("model.embed_tokens.weight".to_owned(), &[WORDS.len(), 16]);
        add("model.norm.weight".to_owned(), &[16]);
        for layer in 0..2 {
            for (name, shape) in [
                ("input_layernorm", &[16][..]),
                ("self_attn.q_proj", &[16, 16]),
                ("self_attn.k_proj", &[8, 16]),
                ("self_attn.v_proj", &[8, 16]),
                ("self_attn.o_proj", &[16, 16]),
                ("post_attention_layernorm", &[16]),
                ("mlp.gate_proj", &[24, 16]),
                ("mlp.up_proj", &[24, 16]),
                ("mlp.down_proj", &[16, 24]),
            ] {
                add(format!("model.layers.{layer}.{name}.weight"), shape);
            }
        }
        Self { config, settings, tokenizer, tensors }
    }

    fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// With a head of its own in the files, whatever the configuration says.
    fn with_head(self) -> Self {
        let head = (vec![WORDS.len(), 16], noise(WORDS.len() * 16, 99));
        self.with(|it| drop(it.tensors.insert("lm_head.weight".to_owned(), head)))
    }

    /// Writes Hugging Face's files.
    pub fn write(&self) -> TempDir {
        self.write_as(|_| Dtype::F32)
    }

    /// The same, with weights of these types, which must hold their values.
    fn write_as(&self, dtype: impl Fn(&str) -> Dtype) -> TempDir {
        let dir = TempDir::new().unwrap();
        let write = |name: &str, text: String| fs::write(dir.path().join(name), text).unwrap();
        write("config.json", self.config.to_string());
        write("tokenizer.json", self.tokenizer.to_string(false).unwrap());
        if !self.settings.is_null() {
            write("tokenizer_config.json", self.settings.to_string());
        }
        write_tensors(&dir.path().join("model.safetensors"), &self.tensors, dtype);
        dir
    }

    /// The same in parts of so many tensors, without an index.
    fn write_in_parts(&self, size: usize) -> TempDir {
        let dir = self.write();
        fs::remove_file(dir.path().join("model.safetensors")).unwrap();
        let tensors = Vec::from_iter(self.tensors.clone());
        let parts = tensors.chunks(size);
        for (number, part) in (1..).zip(parts.clone()) {
            let name = format!("model-{number:05}-of-{:05}.safetensors", parts.len());
            let tensors = part.iter().cloned().collect();
            write_tensors(&dir.path().join(name), &tensors, |_| Dtype::F32);
        }
        dir
    }
}

/// Writes a safetensors file, with weights of these types, which must hold their values.
fn write_tensors(
    path: &Path,
    tensors: &BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    dtype: impl Fn(&str) -> Dtype,
) {
    let bytes = tensors.iter().map(|(name, (shape, numbers))| {
        let bytes = numbers.iter().flat_map(|&number| match dtype(name) {
            Dtype::F16 => half::f16::from_f32(number).to_le_bytes().to_vec(),
            Dtype::BF16 => half::bf16::from_f32(number).to_le_bytes().to_vec(),
            _ => number.to_le_bytes().to_vec(),
        });
        (name, shape.clone(), bytes.collect::<Vec<_>>())
    });
    let bytes: Vec<_> = bytes.collect();
    let views = bytes.iter().map(|(name, shape, bytes)| {
        (name, TensorView::new(dtype(name), shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// Numbers between -0.5 and 0.5, other ones for each seed.
fn noise(count: usize, seed: usize) -> Vec<f32> {
    let mut state = 1234567 + 7919 * seed as u32;
    let next = |_| {
        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..count).map(next).collect()
}

/// The scores of all tokens of a text.
#[track_caller]
fn scores(model: &Path) -> Vec<f32> {
    scores_of(&pretrained::load::<Plain>(model, None, &device::<Plain>()).unwrap().llama)
}

fn scores_of(llama: &Llama<Plain>) -> Vec<f32> {
    let ids = TensorData::new(vec![6_i32, 7, 8, 9, 10, 11, 1, 3], [1, 8]);
    let ids = Tensor::<Plain, 2, Int>::from_data(ids, &device::<Plain>());
    let hidden = llama.hidden(ids, &llama.positions(8, &device::<Plain>()));
    llama.logits(hidden).into_data().to_vec().unwrap()
}

/// Why a model cannot be read.
#[track_caller]
fn refusal(model: &Path) -> String {
    pretrained::load::<Plain>(model, None, &device::<Plain>()).err().expect("it cannot be loaded")
}

#[track_caller]
fn assert_holds(text: &str, expected: &str) {
    assert!(text.contains(expected), "`{expected}` is not in: {text}");
}

/// The texts of a file of these lines.
fn read(model: &Path, lines: &str) -> burn_lora_llm::Result<Vec<Text>> {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("train.jsonl");
    fs::write(&path, lines).unwrap();
    let reading = Reading { max_length: 100, mask_prompt: false };
    Ok(data::read(&path, &Chat::read(model)?, &reading)?.texts)
}

fn user(content: &str) -> Message {
    Message { role: "user".to_owned(), content: content.to_owned() }
}
