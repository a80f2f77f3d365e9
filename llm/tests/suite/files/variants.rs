//! The same model in other words: all variants give the same tokens and scores.

use std::fs;

use serde_json::{Value, json};
use tokenizers::{PaddingParams, PaddingStrategy, TruncationParams};

use burn_lora_llm::{
    chat::Chat,
    config::LlamaConfig,
    pretrained::{self, Holding},
    sst2,
};
use safetensors::Dtype;

use super::{CHATML, Made, assert_holds, read, refusal, scores, scores_of, user};
use crate::{backend::Plain, oracle::device};

const TEXT: &str = r#"{"text": "the dog lives in a house the dog lives in a house ?"}"#;

#[test]
fn w1_truncation_and_padding_of_a_tokenizer_are_ignored() {
    let plain = read(Made::new().write().path(), TEXT).unwrap();
    assert_eq!(plain[0].ids, [6, 7, 8, 9, 10, 11, 6, 7, 8, 9, 10, 11, 12, 2]);
    let cut = Made::new().with(|it| {
        let truncation = TruncationParams { max_length: 8, ..Default::default() };
        it.tokenizer.with_truncation(Some(truncation)).unwrap();
    });
    let padded = Made::new().with(|it| {
        let strategy = PaddingStrategy::Fixed(64);
        it.tokenizer.with_padding(Some(PaddingParams { strategy, ..Default::default() }));
    });
    for made in [cut, padded] {
        assert_eq!(read(made.write().path(), TEXT).unwrap(), plain);
        let chat = Chat::new(made.tokenizer.clone(), CHATML, "<|im_end|>").unwrap();
        let text = "the dog lives in a house the dog lives";
        assert_eq!(chat.encode(text, true).unwrap(), [6, 7, 8, 9, 10, 11, 6, 7, 8]);
    }
}

#[test]
fn w2_a_head_beside_a_tied_table_is_used() {
    let tied = scores(Made::new().write().path());
    let with_head = Made::new().with_head();
    let untied = Made::new().with_head().with(|it| it.config["tie_word_embeddings"] = json!(false));
    let expected = scores(untied.write().path());
    assert_ne!(tied, expected);
    assert_eq!(scores(with_head.write().path()), expected);
    // The table again is not another head.
    let again = Made::new().with(|it| {
        let table = it.tensors["model.embed_tokens.weight"].clone();
        it.tensors.insert("lm_head.weight".to_owned(), table);
    });
    assert_eq!(scores(again.write().path()), tied);
    let wrong = Made::new().with_head().with(|it| {
        it.tensors.insert("lm_head.weight".to_owned(), (vec![3, 16], vec![0.5; 48]));
    });
    assert_holds(&refusal(wrong.write().path()), "`lm_head.weight` must be of shape [13, 16]");
}

#[test]
fn r4_a_tied_table_may_have_the_name_of_the_head() {
    let renamed = Made::new().with(|it| {
        let table = it.tensors.remove("model.embed_tokens.weight").unwrap();
        it.tensors.insert("lm_head.weight".to_owned(), table);
    });
    assert_eq!(scores(renamed.write().path()), scores(Made::new().write().path()));
    let untied = renamed.with(|it| it.config["tie_word_embeddings"] = json!(false));
    assert_holds(
        &refusal(untied.write().path()),
        "`model.embed_tokens.weight` is [13, 16], and it is missing",
    );
}

#[test]
fn several_files_need_no_index() {
    let expected = scores(Made::new().write().path());
    let dir = Made::new().write_in_parts(8);
    assert_eq!(scores(dir.path()), expected);
    let part = |number: usize, count: usize| {
        dir.path().join(format!("model-{number:05}-of-{count:05}.safetensors"))
    };
    assert_eq!(pretrained::weight_files(dir.path()).unwrap(), [1, 2, 3].map(|it| part(it, 3)));

    // A tensor in two parts, a part that is missing, and parts of another model.
    let saved = fs::read(part(2, 3)).unwrap();
    fs::copy(part(1, 3), part(2, 3)).unwrap();
    let found = refusal(dir.path());
    assert_holds(&found, "model-00002-of-00003.safetensors: `model.embed_tokens.weight` is in");
    fs::remove_file(part(2, 3)).unwrap();
    assert_holds(&refusal(dir.path()), "model-00002-of-00003.safetensors: it is missing");
    fs::write(part(2, 3), &saved).unwrap();
    fs::write(part(2, 4), &saved).unwrap();
    assert_holds(&refusal(dir.path()), "parts of a model in 3 files and of one in 4");
    // The one file of a whole model counts before them, as in `transformers`.
    fs::copy(
        Made::new().write().path().join("model.safetensors"),
        dir.path().join("model.safetensors"),
    )
    .unwrap();
    assert_eq!(scores(dir.path()), expected);
}

#[test]
fn matrices_of_16_bits_compute_the_same_kept_as_in_f32() {
    for dtype in [Dtype::F16, Dtype::BF16] {
        let made = Made::new().with_head().with(|it| {
            for number in it.tensors.values_mut().flat_map(|(_, numbers)| numbers) {
                *number = half::bf16::from_f32(*number).to_f32();
            }
        });
        let dir = made.write_as(|_| dtype);
        let load = |keep_16_bits| {
            let holding = Holding { quantize: None, keep_16_bits };
            let loaded = pretrained::load_held::<Plain>(dir.path(), holding, &device::<Plain>());
            let loaded = loaded.unwrap();
            (loaded.bytes_in_16_bits, scores_of(&loaded.llama))
        };
        let matrices = made.tensors.values().filter(|(shape, _)| shape.len() == 2);
        let numbers: usize = matrices.map(|(_, numbers)| numbers.len()).sum();
        let ((none, full), (bytes, kept)) = (load(false), load(true));
        assert_eq!((none, bytes), (0, 2 * numbers));
        for (full, kept) in full.iter().zip(kept) {
            assert!((full - kept).abs() < 1e-5, "{dtype:?}: {kept}, not {full}");
        }
    }
}

#[test]
fn w4_of_several_templates_the_default_is_used() {
    let rendered = |template: Value| {
        let dir = Made::new().with(|it| it.settings["chat_template"] = template).write();
        let chat = Chat::read(dir.path()).unwrap();
        (chat.render(&[user("a dog")], true), chat.prompt("a dog"))
    };
    let expected = rendered(json!(CHATML));
    assert_eq!(
        expected.0.as_deref(),
        Ok("<|im_start|> user a dog <|im_end|> <|im_start|> assistant ")
    );
    let tools = json!({"name": "tool_use", "template": "{{ tools }}"});
    let default = json!({"name": "default", "template": CHATML});
    assert_eq!(rendered(json!([tools, default])), expected);
    for (template, problem) in [
        (
            json!([tools]),
            "`chat_template` has the templates `tool_use`, and none that is named `default`",
        ),
        (json!(3), "`chat_template` must be a template, or a list of them"),
    ] {
        let (text, prompt) = rendered(template);
        assert_holds(&text.unwrap_err(), problem);
        assert_holds(&prompt.unwrap_err(), problem);
    }
    // The file comes first.
    let dir = Made::new().write();
    fs::write(dir.path().join("chat_template.jinja"), "{{ messages[0].content }}").unwrap();
    let chat = Chat::read(dir.path()).unwrap();
    assert_eq!(chat.render(&[user("a dog")], true).unwrap(), "a dog");
}

#[test]
fn w5_the_configuration_says_how_texts_end_if_the_tokenizer_does_not() {
    let text = r#"{"text": "the dog"}"#;
    let ids = |made: Made, files: &[(&str, Value)]| {
        let dir = made.write();
        for (file, json) in files {
            fs::write(dir.path().join(file), json.to_string()).unwrap();
        }
        let chat = Chat::read(dir.path()).unwrap();
        let stops: Vec<_> = (0..13).filter(|&id| chat.stops(id)).collect();
        (read(dir.path(), text).unwrap()[0].ids.clone(), stops)
    };
    let bare = || Made::new().with(|it| it.settings = Value::Null);
    let in_config = |id: Value| bare().with(|it| it.config["eos_token_id"] = id);
    assert_eq!(ids(Made::new(), &[]), (vec![6, 7, 2], vec![2]));
    assert_eq!(ids(bare(), &[]), (vec![6, 7], vec![]));
    assert_eq!(ids(in_config(json!(2)), &[]), (vec![6, 7, 2], vec![2]));
    // The first of several ends texts, and all of them answers.
    assert_eq!(ids(in_config(json!([3, 2])), &[]), (vec![6, 7, 3], vec![2, 3]));
    let generation = ("generation_config.json", json!({"eos_token_id": 2}));
    assert_eq!(ids(bare(), &[generation]), (vec![6, 7, 2], vec![2]));
    let map = ("special_tokens_map.json", json!({"eos_token": {"content": "</s>"}}));
    assert_eq!(ids(in_config(json!(2)), &[map]), (vec![6, 7, 3], vec![2, 3]));
    // A name that is no token says nothing.
    let unknown = in_config(json!(2)).with(|it| it.settings = json!({"eos_token": "<end>"}));
    assert_eq!(ids(unknown, &[]), (vec![6, 7, 2], vec![2]));

    let begins = bare().with(|it| {
        it.config["bos_token_id"] = json!(0);
        it.settings = json!({"chat_template": "{{ bos_token }}"});
    });
    assert_eq!(Chat::read(begins.write().path()).unwrap().render(&[], false).unwrap(), "<s>");
}

/// RoPE's frequencies, and their naive formula: pair i of 4 turns by `theta^(-i / 4) / divisor`.
#[track_caller]
fn assert_turns(change: impl Fn(&mut Value), theta: f64, divisor: f64) {
    let dir = Made::new().with(|it| change(&mut it.config)).write();
    let config = LlamaConfig::read(&dir.path().join("config.json")).unwrap();
    let frequencies = config.rope().frequencies;
    assert_eq!(frequencies.len(), 4);
    for (i, frequency) in frequencies.iter().enumerate() {
        let expected = theta.powf(-(i as f64) / 4.0) / divisor;
        assert!((frequency / expected - 1.0).abs() < 1e-12, "{frequencies:?}");
    }
    scores(dir.path());
}

#[test]
fn r1_a_rule_may_have_its_old_name_its_new_one_and_both() {
    for rule in [
        json!({"type": "linear", "factor": 2.5}),
        json!({"rope_type": "linear", "factor": 2.5}),
        json!({"type": "linear", "rope_type": "linear", "factor": 2.5}),
        // The new one counts.
        json!({"type": "mrope", "rope_type": "linear", "factor": 2.5}),
    ] {
        assert_turns(|config| config["rope_scaling"] = rule.clone(), 10_000.0, 2.5);
        // Both places, with the same.
        let both = |config: &mut Value| {
            config["rope_scaling"] = rule.clone();
            config["rope_parameters"] = rule.clone();
        };
        assert_turns(both, 10_000.0, 2.5);
    }
    let contradicting = Made::new().with(|it| {
        it.config["rope_scaling"] = json!({"type": "linear", "factor": 2.5});
        it.config["rope_parameters"] = json!({"rope_theta": 10_000.0});
    });
    assert_holds(
        &refusal(contradicting.write().path()),
        "`rope_parameters` and `rope_scaling` contradict",
    );
}

#[test]
fn r2_without_a_rule_frequencies_are_plain() {
    for rule in
        [json!({"rope_theta": 5000.0}), json!({"rope_theta": 5000.0, "rope_type": "default"})]
    {
        let change = |config: &mut Value| {
            config.as_object_mut().unwrap().remove("rope_theta");
            config["rope_parameters"] = rule.clone();
        };
        assert_turns(change, 5000.0, 1.0);
    }
    assert_turns(|config| config["rope_scaling"] = json!({}), 10_000.0, 1.0);
    let problems = [
        (
            json!({"full_attention": {"rope_theta": 5.0}}),
            "RoPE's parameters of `full_attention` layers",
        ),
        (
            json!({"partial_rotary_factor": 0.5}),
            "RoPE's `partial_rotary_factor` 0.5 is not supported",
        ),
    ];
    for (parameters, problem) in problems {
        let dir = Made::new().with(|it| it.config["rope_parameters"] = parameters).write();
        assert_holds(&refusal(dir.path()), problem);
    }
    let lost = Made::new().with(|it| it.config["rope_scaling"] = json!({"factor": 2.5}));
    assert_holds(&refusal(lost.write().path()), "RoPE has a `factor`, but no `rope_type`");
}

#[test]
fn r3_a_template_that_cannot_be_read_stops_nothing_else() {
    let dir = Made::new().with(|it| it.settings["chat_template"] = json!("{% genre %}")).write();
    let plain = Made::new().write();
    assert_eq!(read(dir.path(), TEXT).unwrap(), read(plain.path(), TEXT).unwrap());
    let problem = "the chat template: syntax error: unknown statement genre";
    let pair = r#"{"prompt": "a", "completion": "house"}"#;
    let error = read(dir.path(), pair).unwrap_err();
    assert_holds(&error, "train.jsonl, line 1: the chat template: syntax error");
    let chat = Chat::read(dir.path()).unwrap();
    for error in [chat.render(&[user("a")], true).unwrap_err(), chat.prompt("a").unwrap_err()] {
        assert_holds(&error, problem);
    }
    // The same for one that is not text.
    fs::write(dir.path().join("chat_template.jinja"), b"\xff\xfe{").unwrap();
    assert_eq!(read(dir.path(), TEXT).unwrap(), read(plain.path(), TEXT).unwrap());
    assert_holds(&read(dir.path(), pair).unwrap_err(), "chat_template.jinja: it is UTF-16");
    // A template of one's own is looked at at once.
    let chat = Chat::new(Made::new().tokenizer, "{% genre %}", "</s>");
    assert_holds(&chat.err().unwrap(), problem);
}

#[test]
fn r3_templates_mark_and_break_off_as_in_transformers() {
    let template = "{% for it in messages %}{% if loop.index > 1 %}{% break %}{% endif %}\
                    {% generation %}{{ it.content }} {% endgeneration %}{% endfor %}";
    let dir = Made::new().with(|it| it.settings["chat_template"] = json!(template)).write();
    let texts = read(dir.path(), r#"{"prompt": "a house", "completion": "the dog"}"#).unwrap();
    assert_eq!(texts[0].ids, [10, 11]);
}

#[test]
fn u1_byte_order_marks_are_skipped() {
    let plain = Made::new().with(|it| it.settings["chat_template"] = Value::Null).write();
    fs::write(plain.path().join("chat_template.jinja"), CHATML).unwrap();
    let marked = Made::new().with(|it| it.settings["chat_template"] = Value::Null).write();
    fs::write(marked.path().join("chat_template.jinja"), CHATML).unwrap();
    fs::write(marked.path().join("generation_config.json"), "{}").unwrap();
    fs::write(marked.path().join("special_tokens_map.json"), "{}").unwrap();
    for file in fs::read_dir(marked.path()).unwrap().map(|it| it.unwrap().path()) {
        if file.extension().is_some_and(|it| it != "safetensors") {
            let text = [b"\xef\xbb\xbf", &fs::read(&file).unwrap()[..]].concat();
            fs::write(file, text).unwrap();
        }
    }
    let talk = r#"{"prompt": "a", "completion": "house"}"#;
    let lines = format!("{TEXT}\r\n{talk}\n");
    let texts = read(plain.path(), &lines).unwrap();
    assert_eq!(read(marked.path(), &format!("\u{feff}{lines}")).unwrap(), texts);
    assert_eq!(scores(marked.path()), scores(plain.path()));

    // The list of several files.
    let weights = marked.path().join("model-00001-of-00001.safetensors");
    fs::rename(marked.path().join("model.safetensors"), weights).unwrap();
    let names = Made::new().tensors.into_keys();
    let map: Value = names.map(|it| (it, json!("model-00001-of-00001.safetensors"))).collect();
    let index = format!("\u{feff}{}", json!({"weight_map": map}));
    fs::write(marked.path().join("model.safetensors.index.json"), index).unwrap();
    assert_eq!(scores(marked.path()), scores(plain.path()));

    // Reviews.
    let reviews = plain.path().join("dev.tsv");
    fs::write(&reviews, "\u{feff}sentence\tlabel\na dog\t1\n").unwrap();
    assert_eq!(sst2::read(&reviews).unwrap(), [("a dog".to_owned(), 1)]);

    // What other editors write is not UTF-8.
    let config = fs::read_to_string(plain.path().join("config.json")).unwrap();
    let wide: Vec<_> = "\u{feff}".encode_utf16().chain(config.encode_utf16()).collect();
    let wide: Vec<_> = wide.into_iter().flat_map(u16::to_le_bytes).collect();
    fs::write(plain.path().join("config.json"), wide).unwrap();
    assert_holds(&refusal(plain.path()), "config.json: it is UTF-16; save it as UTF-8");
    fs::write(plain.path().join("config.json"), b"{\"a\": \"\xe9\"}").unwrap();
    assert_holds(&refusal(plain.path()), "config.json: it is not UTF-8, from byte 7 on");
}
