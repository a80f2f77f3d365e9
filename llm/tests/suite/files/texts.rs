//! Lines of texts that cannot be learned as they are.

use burn_lora_llm::{
    chat::Chat,
    generate::{Options, Sampling, generate},
    pretrained,
};
use rand::{SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use tokenizers::AddedToken;

use super::{Made, assert_holds, read};
use crate::{backend::Plain, oracle::device};

#[test]
fn w3_what_a_template_would_write_is_not_left_out() {
    let dir = Made::new().write();
    let call = json!([{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]);
    let question = json!({"role": "user", "content": "a"});
    let with = |key: &str, value: Value| {
        let mut answer = json!({"role": "assistant", "content": "house"});
        answer[key] = value;
        json!({"messages": [question, answer]})
    };
    for (line, key) in [
        (with("tool_calls", call.clone()), "`messages`: `tool_calls`"),
        (with("reasoning_content", json!("hm")), "`messages`: `reasoning_content`"),
        (with("thinking", json!("hm")), "`messages`: `thinking`"),
        (with("weight", json!(0)), "`messages`: `weight`"),
        (with("train", json!(false)), "`messages`: `train`"),
        (
            json!({"messages": [{"role": "assistant", "content": null, "tool_calls": call}]}),
            "`tool_calls`",
        ),
        (json!({"messages": [question], "tools": call}), "`tools`"),
        (
            json!({"prompt": "a", "completion": "house", "reasoning_content": "hm"}),
            "`reasoning_content`",
        ),
    ] {
        let error = read(dir.path(), &format!("{{\"text\": \"a\"}}\n{line}\n")).unwrap_err();
        assert_holds(&error, "train.jsonl, line 2: ");
        assert_holds(&error, &format!("{key} is not supported"));
    }
    // What says nothing, and what nobody reads.
    let plain = read(dir.path(), &with("content", json!("house")).to_string()).unwrap();
    for (key, value) in [
        ("tool_calls", Value::Null),
        ("tool_calls", json!([])),
        ("reasoning_content", json!("")),
        ("weight", json!(1)),
        ("train", json!(true)),
        ("timestamp", json!("noon")),
    ] {
        let mut line = with(key, value);
        line["tools"] = json!([]);
        line["name"] = json!("seventh");
        assert_eq!(read(dir.path(), &line.to_string()).unwrap(), plain, "{line}");
    }
}

#[test]
fn unclear_lines_are_told_by_what_they_are() {
    let dir = Made::new().write();
    let list = r#"[{"text": "a"}, {"text": "house"}]"#;
    let spread = "[\n  {\n    \"text\": \"a\"\n  }\n]\n";
    for lines in [list, spread, &format!("\n {list}")] {
        let error = read(dir.path(), lines).unwrap_err();
        assert_holds(
            &error,
            "train.jsonl: it is a list in JSON, and each text is needed on a line of its own",
        );
        assert_holds(&error, "jq -c '.[]' ");
    }
    let error = read(dir.path(), "{\n  \"text\": \"a\"\n}\n").unwrap_err();
    assert_holds(&error, "train.jsonl: its texts are spread over several lines, and each");
    assert_holds(&error, "jq -c '.' ");

    let messages = json!([{"role": "user", "content": "a"}]);
    for (line, found) in [
        (json!({"messages": messages, "text": "a"}), "there is `messages`, `text`"),
        (
            json!({"messages": messages, "prompt": "a", "completion": "a"}),
            "there is `messages`, `prompt`, `completion`",
        ),
        (json!({"prompt": "a", "text": "a"}), "there is `prompt`, `text`"),
        (json!({"prompt": "a"}), "there is `prompt`"),
        (json!({"instruction": "a"}), "none of them is there"),
        (json!("a"), "none of them is there"),
    ] {
        let error = read(dir.path(), &line.to_string()).unwrap_err();
        let forms = "line 1: `messages`, or `prompt` and `completion`, or `text` is needed, and ";
        assert_holds(&error, &format!("{forms}{found}"));
    }
    for (line, key) in [
        (json!({"text": 3}), "text"),
        (json!({"prompt": ["a"], "completion": "a"}), "prompt"),
        (json!({"prompt": "a", "completion": {}}), "completion"),
    ] {
        let error = read(dir.path(), &line.to_string()).unwrap_err();
        assert_holds(&error, &format!("line 1: `{key}` must be a text"));
    }
    // Keys without a value are not there.
    let line = json!({"messages": null, "prompt": null, "text": "a"});
    assert_eq!(read(dir.path(), &line.to_string()).unwrap()[0].ids, [10, 2]);
}

#[test]
fn c1_a_token_beyond_the_table_is_an_error() {
    let made = Made::new().with(|it| {
        it.tokenizer.add_special_tokens(&[AddedToken::from("<|tool|>", true)]);
    });
    let dir = made.write();
    let problem = "the token `<|tool|>` has number 13, and the model knows those below 13";
    for line in [
        r#"{"text": "the <|tool|> lives"}"#,
        r#"{"prompt": "the <|tool|>", "completion": "lives"}"#,
        r#"{"messages": [{"role": "user", "content": "<|tool|>"}]}"#,
    ] {
        let error = read(dir.path(), &format!("{{\"text\": \"a\"}}\n{line}\n")).unwrap_err();
        assert_holds(&error, &format!("train.jsonl, line 2: {problem}"));
    }
    assert_holds(&Chat::read(dir.path()).unwrap().prompt("a <|tool|>").unwrap_err(), problem);
    // The token that ends texts may be such a one.
    let dir = made.with(|it| it.settings["eos_token"] = json!("<|tool|>")).write();
    assert_holds(&read(dir.path(), r#"{"text": "a"}"#).unwrap_err(), problem);
}

#[test]
fn c2_an_empty_prompt_is_an_error() {
    let dir = Made::new().with(|it| it.settings["chat_template"] = Value::Null).write();
    let llama = pretrained::load::<Plain>(dir.path(), None, &device::<Plain>()).unwrap().llama;
    let chat = Chat::read(dir.path()).unwrap();
    let prompt = chat.prompt("").unwrap();
    assert!(prompt.is_empty());
    let (mut rng, sampling) = (StdRng::seed_from_u64(0), Sampling { temperature: 0.0, top_p: 1.0 });
    let options = Options { limit: 3, sampling, exact: false };
    let error = generate(&llama, &chat, &prompt, options, &mut rng, |_| ()).unwrap_err();
    assert_holds(&error, "the prompt is empty");
}
