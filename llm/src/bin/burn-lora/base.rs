//! Which model adapters are for: its name, and what distinguishes its weights from those of others.

use std::{
    fs::{self, File},
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use burn_lora::{LoraAdapters, gguf::Family};
use burn_lora_llm::{
    Context, Result, gguf,
    pretrained::{self, weight_files},
};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::{backend::Plain, hex, remembered::Remembered};

/// Files of up to so many bytes are hashed as a whole.
const WHOLE: u64 = 16 << 20;

/// Of larger ones, so many stretches of so many bytes are, spread evenly: a hash of all would take longer than the
/// reading. Any training changes numbers in all of them.
const STRETCHES: u64 = 1024;
const STRETCH: u64 = 16 << 10;

/// The model that adapters are put on.
pub struct Base {
    /// Its name on the hub if it is in the hub's cache, and otherwise its path as it was given.
    /// PEFT's `AutoPeftModelForCausalLM` loads it by this.
    pub name: String,
    /// What distinguishes its weights from those of others, if there are any.
    pub fingerprint: Option<String>,
    path: PathBuf,
}

impl Base {
    /// What is known of the model at `path`, a directory or a GGUF file.
    ///
    /// # Errors
    ///
    /// If its weights cannot be read.
    pub fn of(path: &Path) -> Result<Self> {
        let mut hash = Sha256::new();
        let files = weight_files(path)?;
        for file in &files {
            add(&mut hash, file).context(file.display())?;
        }
        let name = hub_name(path).unwrap_or_else(|| path.display().to_string());
        let fingerprint = (!files.is_empty()).then(|| hex(&hash.finalize()));
        Ok(Self { name, fingerprint, path: path.to_owned() })
    }

    /// How its layers are called in files of llama.cpp's.
    ///
    /// # Errors
    ///
    /// If llama.cpp has no such models.
    pub fn family(&self) -> Result<Family> {
        gguf::family(&pretrained::config(&self.path)?)
    }

    /// What to tell of adapters in `dir` that are those of another model. By the weights, if it is known on which
    /// they were trained, and otherwise by the name.
    pub fn other(
        &self,
        dir: &Path,
        set: &LoraAdapters<Plain>,
        remembered: Option<&Remembered>,
    ) -> Option<String> {
        let (dir, name) = (dir.display(), &self.name);
        match (remembered.and_then(|it| it.base.as_ref()), &self.fingerprint) {
            (Some(then), Some(now)) if then == now => None,
            (Some(_), Some(_)) => Some(format!(
                "{dir}: the adapters were trained on `{}`, and `{name}` has other weights",
                set.base_model().unwrap_or("another model"),
            )),
            _ => {
                let named = set.base_model()?;
                (!self.may_be(named)).then(|| {
                    format!("{dir}: the adapters name `{named}` as their base, and the model is `{name}`")
                })
            }
        }
    }

    /// Whether a file that names `named` may mean this model.
    fn may_be(&self, named: &str) -> bool {
        let is_same = |path: &Path| {
            path.canonicalize().is_ok_and(|it| self.path.canonicalize().is_ok_and(|own| own == it))
        };
        if self.name == named || is_same(Path::new(named)) {
            return true;
        }
        let of_config = || {
            let text = fs::read(self.path.join("config.json")).ok()?;
            let config: Value = serde_json::from_slice(&text).ok()?;
            Some(config["_name_or_path"].as_str()? == named)
        };
        // A copy of a model of the hub usually keeps the end of its name, which says what it is if it has a size or
        // a version: `SmolLM2-135M-Instruct.Q4_1.gguf`, but not `model`.
        let end = |name: &str| name.trim_end_matches('/').rsplit('/').next().map(str::to_lowercase);
        let (own, other) = (end(&self.name).unwrap_or_default(), end(named).unwrap_or_default());
        let tells =
            other.contains(|it: char| it.is_ascii_digit()) && !other.starts_with("checkpoint");
        (tells && own.starts_with(&other)) || of_config().unwrap_or(false)
    }
}

/// The name of a model in the hub's cache, which is a part of its path there.
fn hub_name(path: &Path) -> Option<String> {
    let mut parts = path.components().rev().map(|it| it.as_os_str().to_string_lossy());
    let (_revision, snapshots, model) = (parts.next()?, parts.next()?, parts.next()?);
    let name = model.strip_prefix("models--").filter(|_| snapshots == "snapshots")?;
    Some(name.replacen("--", "/", 1))
}

fn add(hash: &mut Sha256, path: &Path) -> std::io::Result<()> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    hash.update(length.to_le_bytes());
    let mut bytes = Vec::new();
    if length <= WHOLE {
        file.read_to_end(&mut bytes)?;
        hash.update(&bytes);
        return Ok(());
    }
    for stretch in 0..STRETCHES {
        file.seek(SeekFrom::Start(stretch * (length - STRETCH) / (STRETCHES - 1)))?;
        bytes.clear();
        file.by_ref().take(STRETCH).read_to_end(&mut bytes)?;
        hash.update(&bytes);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn d6_large_files_are_told_apart_by_stretches() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        let length = 2 * WHOLE + 12345;
        let hash = |length: u64, changed: Option<u64>| {
            let mut file = File::create(&path).unwrap();
            file.set_len(length).unwrap();
            if let Some(place) = changed {
                file.seek(SeekFrom::Start(place)).unwrap();
                file.write_all(&[7]).unwrap();
            }
            Base::of(&path).unwrap().fingerprint.unwrap()
        };
        let plain = hash(length, None);
        let others =
            [hash(length, Some(0)), hash(length, Some(length - 1)), hash(length + 1, None)];
        assert!(others.iter().all(|other| *other != plain && other.len() == 32));
        assert_eq!(hash(length, None), plain);
    }

    #[test]
    fn d6_a_model_has_its_name_on_the_hub() {
        for (path, expected) in [
            ("/x/models--org--tiny-1B/snapshots/0123abc", Some("org/tiny-1B")),
            ("models--gpt2/snapshots/0123abc", Some("gpt2")),
            ("models--org--a--b/snapshots/0123abc", Some("org/a--b")),
            ("org/tiny-1B", None),
            ("/x/models--org--tiny/blobs/0123abc", None),
            ("model.gguf", None),
        ] {
            assert_eq!(hub_name(Path::new(path)).as_deref(), expected, "{path}");
        }
    }

    #[test]
    fn d6_a_copy_keeps_the_end_of_its_name() {
        let base = |name: &str| Base { name: name.into(), fingerprint: None, path: name.into() };
        for (own, named, expected) in [
            ("org/tiny-1B", "org/tiny-1B", true),
            (
                "smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "HuggingFaceTB/SmolLM2-135M-Instruct",
                true,
            ),
            ("models/tiny-1b/", "org/Tiny-1B", true),
            ("models/tiny-1B", "org/tiny-1B-Instruct", false),
            ("a/model", "b/model", false),
            ("a/checkpoint-500", "b/checkpoint-500", false),
            ("org/other", "org/tiny-1B", false),
        ] {
            assert_eq!(base(own).may_be(named), expected, "{own} {named}");
        }
    }
}
