//! Tokenizers in GGUF files. `sentencepiece`, `transformers` and `tokenizers` made the expected tokens.

use std::{fs, path::Path};

use burn_lora_llm::gguf::tokens;
use serde_json::{Map, Value, json};
use tokenizers::Tokenizer;

use super::assert_holds;

fn fixture(name: &str) -> Value {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gguf/fixtures");
    serde_json::from_str(&fs::read_to_string(dir.join(name)).unwrap()).unwrap()
}

fn fields(value: &Value) -> Map<String, Value> {
    value.as_object().unwrap().clone()
}

fn read(fields: &Map<String, Value>) -> Result<Tokenizer, String> {
    tokens::tokenizer(fields, Path::new("x.gguf"))
}

/// The tokens that the fixtures have in two digits of base 36 each.
fn ids(short: &Value) -> Vec<u32> {
    let digits = short.as_str().unwrap();
    let two = |at| u32::from_str_radix(&digits[at..at + 2], 36).unwrap();
    (0..digits.len()).step_by(2).map(two).collect()
}

fn texts(value: &Value) -> Vec<&str> {
    value.as_array().unwrap().iter().map(|it| it.as_str().unwrap()).collect()
}

#[track_caller]
fn assert_encodes(tokenizer: &Tokenizer, text: &str, expected: &[u32]) {
    let encoding = tokenizer.encode(text, false).unwrap();
    assert_eq!(encoding.get_ids(), expected, "{text:?}, as {:?}", encoding.get_tokens());
}

/// SentencePiece's tokens of all texts, and the texts of the tokens.
#[track_caller]
fn assert_is_sentencepiece(name: &str) {
    let (fixture, all) = (fixture(name), fixture("texts.json"));
    let tokenizer = read(&fields(&fixture["fields"])).unwrap();
    let all = texts(&all);
    assert_eq!(all.len(), 1000);
    for (index, (text, expected)) in all.iter().zip(fixture["ids"].as_array().unwrap()).enumerate()
    {
        let expected = ids(expected);
        assert_encodes(&tokenizer, text, &expected);
        let decoded = fixture["decoded"][index.to_string()].as_str().unwrap_or(text);
        assert_eq!(tokenizer.decode(&expected, false).unwrap(), decoded, "{text:?}");
    }
    // Special tokens are looked for as `transformers` does it.
    for case in fixture["special"].as_array().unwrap() {
        let (text, expected) = (case[0].as_str().unwrap(), ids(&case[1]));
        assert_encodes(&tokenizer, text, &expected);
        assert_eq!(tokenizer.decode(&expected, true).unwrap(), case[2], "{text:?}");
    }
}

#[test]
fn pieces_with_a_space_before_the_text_are_those_of_sentencepiece() {
    assert_is_sentencepiece("llama.json");
}

#[test]
fn pieces_without_spaces_in_a_row_are_those_of_sentencepiece() {
    assert_is_sentencepiece("single.json");
}

#[test]
fn pieces_with_tokens_of_spaces_are_those_of_sentencepiece() {
    assert_is_sentencepiece("gemma.json");
}

#[test]
fn a_saved_tokenizer_of_pieces_is_the_same() {
    let all = fixture("texts.json");
    for name in ["llama.json", "gemma.json"] {
        let tokenizer = read(&fields(&fixture(name)["fields"])).unwrap();
        let saved: Tokenizer = tokenizer.to_string(false).unwrap().parse().unwrap();
        for text in &texts(&all)[..100] {
            let [own, other] = [&tokenizer, &saved].map(|it| it.encode(*text, true).unwrap());
            assert_eq!(own.get_ids(), other.get_ids());
        }
    }
}

#[test]
fn texts_of_pieces_begin_and_end_as_the_file_says() {
    let fixture = fixture("llama.json");
    let encoded = |change: &[(&str, Value)]| {
        let mut fields = fields(&fixture["fields"]);
        for (key, value) in change {
            fields.insert(format!("tokenizer.ggml.{key}"), value.clone());
        }
        let ids = read(&fields)?.encode("", true).unwrap().get_ids().to_vec();
        Ok::<_, String>(ids)
    };
    assert_eq!(encoded(&[]).unwrap(), [1]);
    assert_eq!(encoded(&[("add_bos_token", json!(false))]).unwrap(), [0; 0]);
    assert_eq!(encoded(&[("add_eos_token", json!(true))]).unwrap(), [1, 2]);
    let only = [("add_bos_token", json!(false)), ("add_eos_token", json!(true))];
    assert_eq!(encoded(&only).unwrap(), [2]);
    let same = [("add_eos_token", json!(true)), ("eos_token_id", json!(1))];
    assert_eq!(encoded(&same).unwrap(), [1, 1]);
    let error = encoded(&[("add_eos_token", json!(true)), ("eos_token_id", json!(9999))]);
    assert_holds(&error.unwrap_err(), "x.gguf: `tokenizer.ggml.eos_token_id` is missing");
    // The numbers that llama.cpp takes if there are none.
    let mut bare = fields(&fixture["fields"]);
    for name in ["bos", "eos", "unknown"] {
        bare.remove(&format!("tokenizer.ggml.{name}_token_id"));
    }
    bare.insert("tokenizer.ggml.add_eos_token".to_owned(), json!(true));
    assert_eq!(read(&bare).unwrap().encode("", true).unwrap().get_ids(), [1, 2]);
}

/// Phi-3's tokens take the white space after them.
#[test]
fn special_tokens_of_phi_3_take_the_space_after_them() {
    let fixture = fixture("llama.json");
    let encoded = |key: &str, value: &str, text: &str| {
        let mut fields = fields(&fixture["fields"]);
        fields.insert(key.to_owned(), json!(value));
        read(&fields).unwrap().encode(text, false).unwrap().get_ids().to_vec()
    };
    for (key, value) in [("general.architecture", "phi3"), ("general.name", "Phi-3 mini")] {
        let plain = encoded("general.name", "x", "</s>ba</s>ba");
        assert_eq!(encoded(key, value, "</s>\n ba</s>  ba"), plain);
        let begins = |text: &str| encoded(key, value, text);
        assert_ne!(begins("<s> ba"), begins("<s>ba"));
    }
}

#[test]
fn byte_pairs_are_divided_as_the_name_says() {
    let fixture = fixture("divisions.json");
    let kinds = vec![1; fixture["tokens"].as_array().unwrap().len()];
    let with = |name: &str| {
        read(&fields(&json!({
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.tokens": fixture["tokens"],
            "tokenizer.ggml.merges": fixture["merges"], "tokenizer.ggml.token_type": kinds,
        })))
    };
    let expected = fixture["ids"].as_object().unwrap();
    for (name, others) in [
        ("gpt-2", &["olmo", "exaone4", "granite-docling"][..]),
        ("smollm", &["refact", "starcoder", "command-r"]),
        ("falcon", &[]),
        ("default", &[]),
        ("llama-bpe", &["llama3", "falcon3", "lfm2"]),
        ("dbrx", &["smaug-bpe", "glm4"]),
        ("qwen2", &["deepseek-r1-qwen", "stablelm2", "megrez"]),
        ("qwen35", &[]),
        ("tekken", &[]),
        ("gpt-4o", &["llama4"]),
        ("deepseek-v3", &["hunyuan-dense"]),
    ] {
        for name_or_other in [name].iter().chain(others) {
            let tokenizer = with(name_or_other).unwrap();
            let ids_of_all = expected[name].as_array().unwrap();
            assert_eq!(ids_of_all.len(), fixture["texts"].as_array().unwrap().len());
            for (text, expected) in texts(&fixture["texts"]).into_iter().zip(ids_of_all) {
                let expected = ids(expected);
                assert_encodes(&tokenizer, text, &expected);
                assert_eq!(tokenizer.decode(&expected, false).unwrap(), text);
            }
        }
    }
    assert_eq!(expected.len(), 11);
    let error = with("gpt-9").unwrap_err();
    assert_eq!(error, "x.gguf: `tokenizer.ggml.pre` \"gpt-9\" is not supported");
}

#[test]
fn words_that_are_tokens_need_no_merges_and_texts_begin_by_the_division() {
    let tokens = ["<s>", "a", "b", "c", "abc", "</s>"];
    let ids = |pre: &str, change: &[(&str, Value)]| {
        let mut fields = fields(&json!({
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": [], "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 5,
        }));
        for (key, value) in change {
            fields.insert(format!("tokenizer.ggml.{key}"), value.clone());
        }
        read(&fields).unwrap().encode("abc", true).unwrap().get_ids().to_vec()
    };
    for pre in ["llama-bpe", "tekken", "falcon3", "pixtral"] {
        assert_eq!(ids(pre, &[]), [0, 4], "{pre}");
        assert_eq!(ids(pre, &[("add_bos_token", json!(false))]), [4], "{pre}");
    }
    for pre in ["dbrx", "smaug-bpe", "gpt-4o", "qwen2", "refact", "deepseek-v3", "default"] {
        assert_eq!(ids(pre, &[]), [1, 2, 3], "{pre}");
        let both = [("add_bos_token", json!(true)), ("add_eos_token", json!(true))];
        assert_eq!(ids(pre, &both), [0, 1, 2, 3, 5], "{pre}");
    }
}

#[test]
fn answers_end_at_tokens_that_are_named_or_known_by_name() {
    let ends = |change: Value| {
        let tokens = [
            "a",
            "b",
            "<|im_end|>",
            "<end_of_turn>",
            "</s>",
            "<|eot_id|>",
            "c",
            "<|eom_id|>",
            "<|end|>",
            "d",
        ];
        let mut fields = fields(&json!({
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": [],
            "tokenizer.ggml.token_type": [1, 1, 3, 4, 3, 1, 3, 3, 3, 1],
        }));
        fields.extend(change.as_object().unwrap().clone());
        let mut ends = tokens::ends(&fields, &read(&fields).unwrap());
        ends.sort_unstable();
        ends.dedup();
        ends
    };
    let known = [2, 3, 4, 5, 7, 8];
    assert_eq!(ends(json!({})), known);
    // In Gemma it is a tag of HTML.
    let kinds = json!({"tokenizer.ggml.token_type": [1, 1, 3, 4, 4, 1, 3, 3, 3, 1]});
    assert_eq!(ends(kinds), [2, 3, 5, 7, 8]);
    for key in ["eos", "eot", "eom"] {
        let key = format!("tokenizer.ggml.{key}_token_id");
        assert_eq!(ends(json!({ key: 6 })), [2, 3, 4, 5, 6, 7, 8]);
    }
    // No kinds of tokens: only these are special.
    assert_eq!(ends(json!({"tokenizer.ggml.token_type": null})), known);
}

#[test]
fn tokens_without_kinds_are_normal() {
    let mut fields = fields(&json!({
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["<s>", "<|im_end|>", "<", "s", ">", ""],
        "tokenizer.ggml.merges": [],
    }));
    let tokenizer = read(&fields).unwrap();
    assert_encodes(&tokenizer, "<s><|im_end|>", &[2, 3, 4, 1]);
    fields.insert("tokenizer.ggml.token_type".to_owned(), json!([3, 3, 1, 1, 1, 5]));
    assert_encodes(&read(&fields).unwrap(), "<s><|im_end|>", &[0, 1]);
    assert_eq!(tokenizer.id_to_token(5).unwrap(), "[EMPTY_5]");
}

#[test]
fn malformed_fields_of_tokens_are_named() {
    let pieces = fixture("llama.json")["fields"].clone();
    let pairs = json!({
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b", "ab"], "tokenizer.ggml.merges": ["a b"],
    });
    let refused = |base: &Value, key: &str, value: Value| {
        let mut fields = fields(base);
        match value {
            Value::Null => drop(fields.remove(&format!("tokenizer.ggml.{key}"))),
            value => drop(fields.insert(format!("tokenizer.ggml.{key}"), value)),
        }
        read(&fields).err().unwrap_or_else(|| panic!("{key} is read"))
    };
    let mut scores = pieces["tokenizer.ggml.scores"].clone();
    let index =
        pieces["tokenizer.ggml.tokens"].as_array().unwrap().iter().position(|it| it == "▁▁");
    scores[index.unwrap()] = json!("NaN");
    for (base, key, value, problem) in [
        (&pairs, "tokens", Value::Null, "`tokenizer.ggml.tokens` is missing"),
        (&pairs, "tokens", json!("a"), "`tokenizer.ggml.tokens` must be a list"),
        (&pairs, "tokens", json!(["a", 3]), "`tokenizer.ggml.tokens` must hold texts"),
        (
            &pairs,
            "tokens",
            json!(["a", "b", "ab", "b"]),
            "`tokenizer.ggml.tokens`: `b` is there twice, as token 1 and 3",
        ),
        (&pairs, "merges", Value::Null, "`tokenizer.ggml.merges` is missing"),
        (&pairs, "merges", json!(["ab"]), "`tokenizer.ggml.merges`: `ab` is not a pair"),
        (&pairs, "merges", json!(["a c"]), "`tokenizer.ggml.merges`: "),
        (&pairs, "merges", json!(["b a"]), "`tokenizer.ggml.merges`: "),
        (
            &pairs,
            "token_type",
            json!([1, 1]),
            "`tokenizer.ggml.token_type` has 2 values, and there are 3",
        ),
        (&pairs, "token_type", json!(1), "`tokenizer.ggml.token_type` must be a list"),
        (&pairs, "pre", json!(1), "`tokenizer.ggml.pre` must be a text"),
        (&pieces, "scores", Value::Null, "`tokenizer.ggml.scores` is missing"),
        (
            &pieces,
            "scores",
            json!([0.0]),
            "`tokenizer.ggml.scores` has 1 values, and there are 900",
        ),
        (&pieces, "scores", scores, "`tokenizer.ggml.scores` must hold numbers"),
    ] {
        assert_holds(&refused(base, key, value), &format!("x.gguf: {problem}"));
    }
    let mut long = pieces.clone();
    long["tokenizer.ggml.tokens"][899] = json!("a".repeat(300));
    let error = read(&fields(&long)).unwrap_err();
    assert_eq!(error, "x.gguf: `tokenizer.ggml.tokens`: a token has 300 bytes");
    for kind in ["t5", "bert", "rwkv", "plamo2"] {
        let error = refused(&pairs, "model", json!(kind));
        assert_holds(
            &error,
            &format!("x.gguf: a tokenizer of the kind \"{kind}\" is not supported"),
        );
    }
}
