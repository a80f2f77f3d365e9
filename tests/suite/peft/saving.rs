//! A save replaces the adapters in one step, or leaves them as they were.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use burn_lora::{Lora, LoraAdapters, LoraError, LoraModule};

use super::{Model, TempDir, config, fixture, load, names};
use crate::model::{Plain, device};

#[test]
fn saving_replaces_the_adapters_and_keeps_other_files() {
    let dir = TempDir::new("replace");
    let path = dir.0.join("set");
    load("plain").save(&path).unwrap();
    assert_eq!(names(&path), ["adapter_config.json", "adapter_model.safetensors"]);
    fs::write(path.join("README.md"), "notes").unwrap();
    load("rslora").save(&path).unwrap();
    assert_eq!(names(&path), ["README.md", "adapter_config.json", "adapter_model.safetensors"]);
    assert_eq!(fs::read_to_string(path.join("README.md")).unwrap(), "notes");
    assert_eq!(names(&dir.0), ["set"]);
    let again = LoraAdapters::<Plain>::load(&path, &device::<Plain>()).unwrap();
    assert!(again.get("head").is_some() && again.get("fc1").is_none());
}

#[test]
fn a_failed_save_leaves_the_old_file() {
    let dir = TempDir::new("failed");
    let path = dir.0.join("set");
    load("plain").save(&path).unwrap();
    let before = fs::read(path.join("adapter_model.safetensors")).unwrap();

    let mut diverged = Model::<Plain>::base().attach(&config()).unwrap().into_inner();
    let mut adapter = diverged.fc1.adapter().unwrap().clone();
    adapter.b = adapter.b.map(|b| b * f32::NAN);
    diverged.fc1.set_adapter(Some(adapter));
    let error = Lora::new(diverged).adapters().save(&path).unwrap_err().to_string();
    let file = path.join("adapter_model.safetensors");
    let expected = format!("{}: the adapters hold NaN", file.display());
    assert!(error.contains(&expected), "{error}");
    assert_eq!(fs::read(path.join("adapter_model.safetensors")).unwrap(), before);

    // Nor is a directory of other things taken for one of adapters.
    fs::create_dir(path.join("other")).unwrap();
    let error = load("rslora").save(&path).unwrap_err().to_string();
    assert!(error.contains("holds other, which is not a file"), "{error}");
    assert_eq!(fs::read(path.join("adapter_model.safetensors")).unwrap(), before);
    assert_eq!(names(&dir.0), ["set"]);

    let error = load("plain").save(path.join("adapter_config.json")).unwrap_err();
    assert!(matches!(error, LoraError::Io { .. }));
    let nothing = LoraAdapters::<Plain>::new(BTreeMap::<String, _>::new());
    assert!(matches!(nothing.save(dir.0.join("new")), Err(LoraError::Unsupported { .. })));
    assert_eq!(names(&dir.0), ["set"]);
}

/// The backend does not matter to files, and this one is quick to start.
#[cfg(unix)]
fn load_on_cpu(dir: &Path) -> LoraAdapters<burn::backend::Flex> {
    LoraAdapters::load(dir, &Default::default()).unwrap()
}

/// Saves two sets in turn until it is killed, if it is told where.
#[cfg(unix)]
#[test]
#[ignore = "run by a_killed_save_leaves_one_set_whole"]
fn save_until_killed() {
    let path = PathBuf::from(std::env::var("SAVE_UNTIL_KILLED").unwrap());
    let sets = ["plain", "patterns"].map(|name| load_on_cpu(&fixture(name)));
    println!("\nready");
    for turn in 0.. {
        sets[turn % 2].save(&path).unwrap();
    }
}

#[cfg(unix)]
#[test]
fn a_killed_save_leaves_one_set_whole() {
    use std::{
        io::{BufRead, BufReader},
        process::{Command, Stdio},
        time::Duration,
    };

    let dir = TempDir::new("killed");
    let path = dir.0.join("set");
    load("plain").save(&path).unwrap();
    let mut seen = [0, 0];
    for turn in 0..200u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "peft::saving::save_until_killed", "--ignored", "--nocapture"])
            .env("SAVE_UNTIL_KILLED", &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap() == "ready"));
        // At any moment of one of the first saves.
        std::thread::sleep(Duration::from_micros((turn * 7_919) % 12_000));
        child.kill().unwrap();
        child.wait().unwrap();
        let set = load_on_cpu(&path);
        match (set.len(), set.get("fc1").unwrap().rank()) {
            (2, 4) => seen[0] += 1,
            (3, 2) => seen[1] += 1,
            mixed => panic!("a mixture was found: {mixed:?}"),
        }
    }
    assert!(seen.iter().all(|&count| count > 20), "saves were not met at work: {seen:?}");
}
