//! Models in several GGUF files.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};
use tempfile::TempDir;

use burn_lora_llm::{chat::Chat, gguf::open, pretrained};

use super::{Made, assert_holds, gguf, refusal, scores};

/// The name of a part, from 1 on.
fn name(number: usize, count: usize) -> String {
    format!("a-{number:05}-of-{count:05}.gguf")
}

/// Writes the parts of a model. `change` is given the number of each, from 1 on, and its fields.
fn write(
    dir: &Path,
    count: usize,
    change: impl Fn(usize, &mut Map<String, Value>),
) -> Vec<PathBuf> {
    let whole = Made::new();
    let write = |number: usize| {
        let mut fields = if number == 1 { gguf::fields() } else { Map::new() };
        fields.insert("split.no".to_owned(), json!(number - 1));
        fields.insert("split.count".to_owned(), json!(count));
        fields.insert("split.tensors.count".to_owned(), json!(whole.tensors.len()));
        change(number, &mut fields);
        let made = Made::new().with(|it| {
            let mut index = 0;
            // A first part may have fields alone.
            it.tensors.retain(|_, _| {
                index += 1;
                (index - 1) % (count - 1) + 2 == number
            });
        });
        let path = dir.join(name(number, count));
        fs::write(&path, gguf::bytes(&made, &fields, false)).unwrap();
        path
    };
    (1..=count).map(write).collect()
}

#[test]
fn any_part_stands_for_all() {
    let (_dir, whole) = gguf::write(&Made::new(), |_| ());
    let expected = scores(&whole);
    for count in [2, 3, 12] {
        let dir = TempDir::new().unwrap();
        let parts = write(dir.path(), count, |_, _| ());
        if count == 3 {
            assert_eq!(scores(&parts[1]), expected);
        }
        for path in [&parts[0], &parts[1], &parts[count - 1]] {
            assert_eq!(Chat::read(path).unwrap().encode("<|im_end|>", false).unwrap(), [2]);
            assert_eq!(pretrained::weight_files(path).unwrap(), parts);
            let [file, whole] = [path, &whole].map(|path| open(path).unwrap());
            assert!(file.tensors.keys().eq(whole.tensors.keys()));
            for name in file.tensors.keys() {
                assert_eq!(file.bytes(name).unwrap(), whole.bytes(name).unwrap(), "{name}");
            }
        }
    }
    // A model in one file says so, too.
    let (_dir, one) = gguf::write(&Made::new(), |fields| {
        fields.insert("split.no".to_owned(), json!(0));
        fields.insert("split.count".to_owned(), json!(1));
    });
    assert_eq!(scores(&one), expected);
    assert_eq!(pretrained::weight_files(&one).unwrap(), [one]);
}

/// The `gguf` package wrote the parts.
#[test]
fn parts_that_python_wrote_are_the_whole() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let whole = fixtures.join("llama/fixtures/qwen3.gguf");
    for number in 1..=3 {
        let part = format!("gguf/fixtures/split/qwen3-{number:05}-of-00003.gguf");
        assert_eq!(scores_of(&fixtures.join(part)), scores_of(&whole));
    }
}

/// All numbers of the model.
fn scores_of(path: &Path) -> Vec<(String, Vec<u8>)> {
    let file = open(path).unwrap();
    file.tensors.keys().map(|name| (name.clone(), file.bytes(name).unwrap())).collect()
}

#[test]
fn missing_and_renamed_parts_are_named() {
    let dir = TempDir::new().unwrap();
    let parts = write(dir.path(), 3, |_, _| ());
    let there = |number: usize| dir.path().join(name(number, 3)).display().to_string();
    for missing in 1..=3 {
        let bytes = fs::read(&parts[missing - 1]).unwrap();
        fs::remove_file(&parts[missing - 1]).unwrap();
        for given in (1..=3).filter(|&it| it != missing) {
            let error = refusal(&parts[given - 1]);
            let is_part = format!("{}: it is part {given} of a model in 3 files", there(given));
            assert_eq!(error, format!("{is_part}, and {} is missing", there(missing)));
            assert_eq!(Chat::read(&parts[given - 1]).err(), Some(error));
        }
        fs::write(&parts[missing - 1], bytes).unwrap();
    }
    let renamed = dir.path().join("renamed.gguf");
    fs::copy(&parts[1], &renamed).unwrap();
    let problem = "renamed.gguf: it is part 2 of a model in 3 files; its name must end in `-00002-of-00003.gguf`";
    assert_holds(&refusal(&renamed), problem);

    // Parts that do not belong together.
    fs::copy(&parts[2], &parts[1]).unwrap();
    let problem = "a-00002-of-00003.gguf: by its name it is part 2 of 3, and by `split.no` and `split.count` part 3";
    assert_holds(&refusal(&parts[0]), problem);
    fs::write(&parts[1], gguf::bytes(&Made::new(), &gguf::fields(), false)).unwrap();
    assert_holds(&refusal(&parts[0]), "a-00002-of-00003.gguf: `split.count` is missing");
    fs::write(&parts[1], "GGUF\x03\0\0\0").unwrap();
    assert_holds(&refusal(&parts[2]), "a-00002-of-00003.gguf: it ends too early");
    let mut fields = Map::new();
    fields.insert("split.no".to_owned(), json!(1));
    fields.insert("split.count".to_owned(), json!(3));
    fs::write(&parts[1], gguf::bytes(&Made::new(), &fields, false)).unwrap();
    let problem = format!("is also in {}", there(2));
    assert_holds(&refusal(&parts[0]), &problem);
}

#[test]
fn counts_of_parts_and_tensors_are_checked() {
    let dir = TempDir::new().unwrap();
    let refused = |key: &str, value: Value| {
        let parts = write(dir.path(), 3, |number, fields| {
            if number == 1 {
                fields[key] = value.clone();
            }
        });
        refusal(&parts[0])
    };
    let error = refused("split.tensors.count", json!(99));
    assert_holds(
        &error,
        "by `split.tensors.count` the model has 99 tensors, and its 3 files have 20",
    );
    for (key, value, problem) in [
        ("split.no", json!(3), "`split.no` is 3, and by `split.count` there are 3 parts"),
        ("split.no", json!("x"), "`split.no` is \"x\""),
        ("split.no", json!(-1.0), "`split.no` is -1.0"),
        ("split.count", json!("x"), "`split.count` is \"x\""),
        ("split.tensors.count", json!([]), "`split.tensors.count` is []"),
        (
            "split.count",
            json!(4),
            "it is part 1 of a model in 4 files; its name must end in `-00001-of-00004.gguf`",
        ),
    ] {
        assert_holds(&refused(key, value), &format!("a-00001-of-00003.gguf: {problem}"));
    }
    let parts = write(dir.path(), 3, |number, fields| {
        if number == 1 {
            fields.remove("split.no");
        }
    });
    assert_holds(&refusal(&parts[0]), "a-00001-of-00003.gguf: `split.no` is missing");
}
