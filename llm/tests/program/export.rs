//! Adapters and models for the programs of others.

use std::fs;

use serde_json::json;

use super::Place;

/// A place whose model has tokens that llama.cpp knows: byte pairs.
fn place() -> Place {
    let place = Place::new();
    let vocabulary: serde_json::Map<_, _> =
        super::WORDS.iter().zip(0..).map(|(word, id)| ((*word).to_owned(), json!(id))).collect();
    let added = [(0, "<end>"), (10, "<unknown>")].map(|(id, content)| {
        json!({
            "id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false,
        })
    });
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    });
    place.write("model/tokenizer.json", tokenizer.to_string());
    place
}

const TRAIN: &str = "train --model model --data data --iters 4 --batch 2 --rank 2 --targets q_proj,down_proj --mask-prompt --out out";

#[test]
fn adapters_go_to_llama_cpp_and_come_back() {
    let place = place();
    place.done(TRAIN);
    let (told, _) = place.done("export --model model --adapter out/adapter --out gguf/polite.gguf");
    assert!(told.contains("The 4 adapters are in gguf/polite.gguf"), "{told}");
    assert!(told.contains("for llama.cpp (`--lora gguf/polite.gguf`)"), "{told}");
    assert!(told.contains("`ollama create NAME -f gguf/polite.Modelfile`"), "{told}");
    assert!(told.contains("llama.cpp needs the base as a GGUF file"), "{told}");
    let modelfile = fs::read_to_string(place.path("gguf/polite.Modelfile")).unwrap();
    let model = place.path("model").canonicalize().unwrap();
    let expected = format!(
        "# Written by burn-lora. `ollama create NAME -f polite.Modelfile` makes a model of it.\nFROM {}\n\
         ADAPTER ./polite.gguf\nPARAMETER stop \"<end>\"\nPARAMETER stop \"assistant:\"\n",
        model.display()
    );
    assert_eq!(modelfile, expected);
    // The file answers as the directory does, and is evaluated, merged and trained as that is.
    let answer = |adapter: &str| {
        let command =
            format!("generate --model model --adapter {adapter} --prompt a --max-tokens 8");
        let (told, error) = place.done(&command);
        assert_eq!(error, "", "{adapter}");
        told.lines()
            .find(|it| !it.contains("switched") && !it.contains("read in"))
            .unwrap()
            .to_owned()
    };
    assert_eq!(answer("gguf/polite.gguf"), answer("out/adapter"));
    let loss = |adapter: &str| {
        let command = format!(
            "evaluate --model model --data data/valid.jsonl --mask-prompt=false --max-length 64 --adapter {adapter}"
        );
        let (told, _) = place.done(&command);
        told.lines()
            .find(|it| it.starts_with(adapter))
            .unwrap()
            .split("loss")
            .nth(1)
            .unwrap()
            .to_owned()
    };
    assert_eq!(loss("gguf/polite.gguf"), loss("out/adapter"));
    place.done("export --model model --adapter gguf/polite.gguf --out again");
    assert_eq!(loss("again"), loss("out/adapter"));
    let (told, _) = place
        .done("train --model model --data data --iters 1 --adapter gguf/polite.gguf --out more");
    assert!(told.contains("Starts from the 4 adapters in gguf/polite.gguf"), "{told}");
}

#[test]
fn a_merged_file_is_a_model() {
    let place = place();
    place.done(TRAIN);
    let (told, _) = place.done(
        "merge --model model --adapter out/adapter --out gguf/merged.gguf --type f16 --data data/valid.jsonl",
    );
    for expected in [
        "before rounding",
        "as it was written",
        "  F16: ",
        "which rounding changed by 0.0",
        "`--type` chooses",
    ] {
        assert!(told.contains(expected), "{expected} in {told}");
    }
    let perplexity = |line: &str| {
        let line = told.lines().find(|it| it.starts_with(line)).unwrap();
        line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
    };
    let [before, after] = ["before rounding", "as it was written"].map(perplexity);
    assert!((before / after - 1.0).abs() < 0.01, "{told}");
    // Texts are read as the adapters' training read them, and `evaluate` does.
    let (evaluated, _) =
        place.done("evaluate --model model --adapter out/adapter --data data/valid.jsonl");
    let evaluated = evaluated.lines().find(|it| it.starts_with("out/adapter")).unwrap();
    let evaluated: f64 = evaluated.rsplit(' ').next().unwrap().parse().unwrap();
    assert!((before / evaluated - 1.0).abs() < 0.01, "{told}{evaluated}");
    let modelfile = fs::read_to_string(place.path("gguf/merged.Modelfile")).unwrap();
    assert!(modelfile.contains("\nFROM ./merged.gguf\nPARAMETER stop \"<end>\"\n"), "{modelfile}");
    // Its tokens and its template come along.
    let answer = |command: &str| {
        let (told, _) = place.done(command);
        told.lines()
            .find(|it| {
                !it.contains("switched") && !it.contains("in the file") && !it.contains("read in")
            })
            .unwrap()
            .to_owned()
    };
    assert_eq!(
        answer("generate --model gguf/merged.gguf --prompt a --max-tokens 8"),
        answer("generate --model model --adapter out/adapter --prompt a --max-tokens 8"),
    );
    // Adapters of the directory fit the file of it.
    place.done("merge --model model --out gguf/base.gguf --force");
    place.done("export --model gguf/base.gguf --adapter out/adapter --out gguf/x.gguf");
    // What is read stays, even if it may be overwritten otherwise.
    for command in [
        "merge --model gguf/base.gguf --out gguf/base.gguf --force",
        "export --model gguf/base.gguf --adapter out/adapter --out gguf/base.gguf",
        "export --model gguf/base.gguf --adapter gguf/x.gguf --out gguf/x.gguf",
    ] {
        let error = place.refused(command);
        assert!(error.contains("it is what is read, which stays as it is"), "{error}");
    }
    let modelfile = fs::read_to_string(place.path("gguf/x.Modelfile")).unwrap();
    assert!(modelfile.contains("\nFROM ./base.gguf\nADAPTER ./x.gguf\n"), "{modelfile}");
}

#[test]
fn what_somebody_else_wrote_is_not_overwritten() {
    let place = place();
    place.done(TRAIN);
    for (name, command) in [
        ("x.gguf", "export --model model --adapter out/adapter --out x.gguf"),
        ("x.gguf", "merge --model model --adapter out/adapter --out x.gguf"),
        ("y.Modelfile", "export --model model --adapter out/adapter --out y.gguf"),
        ("y.Modelfile", "merge --model model --out y.gguf"),
        ("peft/adapter_config.json", "export --model model --adapter out/adapter --out peft"),
    ] {
        place.write(name, "FROM llama3");
        let error = place.refused(command);
        assert!(error.contains(name) && error.contains("`--force` overwrites it"), "{error}");
        assert_eq!(fs::read(place.path(name)).unwrap(), b"FROM llama3");
        assert!(!place.path("y.gguf").exists());
        if name != "peft/adapter_config.json" {
            place.done(&format!("{command} --force"));
            // What is ours now is.
            place.done(command);
            if name.ends_with("Modelfile") {
                let ours = fs::read_to_string(place.path(name)).unwrap();
                place.write(name, format!("{ours}SYSTEM be brief\n"));
                assert!(place.refused(command).contains("somebody else wrote or changed it"));
            }
        }
        for name in ["x.gguf", "y.gguf", "x.Modelfile", "y.Modelfile"] {
            let _ = fs::remove_file(place.path(name));
        }
    }
    let entries = fs::read_dir(place.path(".")).unwrap();
    let names = entries.map(|it| it.unwrap().file_name().into_string().unwrap());
    assert!(names.into_iter().all(|it| !it.starts_with(".unfinished")));
}

#[test]
fn what_does_not_go_is_told_before_anything_is_written() {
    let place = place();
    place.done(TRAIN);
    place.model("other", "llama2");
    for (command, message) in [
        (
            "export --model other --adapter out/adapter --out x.gguf",
            "out/adapter: the adapter of `model.layers.0.self_attn.q_proj` is for a weight [16, 12], and that of the model",
        ),
        ("merge --model model --out x.gguf --dtype f16", "`--dtype` is for directories"),
        ("merge --model model --out x --type f16", "`--type` is for GGUF files"),
        (
            "export --model model --adapter out/adapter --out out/adapter/adapter_config.json",
            "it is a file",
        ),
        // Words are no byte pairs.
        ("merge --model other --out x.gguf", "the tokenizer is of the kind \"WordLevel\""),
        ("generate --model model --prompt a --adapter model/tokenizer.json", "not a directory"),
    ] {
        let error = place.refused(command);
        assert!(error.contains(message), "{command}: {error}");
        assert!(!place.path("x.gguf").exists() && !place.path("x.Modelfile").exists(), "{command}");
    }
    let dora = "train --model model --data data --iters 1 --rank 2 --relative dora --out dora";
    place.done(dora);
    let error = place.refused("export --model model --adapter dora/adapter --out new/and/x.gguf");
    assert!(error.contains("DoRA's magnitudes; merge the set into the model"), "{error}");
    assert!(!place.path("new").exists());
}
