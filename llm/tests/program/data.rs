//! The texts of a training: which are learned, and what is told of the others.

use super::*;

#[test]
fn d2_texts_that_are_too_long_or_empty_are_skipped_and_told() {
    let place = Place::new();
    // In tokens: `user: a <end> assistant: a b <end>` are 7, of which 4 are given.
    place.texts("data/train.jsonl", &["a", "a b c d a b", "a b"]);
    let more = "{\"text\": \"\"}\n{\"text\": \"a b c\"}\n";
    let train_texts = fs::read_to_string(place.path("data/train.jsonl")).unwrap() + more;
    place.write("data/train.jsonl", train_texts);
    let (out, _) = place.done(&train("--max-length 7 --mask-prompt"));
    // The prompt of the second fills all; the third loses its end.
    assert!(
        out.contains("data/train.jsonl: 1 of 5 texts are cut off at 7 tokens (--max-length)"),
        "{out}"
    );
    assert!(out.contains("data/train.jsonl: 2 of 5 texts are skipped"), "{out}");
    assert!(out.contains("3 texts to learn, 2 to evaluate"), "{out}");
    assert!(!out.contains("data/valid.jsonl: 0"), "{out}");

    // The context of the model cuts, too.
    let long = "a b ".repeat(40);
    place.texts("data/train.jsonl", &["a", &long]);
    let (out, _) = place.done(&train("--max-length 100 --force"));
    let expected = "1 of 2 texts are cut off at 64 tokens, the context of the model";
    assert!(out.contains(expected), "{out}");

    // Nothing is left.
    let error = place.refused(&train("--max-length 4 --mask-prompt --force"));
    assert!(
        error.contains("data/train.jsonl: none of its 2 texts has a token to learn"),
        "{error}"
    );
    assert!(error.contains("4 tokens"), "{error}");
    place.write("data/train.jsonl", "\n\n");
    let error = place.refused(&train("--force"));
    assert!(error.contains("data/train.jsonl: it holds no text"), "{error}");

    // What is evaluated, alike.
    place.texts("data/test.jsonl", &["a", "a b c d a b"]);
    let (out, _) =
        place.done("evaluate --model model --data data/test.jsonl --max-length 7 --mask-prompt");
    assert!(out.contains("data/test.jsonl: 1 of 2 texts are skipped"), "{out}");
}

#[test]
fn d5_a_role_that_is_none_is_an_error_with_its_line() {
    let place = Place::new();
    let line = |role: &str| {
        let question = json!({ "role": "user", "content": "a" });
        format!("{}\n", json!({ "messages": [question, { "role": role, "content": "b" }] }))
    };
    for role in ["assistent", "tool", "Assistant", "developer", ""] {
        place.write("data/train.jsonl", line("assistant") + &line(role));
        let error = place.refused(&train("--force"));
        assert!(
            error.contains(&format!("data/train.jsonl, line 2: {role:?} is not a role")),
            "{error}"
        );
        assert!(error.contains("`system`, `user`, `assistant`"), "{error}");
    }
    place.write("data/train.jsonl", line("assistant") + &line("system"));
    place.done(&train(""));
}

#[test]
fn d5_data_that_change_are_noticed_when_a_run_is_resumed() {
    let place = Place::new();
    place.done(&train(""));
    let remembered = place.json("out/arguments.json");
    let hashes = remembered["fingerprints"].as_object().unwrap();
    let files: Vec<_> = hashes.keys().map(String::as_str).collect();
    assert_eq!(files, ["data/train.jsonl", "data/valid.jsonl", "model"]);
    place.done(&train("--resume"));
    for file in ["data/train.jsonl", "data/valid.jsonl"] {
        let before = fs::read(place.path(file)).unwrap();
        place.texts(file, &["a", "b c", "c d a"]);
        let error = place.refused(&train("--resume --iters 3"));
        assert!(
            error.contains(&format!("{file} has changed since the run in out began")),
            "{error}"
        );
        place.write(file, before);
    }
    place.model("model", "smollm2");
    let error = place.refused(&train("--resume --iters 3"));
    assert!(error.contains("model has changed since the run in out began"), "{error}");
    place.model("model", "llama3");
    place.done(&train("--resume --iters 3"));

    // Runs of earlier versions have no fingerprints.
    let mut old = place.json("out/arguments.json");
    old.as_object_mut().unwrap().retain(|name, _| !["fingerprints", "adapter"].contains(&&**name));
    place.write("out/arguments.json", old.to_string());
    place.texts("data/train.jsonl", &["a"]);
    place.done(&train("--resume --iters 4"));
}

#[test]
fn d7_data_are_looked_at_before_the_model() {
    let place = Place::new();
    // The weights would be an error.
    place.write("model/model.safetensors", "nothing");
    place.write("data/train.jsonl", "{\"txt\": 1}\n");
    let error = place.refused(&train(""));
    assert!(error.contains("data/train.jsonl, line 1"), "{error}");
    let error = place.refused("evaluate --model model --data data/train.jsonl");
    assert!(error.contains("data/train.jsonl, line 1"), "{error}");
    // And files before a model is made.
    let error = place.refused("train --generated --data nowhere --out out");
    assert!(error.contains("nowhere/train.jsonl") && !place.path("out").exists(), "{error}");
}

#[test]
fn d7_a_share_is_held_out_where_there_is_no_valid_file() {
    let place = Place::new();
    fs::remove_file(place.path("data/valid.jsonl")).unwrap();
    let error = place.refused(&train(""));
    assert!(error.contains("data/valid.jsonl") && error.contains("--valid-share"), "{error}");

    let prompts = ["a", "b", "c", "d", "a b", "b c", "c d", "d a", "a c", "b d"];
    place.texts("data/train.jsonl", &prompts);
    let told = "3 of the 10 texts in data/train.jsonl are held out to evaluate on";
    let mut losses = Vec::new();
    for (out, seed) in [("one", 1), ("again", 1), ("other", 2)] {
        let (text, _) = place.done(&train(&format!("--valid-share 0.3 --seed {seed} --out {out}")));
        assert!(text.contains(told) && text.contains("7 texts to learn, 3 to evaluate"), "{text}");
        losses.push(place.json(&format!("{out}/summary.json"))["history"]["valid"][0].clone());
    }
    // The same texts each time: adapters change nothing before they are trained.
    assert!(losses.iter().all(|it| *it == losses[0]), "{losses:?}");

    // What is cut off is told of the whole file.
    let (text, _) = place.done(&train("--valid-share 0.3 --max-length 7 --out short"));
    assert!(text.contains("data/train.jsonl: 6 of 10 texts are cut off at 7 tokens"), "{text}");

    // It takes the place of a file that is there.
    place.texts("data/valid.jsonl", &["a"]);
    let (text, _) = place.done(&train("--valid-share 0.01 --out both"));
    assert!(
        text.contains("1 of the 10 texts") && text.contains("valid.jsonl is not read"),
        "{text}"
    );
    for (share, problem) in [("0", "between 0 and 1"), ("1", "between 0 and 1"), ("x", "between")] {
        let error = place.refused(&train(&format!("--valid-share {share} --out wrong")));
        assert!(error.contains(problem), "{error}");
    }
    place.texts("data/train.jsonl", &["a"]);
    let error = place.refused(&train("--valid-share 0.5 --out wrong"));
    assert!(error.contains("one text cannot be divided"), "{error}");
}
