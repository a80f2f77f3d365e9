//! Tests of what is learned: how lines and conversations become tokens, and tokens rows.

use super::*;

const ALL: Reading = Reading { max_length: 100, mask_prompt: false };
const ANSWERS: Reading = Reading { max_length: 100, mask_prompt: true };

fn read(lines: &str, reading: &Reading) -> burn_lora_llm::Result<Vec<Text>> {
    let (dir, chat) = chat();
    let path = dir.path().join("train.jsonl");
    fs::write(&path, lines).unwrap();
    data::read(&path, &chat, reading).map(|it| it.texts)
}

#[test]
fn the_three_forms_of_texts_are_told_by_their_keys() {
    let lines = r#"{"text": "a b c"}
{"prompt": "a", "completion": "b c"}

{"messages": [{"role": "user", "content": " a "}, {"role": "assistant", "content": "b c"}]}"#;
    let talk = vec![1, 3, 0, 2, 4, 5, 0];
    let texts = read(lines, &ALL).unwrap();
    let ids: Vec<_> = texts.iter().map(|text| text.ids.clone()).collect();
    assert_eq!(ids, [vec![3, 4, 5, 0], talk.clone(), talk]);
    assert!(texts.iter().all(|text| text.given == 0));

    // `user: a <end> assistant:` is given.
    let given: Vec<_> = read(lines, &ANSWERS).unwrap().iter().map(|text| text.given).collect();
    assert_eq!(given, [0, 4, 4]);
    let short = Reading { max_length: 5, ..ANSWERS };
    let texts = read(lines, &short).unwrap();
    assert_eq!(texts.iter().map(Text::targets).collect::<Vec<_>>(), [3, 1, 1]);
}

#[test]
fn a_bad_line_is_an_error_with_its_number() {
    for (line, reading, expected) in [
        ("{", ALL, "train.jsonl, line 3: EOF"),
        (r#"{"txt": "a"}"#, ALL, "line 3: `messages`, or `prompt` and `completion`, or `text`"),
        (r#"{"text": "a", "prompt": "b", "completion": "c"}"#, ALL, "line 3: `messages`, or"),
        (r#"{"messages": [{"role": "user"}]}"#, ALL, "line 3: `messages`: missing field `content`"),
        (r#"{"messages": []}"#, ANSWERS, "line 3: `messages` is empty"),
        (r#"{"messages": [{"role": "user", "content": "a"}]}"#, ANSWERS, "must be the assistant's"),
    ] {
        let error = read(&format!("{{\"text\": \"a b\"}}\n\n{line}\n"), &reading).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    assert!(read("\n", &ALL).unwrap_err().contains("it holds no text"));
}

#[test]
fn d2_texts_without_a_token_to_learn_are_counted() {
    let text = |length, given| Text { ids: vec![7; length], given };
    // Whole, cut off, whole; and cut off within what is given, empty, of one token, given as a whole.
    let learned = [text(4, 1), text(9, 3), text(5, 4)];
    let skipped = [text(9, 5), text(0, 0), text(1, 0), text(3, 3)];
    let all = learned.iter().chain(&skipped).cloned().collect();
    let found = Texts::new(all, 5).unwrap();
    assert_eq!((found.cut, found.skipped), (1, 4));
    assert_eq!(found.texts.iter().map(Text::targets).collect::<Vec<_>>(), [3, 2, 1]);
    let error = Texts::new(skipped.to_vec(), 5).unwrap_err();
    assert!(error.contains("none of its 4 texts") && error.contains("5 tokens"), "{error}");
    assert_eq!(Texts::new(vec![], 5).unwrap_err(), "it holds no text");
}

#[test]
fn a_gguf_file_says_how_texts_become_tokens() {
    let tokens = ["<s>", "a", "b", "ab", "Ġ", "Ġa", "1", "2", "12", "<do>", "Ċ"];
    let fields = |division: &str, begins: bool| {
        let fields = json!({
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": division,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": ["a b", "Ġ a", "1 2"],
            "tokenizer.ggml.token_type": [3, 1, 1, 1, 1, 1, 1, 1, 1, 4, 1],
            "tokenizer.ggml.add_bos_token": begins,
            "tokenizer.ggml.bos_token_id": 0,
        });
        fields.as_object().unwrap().clone()
    };
    let read = |fields| tokens_of_gguf::tokenizer(&fields, Path::new("dir/model.gguf"));
    let ids = |division: &str, begins: bool| {
        let tokenizer = read(fields(division, begins)).unwrap();
        let encoding = tokenizer.encode("ab a12<do>b <s>\n12", true).unwrap();
        assert_eq!(tokenizer.decode(encoding.get_ids(), true).unwrap(), "ab a12<do>b \n12");
        encoding.get_ids().to_vec()
    };
    // Digits are divided by SmolLM2 and Qwen.
    let (divided, whole) = ([3, 5, 6, 7, 9, 2, 4, 0, 10, 6, 7], [3, 5, 8, 9, 2, 4, 0, 10, 8]);
    for (division, expected) in
        [("smollm", &divided[..]), ("qwen2", &divided), ("llama-bpe", &whole), ("default", &whole)]
    {
        assert_eq!(ids(division, false), expected, "{division}");
        assert_eq!(ids(division, true), [&[0], expected].concat(), "{division}");
    }

    let error = read(fields("gpt-9", false)).err().unwrap();
    assert_eq!(error, "dir/model.gguf: `tokenizer.ggml.pre` \"gpt-9\" is not supported");
    let mut other = fields("default", false);
    other["tokenizer.ggml.model"] = json!("t5");
    let error = read(other).err().unwrap();
    assert!(
        error.contains("of the kind \"t5\"") && error.contains("dir/tokenizer.json"),
        "{error}"
    );
    let mut other = fields("default", false);
    other.remove("tokenizer.ggml.merges");
    let error = read(other).err().unwrap();
    assert_eq!(error, "dir/model.gguf: `tokenizer.ggml.merges` is missing");
}

#[test]
fn generated_questions_are_in_one_file_only_and_of_known_words() {
    let dir = tempfile::tempdir().unwrap();
    generated::write_texts(dir.path()).unwrap();
    let tokenizer = generated::tokenizer().unwrap();
    let mut questions = BTreeSet::new();
    for (file, count) in [("train.jsonl", 32), ("valid.jsonl", 8), ("test.jsonl", 8)] {
        let lines = fs::read_to_string(dir.path().join(file)).unwrap();
        assert_eq!(lines.lines().count(), count);
        for line in lines.lines() {
            let pair: HashMap<String, String> = serde_json::from_str(line).unwrap();
            assert!(pair["completion"].ends_with(", my friend."));
            for text in pair.values() {
                let ids = tokenizer.encode(text.as_str(), false).unwrap().get_ids().to_vec();
                assert!(!ids.contains(&0), "{text}");
                assert_eq!(tokenizer.decode(&ids, true).unwrap(), *text);
            }
            assert!(questions.insert(pair["prompt"].clone()), "{line}");
        }
    }
}

#[test]
fn rows_are_filled_with_texts_in_their_order() {
    let texts = [3, 4, 2, 8, 9, 1].map(|length| Text { ids: vec![0; length], given: 0 });
    let texts: Vec<_> = texts.iter().collect();
    let rows = pack(&texts, 9);
    let lengths: Vec<Vec<_>> =
        rows.iter().map(|row| row.iter().map(|text| text.ids.len()).collect()).collect();
    assert_eq!(lengths, [vec![3, 4, 2], vec![8], vec![9], vec![1]]);
}

#[test]
fn no_text_is_longer_than_the_model_reads() {
    let llama = tiny::<Plain>("llama3");
    let config = pretrained::config(&fixture("llama3")).unwrap();
    let cut = |given| crate::reading(given, true, &config).max_length;
    assert_eq!([cut(3), cut(usize::MAX)], [3, llama.max_positions]);
    assert!(llama.max_positions > 3);
}

#[test]
fn rows_are_dealt_fairly() {
    let texts: Vec<_> =
        [3, 9, 5, 2, 8, 1].map(|length| Text { ids: vec![0; length], given: 0 }).into();
    let rows = || texts.iter().map(|text| vec![text]).collect::<Vec<_>>();
    let sizes = |workers| {
        let parts = deal(rows(), workers).into_iter();
        let size = |part: Vec<Vec<&Text>>| part.iter().map(|row| tokens(row)).collect::<Vec<_>>();
        parts.map(size).collect::<Vec<_>>()
    };
    assert_eq!(sizes(1), [[9, 8, 5, 3, 2, 1]]);
    assert_eq!(sizes(2), [vec![9, 8], vec![5, 3, 2, 1]]);
    assert_eq!(sizes(3), [vec![9], vec![8], vec![5, 3, 2, 1]]);
    // More workers than rows: no part is empty, and no row is lost.
    assert_eq!(sizes(9), [[9], [8], [5], [3], [2], [1]]);
}

#[test]
fn each_replica_has_a_part_as_long_as_there_are_rows() {
    let texts: Vec<_> = [3, 9, 5].map(|length| Text { ids: vec![0; length], given: 0 }).into();
    let rows = || texts.iter().map(|text| vec![text]).collect::<Vec<_>>();
    let sizes = |workers, index| {
        let parts = deal_to(rows(), workers, index, 2).into_iter();
        parts.map(|part| part.iter().map(|row| tokens(row)).collect()).collect::<Vec<Vec<_>>>()
    };
    assert_eq!((sizes(1, 0), sizes(1, 1)), (vec![vec![9]], vec![vec![5, 3]]));
    assert_eq!(sizes(4, 0), [[9], [3]]);
    assert_eq!(sizes(4, 1), [[5]]);
}
