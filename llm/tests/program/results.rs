//! What a training leaves, and how another goes on from it.

use super::*;

#[test]
fn d4_a_result_is_not_overwritten_unasked() {
    let place = Place::new();
    place.done(&train(""));
    let weights = || fs::read(place.path("out/adapter/adapter_model.safetensors")).unwrap();
    let before = weights();
    let error = place.refused(&train("--seed 7"));
    assert!(error.contains("out/adapter: there is the result of an earlier run"), "{error}");
    for word in ["--resume", "--force", "--out"] {
        assert!(error.contains(word), "{error}");
    }
    assert_eq!(weights(), before);
    let error = place.refused(&train("--force --resume"));
    assert!(error.contains("cannot be used with"), "{error}");

    // It stays until the new run begins.
    let error = place.refused(&train("--force --targets nothing"));
    assert!(error.contains("nothing"), "{error}");
    assert_eq!(weights(), before);
    place.done(&train("--force --seed 7"));
    assert_ne!(weights(), before);

    // Full fine-tuning has no adapters, and none are left.
    place.done(&train("--full --force"));
    assert!(!place.path("out/adapter").exists());
    let error = place.refused(&train("--full"));
    assert!(error.contains("out/checkpoints: there is the result"), "{error}");
    // What else is in the directory is none.
    place.write("fresh/notes.txt", "mine");
    place.done(&train("--out fresh"));
}

#[test]
fn d4_a_run_is_resumed_with_more_steps() {
    let place = Place::new();
    place.done(&train("--iters 4 --out straight"));
    place.done(&train("--iters 2"));
    let (out, _) = place.done(&train("--iters 4 --resume"));
    assert!(out.contains("goes on after step 2/4"), "{out}");
    let losses = |of: &str| {
        let losses = place.json(&format!("{of}/summary.json"))["history"]["losses"].clone();
        serde_json::from_value::<Vec<f64>>(losses).unwrap()
    };
    let (straight, longer) = (losses("straight"), losses("out"));
    assert_eq!((straight.len(), longer.len()), (4, 4));
    // The second step ends at another rate, because the first run was to end there. The first is the same.
    assert_eq!(straight[0], longer[0]);

    let error = place.refused(&train("--iters 3 --resume"));
    assert!(error.contains("`iters` was 4, and is 3 now, and may only grow"), "{error}");
    let error = place.refused(&train("--iters 5 --rank 3 --resume"));
    assert!(error.contains("`rank` was 2, and is 3 now"), "{error}");
    let error = place.refused(&train("--out nowhere --resume"));
    assert!(error.contains("there is nothing to resume"), "{error}");
}

#[test]
fn d4_a_longer_run_on_reviews_sees_each_of_them_as_often() {
    let place = Place::new();
    let reviews =
        ["a\t0", "b c\t1", "c d a\t1", "d\t0", "a a a\t1", "b d\t0", "c c c\t0", "d a\t1"];
    for file in ["train", "dev", "test"] {
        let lines: Vec<_> = ["sentence\tlabel"].into_iter().chain(reviews).collect();
        place.write(&format!("sst2/{file}.tsv"), lines.join("\n") + "\n");
    }
    // The model stays as it is, so that a loss tells which review it is of.
    let run = |more: &str| {
        place.done(&format!(
            "train --model model --sst2 sst2 --questions 1 --workers 1 --rank 2 --batch 1 --learning-rate 1e-12 --out \
             out {more}"
        ));
        let losses = place.json("out/summary.json")["history"]["losses"].clone();
        let losses: Vec<f64> = serde_json::from_value(losses).unwrap();
        let rounds = losses.chunks(3).map(|round| {
            let mut round: Vec<_> = round.iter().map(|it| (it * 1e4).round()).collect();
            round.sort_by(f64::total_cmp);
            round
        });
        rounds.collect::<Vec<_>>()
    };
    let first = run("--iters 3");
    assert!(first[0].is_sorted_by(|one, next| one < next), "{first:?}");
    assert_eq!(run("--iters 6 --resume"), [&first[..], &first].concat());
    assert_eq!(run("--iters 9 --resume"), [&first[..], &first, &first].concat());
}

#[test]
fn d4_a_training_starts_from_existing_adapters() {
    let place = Place::new();
    place.done(&train(
        "--rank 3 --alpha 5 --targets q_proj,v_proj --out first --learning-rate 0.05",
    ));
    let more =
        "train --model model --data data --workers 1 --batch 2 --iters 2 --adapter first/adapter";
    let (out, _) = place.done(&format!("{more} --out second"));
    assert!(out.contains("Starts from the 4 adapters in first/adapter"), "{out}");
    let config = |of: &str| place.json(&format!("{of}/adapter/adapter_config.json"));
    let (first, second) = (config("first"), config("second"));
    for field in ["r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern"] {
        assert_eq!(first[field], second[field], "{field}");
    }
    assert_eq!((&first["r"], &first["lora_alpha"]), (&json!(3), &json!(5)));
    // It begins where the first ended, and trains.
    let valid = |of: &str| place.json(&format!("{of}/summary.json"))["history"]["valid"].clone();
    let (end, begin) =
        (valid("first")[1][1].as_f64().unwrap(), valid("second")[0][1].as_f64().unwrap());
    assert!((end - begin).abs() < 1e-6 * end, "{end} {begin}: {out}");
    assert_ne!(valid("first")[0][1], valid("first")[1][1]);
    assert_ne!(valid("second")[0][1], valid("second")[1][1]);
    let summary = place.json("second/summary.json");
    assert_eq!((&summary["rank"], &summary["adapter"]), (&Value::Null, &json!("first/adapter")));

    for other in ["--rank 3", "--alpha 5", "--targets q_proj", "--relative dora", "--full"] {
        let error = place.refused(&format!("{more} --out third {other}"));
        assert!(error.contains("cannot be used with"), "{error}");
    }
    let error = place.refused(&format!("{more} --out first --force"));
    assert!(error.contains("first/adapter: it is in first"), "{error}");
    assert!(place.path("first/adapter/adapter_config.json").exists());

    // It is resumed from its own checkpoint, if the start is what it was.
    place.done(&format!("{} --resume", more.replace("--iters 2", "--iters 3") + " --out second"));
    place.done(&train("--rank 3 --alpha 5 --targets q_proj,v_proj --out first --force --seed 9"));
    let error = place
        .refused(&format!("{} --resume", more.replace("--iters 2", "--iters 4") + " --out second"));
    assert!(error.contains("first/adapter has changed"), "{error}");
}

#[test]
fn d5_settings_of_the_training_are_those_of_the_evaluation() {
    let place = Place::new();
    place.done(&train("--mask-prompt --max-length 20"));
    let loss = |more: &str| {
        let (out, err) =
            place.done(&format!("evaluate --model model --data data/valid.jsonl {more}"));
        assert!(err.is_empty(), "{err}");
        let line = out.lines().find(|line| line.starts_with("base")).unwrap().to_owned();
        (line, out.lines().find(|line| line.starts_with("As in the training")).map(str::to_owned))
    };
    let ((all, none), (answers, _)) = (loss(""), loss("--mask-prompt"));
    assert!(none.is_none() && all != answers);
    let (remembered, told) = loss("--adapter out/adapter");
    assert_eq!(remembered, answers);
    let expected = "As in the training of out/adapter: --mask-prompt=true --max-length 20";
    assert_eq!(told.as_deref(), Some(expected));
    // What is said wins.
    let (given, told) = loss("--adapter out/adapter --mask-prompt=false");
    assert_eq!(given, all);
    assert_eq!(told.as_deref(), Some("As in the training of out/adapter: --max-length 20"));
    let (given, told) = loss("--adapter out/adapter --mask-prompt --max-length 5");
    assert!(given != answers && told.is_none());
    // Adapters of others remember nothing.
    fs::remove_file(place.path("out/adapter/burn_lora.json")).unwrap();
    assert_eq!(loss("--adapter out/adapter"), (all, None));

    // Another template is told.
    place.done(&train("--force"));
    let settings = json!({ "eos_token": "<end>", "chat_template": format!("{TEMPLATE} ") });
    place.write("model/tokenizer_config.json", settings.to_string());
    let (_, err) =
        place.done("evaluate --model model --data data/valid.jsonl --adapter out/adapter");
    assert!(
        err.contains("out/adapter: the adapters were trained with another chat template"),
        "{err}"
    );
}

#[test]
fn d5_a_cut_file_of_settings_is_a_warning_everywhere() {
    let place = Place::new();
    place.done(&train("--rank 1 --alpha 16"));
    place.write("out/adapter/burn_lora.json", "{\"base\": ");
    let use_it = "--model model --adapter out/adapter";
    for command in [
        format!("evaluate {use_it} --data data/valid.jsonl"),
        format!("generate {use_it} --prompt a --max-tokens 1"),
        format!("merge {use_it} --out merged"),
        format!("train {use_it} --data data --workers 1 --iters 1 --out more"),
    ] {
        let (_, err) = place.done(&command);
        let expected = "warning: out/adapter/burn_lora.json: ";
        assert!(err.starts_with(expected) && err.lines().count() == 1, "{command}: {err}");
    }
    // The training writes whole ones.
    assert_eq!(place.json("more/adapter/burn_lora.json")["max_length"], 64);
}

#[test]
fn d6_files_say_which_base_they_are_for() {
    let place = Place::new();
    place.done(&train(""));
    let config = place.json("out/adapter/adapter_config.json");
    assert_eq!(config["base_model_name_or_path"], "model");
    assert_eq!(config["task_type"], "CAUSAL_LM");
    assert_eq!(place.json("out/adapter/burn_lora.json")["max_length"], 64);

    // In the hub's cache, a model has the name that it has there.
    let cached = "hub/models--org--tiny-1B/snapshots/0123abc";
    place.model(cached, "llama3");
    place.done(&train(&format!("--model {cached} --out of_hub")));
    let config = place.json("of_hub/adapter/adapter_config.json");
    assert_eq!(config["base_model_name_or_path"], "org/tiny-1B");

    // The same weights are the same base, wherever they are.
    let uses = |model: &str, adapter: &str| {
        let generate =
            format!("generate --model {model} --adapter {adapter} --prompt a --max-tokens 2");
        let evaluate =
            format!("evaluate --model {model} --adapter {adapter} --data data/valid.jsonl");
        let merge = format!("merge --model {model} --adapter {adapter} --out merged");
        [generate, evaluate, merge].map(|command| place.done(&command).1)
    };
    assert_eq!(uses(cached, "out/adapter"), ["", "", ""]);
    assert_eq!(uses("./model", "of_hub/adapter"), ["", "", ""]);
    // Others of the same shapes are not: the merged model, for one.
    place.done(&train("--learning-rate 0.05 --force"));
    place.done("merge --model model --adapter out/adapter --out changed");
    for err in uses("changed", "out/adapter") {
        let expected = "warning: out/adapter: the adapters were trained on `model`, and `changed` has other weights\n";
        assert_eq!(err, expected);
    }
    let again = train("--model changed --out again --adapter out/adapter").replace("--rank 2", "");
    assert!(place.done(&again).1.contains("`changed` has other weights"));

    // Those of PEFT have only the name.
    fs::remove_file(place.path("of_hub/adapter/burn_lora.json")).unwrap();
    assert_eq!(uses(cached, "of_hub/adapter"), ["", "", ""]);
    let named = "warning: of_hub/adapter: the adapters name `org/tiny-1B` as their base, and the model is `changed`\n";
    assert_eq!(uses("changed", "of_hub/adapter"), [named; 3]);
    place.model("models/tiny-1B-copy", "llama3");
    assert_eq!(uses("models/tiny-1B-copy", "of_hub/adapter"), ["", "", ""]);
    let mut config = place.json("of_hub/adapter/adapter_config.json");
    config["base_model_name_or_path"] = Value::Null;
    place.write("of_hub/adapter/adapter_config.json", config.to_string());
    assert_eq!(uses("changed", "of_hub/adapter"), ["", "", ""]);
}

#[test]
fn d6_files_of_weights_that_are_not_read_make_no_other_base() {
    let place = Place::new();
    place.done(&train(""));
    // A merge into the directory of a model in several files leaves these.
    let shard = fs::read(place.path("model/model.safetensors")).unwrap();
    place.write("merged/model-00001-of-00002.safetensors", &shard[..100]);
    place.done("merge --model model --adapter out/adapter --out merged");
    place.done(&train("--model merged --out more"));
    place.model("elsewhere", "llama3");
    let merged = fs::read(place.path("merged/model.safetensors")).unwrap();
    place.write("elsewhere/model.safetensors", &merged);
    let generate = "generate --model elsewhere --adapter more/adapter --prompt a --max-tokens 1";
    assert_eq!(place.done(generate).1, "");
    // Those that an index lists are read, whatever their names are.
    let header = u64::from_le_bytes(merged[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&merged[8..8 + header]).unwrap();
    let names = header.as_object().unwrap().keys().filter(|it| *it != "__metadata__");
    let map: serde_json::Map<_, _> =
        names.map(|it| (it.clone(), json!("part.safetensors"))).collect();
    fs::rename(place.path("elsewhere/model.safetensors"), place.path("elsewhere/part.safetensors"))
        .unwrap();
    let index = json!({ "weight_map": map }).to_string();
    place.write("elsewhere/model.safetensors.index.json", index);
    assert_eq!(place.done(generate).1, "");
    place.write("elsewhere/part.safetensors", shard);
    assert!(place.done(generate).1.contains("`elsewhere` has other weights"));
}
