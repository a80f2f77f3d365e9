//! GGUF files of the models that are made here.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};
use tempfile::TempDir;

use burn_lora_llm::{
    chat::Chat,
    gguf::{model, tokens},
    pretrained::{self, Holding},
};

use super::{Made, WORDS, assert_holds, broken::POINTER, refusal, scores, scores_of};
use crate::{backend::Plain, oracle::device};
use half::bf16;

/// The names in GGUF files. `*` is the number of a layer.
const NAMES: [(&str, &str); 12] = [
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("*.input_layernorm", "attn_norm"),
    ("*.self_attn.q_proj", "attn_q"),
    ("*.self_attn.k_proj", "attn_k"),
    ("*.self_attn.v_proj", "attn_v"),
    ("*.self_attn.o_proj", "attn_output"),
    ("*.post_attention_layernorm", "ffn_norm"),
    ("*.mlp.gate_proj", "ffn_gate"),
    ("*.mlp.up_proj", "ffn_up"),
    ("*.mlp.down_proj", "ffn_down"),
];

/// The fields of such a file. Their JSON says of which kind they are: whole numbers are `u32`, and others `f32`.
pub(super) fn fields() -> Map<String, Value> {
    let fields = json!({
        "general.architecture": "llama",
        "llama.context_length": 64,
        "llama.embedding_length": 16,
        "llama.feed_forward_length": 24,
        "llama.block_count": 2,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": WORDS,
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.token_type": WORDS.map(|_| 3),
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
    });
    fields.as_object().unwrap().clone()
}

/// The bytes of a GGUF file.
pub(super) fn bytes(made: &Made, fields: &Map<String, Value>, is_big: bool) -> Vec<u8> {
    bytes_with(made, fields, is_big, false)
}

/// The same, with matrices in bf16 if one says so.
fn bytes_with(
    made: &Made,
    fields: &Map<String, Value>,
    is_big: bool,
    matrices_in_bf16: bool,
) -> Vec<u8> {
    let order = |mut bytes: Vec<u8>| {
        if is_big {
            bytes.reverse();
        }
        bytes
    };
    let (u32, u64) =
        (|it: u32| order(it.to_le_bytes().to_vec()), |it: u64| order(it.to_le_bytes().to_vec()));
    let text = |it: &str| [u64(it.len() as u64), it.as_bytes().to_vec()].concat();
    // The number of the kind, and the value.
    let plain = |value: &Value| match value {
        Value::Bool(it) => (7, vec![u8::from(*it)]),
        Value::String(it) => (8, text(it)),
        Value::Number(it) if it.is_u64() => (4, u32(it.as_u64().unwrap() as u32)),
        other => (6, order((other.as_f64().unwrap() as f32).to_le_bytes().to_vec())),
    };
    let mut file = [b"GGUF".to_vec(), u32(3), u64(made.tensors.len() as u64)].concat();
    file.extend(u64(fields.len() as u64));
    for (name, value) in fields {
        let (kind, value) = match value {
            Value::Array(list) => {
                let (kinds, values): (Vec<_>, Vec<_>) = list.iter().map(plain).unzip();
                (
                    9,
                    [
                        u32(kinds.first().copied().unwrap_or(8)),
                        u64(list.len() as u64),
                        values.concat(),
                    ]
                    .concat(),
                )
            }
            value => plain(value),
        };
        file.extend([text(name), u32(kind), value].concat());
    }
    let mut values = Vec::new();
    for (name, (shape, numbers)) in &made.tensors {
        values.resize(values.len().next_multiple_of(32), 0_u8);
        file.extend([text(&name_of(name)), u32(shape.len() as u32)].concat());
        shape.iter().rev().for_each(|&size| file.extend(u64(size as u64)));
        let is_bf16 = matrices_in_bf16 && shape.len() == 2;
        file.extend([u32(if is_bf16 { 30 } else { 0 }), u64(values.len() as u64)].concat());
        values.extend(numbers.iter().flat_map(|&it| match is_bf16 {
            true => order(bf16::from_f32(it).to_le_bytes().to_vec()),
            false => order(it.to_le_bytes().to_vec()),
        }));
    }
    file.resize(file.len().next_multiple_of(32), 0);
    [file, values].concat()
}

fn name_of(name: &str) -> String {
    let Some(module) = name.strip_suffix(".weight") else { return name.to_owned() };
    let parts = module.strip_prefix("model.layers.").and_then(|it| it.split_once('.'));
    let (layer, rest) = parts.map_or((None, module), |(layer, rest)| (Some(layer), rest));
    let found = NAMES.iter().find(|(here, _)| here.strip_prefix("*.").unwrap_or(here) == rest);
    let module = found.map_or(rest, |(_, there)| there);
    layer.map_or(format!("{module}.weight"), |layer| format!("blk.{layer}.{module}.weight"))
}

/// Such a file with other fields.
pub(super) fn write(
    made: &Made,
    change: impl FnOnce(&mut Map<String, Value>),
) -> (TempDir, PathBuf) {
    let (dir, mut fields) = (TempDir::new().unwrap(), fields());
    change(&mut fields);
    let path = dir.path().join("model.gguf");
    fs::write(&path, bytes(made, &fields, false)).unwrap();
    (dir, path)
}

/// With a divisor for each of RoPE's frequencies.
pub(super) fn divided(divisors: [f32; 4]) -> Made {
    Made::new().with(|it| {
        it.tensors.insert("rope_freqs.weight".to_owned(), (vec![4], divisors.to_vec()));
    })
}

fn linear(fields: &mut Map<String, Value>) {
    fields.insert("llama.rope.scaling.type".to_owned(), json!("linear"));
    fields.insert("llama.rope.scaling.factor".to_owned(), json!(2.0));
}

#[test]
fn matrices_in_bf16_compute_the_same_kept_as_in_f32() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("model.gguf");
    let write = |made: &Made| fs::write(&path, bytes_with(made, &fields(), false, true)).unwrap();
    let made = Made::new().with_head();
    write(&made);
    assert!(pretrained::is_mostly_bf16(&path).unwrap());
    let load = |keep_16_bits| {
        let holding = Holding { quantize: None, keep_16_bits };
        pretrained::load_held::<Plain>(&path, holding, &device::<Plain>())
    };
    // Queries and keys have other places in the file.
    let [full, kept] = [false, true].map(|keeps| load(keeps).unwrap());
    let matrices = made.tensors.values().filter(|(shape, _)| shape.len() == 2);
    let numbers: usize = matrices.map(|(_, numbers)| numbers.len()).sum();
    assert_eq!((full.bytes_in_16_bits, kept.bytes_in_16_bits), (0, 2 * numbers));
    let [full, kept] = [full, kept].map(|it| scores_of(&it.llama));
    for (full, kept) in full.iter().zip(kept) {
        assert!((full - kept).abs() < 1e-5, "{kept}, not {full}");
    }
    assert!(full.iter().any(|it| it.abs() > 0.1));

    let name = "model.layers.1.self_attn.q_proj.weight";
    write(&made.with(|it| it.tensors.get_mut(name).unwrap().1[3] = f32::NAN));
    for (keeps, name) in [(false, name), (true, "blk.1.attn_q.weight")] {
        let error = load(keeps).err().expect("it has a number that is none");
        assert_holds(&error, name);
        assert_holds(&error, "model.gguf: ");
    }
}

/// The expected numbers are what llama.cpp gives for these fields.
#[test]
fn w6_llama_3_needs_no_merges_for_words_and_begins_with_its_first_token() {
    let tokens = ["<s>", "a", "b", "ab", "Ġ", "c", "Ġc", "d", "Ġcd"];
    let ids = |pre: &str, begins: Option<bool>, has_begin: bool| {
        let mut fields = json!({
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": ["a b", "Ġ c"], "tokenizer.ggml.token_type": [3, 1, 1, 1, 1, 1, 1, 1, 1],
        });
        if let Some(begins) = begins {
            fields["tokenizer.ggml.add_bos_token"] = json!(begins);
        }
        if has_begin {
            fields["tokenizer.ggml.bos_token_id"] = json!(0);
        }
        let tokenizer = tokens::tokenizer(fields.as_object().unwrap(), Path::new("x.gguf"))?;
        Ok::<_, String>(tokenizer.encode("ab cd", true).unwrap().get_ids().to_vec())
    };
    // `Ġcd` is a token that no merge makes.
    for pre in ["llama-bpe", "llama3", "llama-v3"] {
        assert_eq!(ids(pre, None, true).unwrap(), [0, 3, 8], "{pre}");
        assert_eq!(ids(pre, Some(true), true).unwrap(), [0, 3, 8], "{pre}");
        assert_eq!(ids(pre, Some(false), true).unwrap(), [3, 8], "{pre}");
        assert_eq!(ids(pre, None, false).unwrap(), [3, 8], "{pre}");
        assert_holds(
            &ids(pre, Some(true), false).unwrap_err(),
            "`tokenizer.ggml.bos_token_id` is missing",
        );
    }
    for pre in ["gpt-2", "qwen2", "smollm"] {
        assert_eq!(ids(pre, None, true).unwrap(), [3, 6, 7], "{pre}");
        assert_eq!(ids(pre, Some(true), true).unwrap(), [0, 3, 6, 7], "{pre}");
    }
}

#[test]
fn w7_divisors_and_a_linear_rule_both_count() {
    let (_dir, both) = write(&divided([1.0, 1.0, 2.0, 8.0]), linear);
    let (_dir, product) = write(&divided([2.0, 2.0, 4.0, 16.0]), |_| ());
    let frequencies = model::read(&both).unwrap().config.rope().frequencies;
    for (i, divisor) in [2.0, 2.0, 4.0, 16.0].into_iter().enumerate() {
        let expected = 10_000_f64.powf(-(i as f64) / 4.0) / divisor;
        assert!((frequencies[i] / expected - 1.0).abs() < 1e-12, "{frequencies:?}");
    }
    assert_eq!(scores(&both), scores(&product));
    // llama.cpp divides by the factor also if the file has no rule's name, or the factor's old one.
    let (_dir, named) = write(&Made::new(), linear);
    let expected = scores(&named);
    let (_dir, plain) = write(&Made::new(), |_| ());
    assert_ne!(scores(&plain), expected);
    for key in ["llama.rope.scaling.factor", "llama.rope.scale_linear"] {
        let (_dir, unnamed) = write(&Made::new(), |it| drop(it.insert(key.to_owned(), json!(2.0))));
        assert_eq!(scores(&unnamed), expected);
        let (_dir, none) = write(&Made::new(), |it| {
            it.insert(key.to_owned(), json!(2.0));
            it.insert("llama.rope.scaling.type".to_owned(), json!("none"));
        });
        assert_eq!(scores(&none), scores(&plain));
    }
}

#[test]
fn c1_a_gguf_file_says_how_many_tokens_the_model_knows() {
    let (_dir, path) = write(&Made::new(), |fields| {
        let tokens: Vec<_> = WORDS.into_iter().chain(["<|tool|>"]).collect();
        fields["tokenizer.ggml.tokens"] = json!(tokens);
        fields["tokenizer.ggml.token_type"] = json!(vec![3; 14]);
    });
    let error = Chat::read(&path).unwrap().prompt("<|tool|>").unwrap_err();
    assert_holds(&error, "the token `<|tool|>` has number 13, and the model knows those below 13");
}

#[test]
fn u2_unusual_gguf_files_are_read_or_named() {
    let (dir, path) = write(&Made::new(), |_| ());
    let expected = scores(&path);
    let big = dir.path().join("big.gguf");
    fs::write(&big, bytes(&Made::new(), &fields(), true)).unwrap();
    assert_holds(&refusal(&big), "big.gguf: its numbers are big-endian");

    // Ollama names files by what is in them.
    let unnamed = dir.path().join("sha256-00");
    fs::copy(&path, &unnamed).unwrap();
    assert_eq!(scores(&unnamed), expected);
    assert_eq!(Chat::read(&unnamed).unwrap().encode("<|im_end|>", false).unwrap(), [2]);
    for (start, problem) in [
        ("GGML", "a directory or a GGUF file is needed, and this is another file"),
        (POINTER, "this is a git-lfs pointer"),
        ("", "a directory or a GGUF file is needed"),
    ] {
        fs::write(&unnamed, start).unwrap();
        assert_holds(&refusal(&unnamed), &format!("sha256-00: {problem}"));
        assert_eq!(Chat::read(&unnamed).err(), Some(refusal(&unnamed)));
    }
    for (start, problem) in
        [("GGML", "it is not a GGUF file"), (POINTER, "this is a git-lfs pointer")]
    {
        fs::write(&path, start).unwrap();
        assert_holds(&refusal(&path), &format!("model.gguf: {problem}"));
    }
}

#[test]
fn what_is_no_number_is_named() {
    for key in fields().keys().filter(|key| key.starts_with("llama.")) {
        for (value, problem) in
            [(json!("NaN"), "\"NaN\" is no number"), (json!(true), "true is no number")]
        {
            let (_dir, path) = write(&Made::new(), |it| it[key] = value);
            assert_holds(&refusal(&path), &format!("model.gguf: `{key}`: {problem}"));
        }
    }
    let (_dir, path) = write(&Made::new(), |it| it["llama.block_count"] = json!(1.5));
    assert_holds(&refusal(&path), "model.gguf: `llama.block_count`: 1.5 is no whole number");
}

/// Rows that are no heads.
#[test]
fn rows_of_queries_and_keys_are_checked_before_they_are_sorted() {
    for (name, rows) in [
        ("model.layers.1.self_attn.q_proj.weight", 6),
        ("model.layers.1.self_attn.k_proj.weight", 3),
    ] {
        let made = Made::new().with(|it| {
            let width = it.tensors[name].0[1];
            it.tensors.insert(name.to_owned(), (vec![rows, width], vec![0.5; rows * width]));
        });
        let (_dir, path) = write(&made, |_| ());
        assert_holds(&refusal(&path), &format!("and has {rows}"));
    }
}

#[test]
fn sizes_may_be_lists_of_the_same_for_each_layer() {
    let expected = scores(&write(&Made::new(), |_| ()).1);
    for key in fields().keys().filter(|key| key.starts_with("llama.")) {
        let (_dir, path) = write(&Made::new(), |it| it[key] = json!([it[key], it[key]]));
        assert_eq!(scores(&path), expected);
        let (_dir, path) = write(&Made::new(), |it| {
            it[key] = if it[key].is_u64() { json!([it[key], 7]) } else { json!([it[key], 0.5]) };
        });
        assert_holds(&refusal(&path), &format!("model.gguf: `{key}`: layers that differ in it"));
    }
}
