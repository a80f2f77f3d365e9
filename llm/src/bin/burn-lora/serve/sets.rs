//! The sets of adapters that can be asked for, and what is wrong with those that cannot.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use burn_lora::{
    LoraError,
    serve::{AdapterStore, StoredAdapters},
};
use burn_lora_llm::{Context, Result, chat::Chat, llama::Llama};

use super::protocol::BASE;
use crate::{backend::Plain, base::Base, remembered::Remembered};

/// The file that makes a directory one of adapters.
const CONFIG: &str = "adapter_config.json";

pub struct Sets {
    root: PathBuf,
    store: AdapterStore<Plain, Llama<Plain>>,
    base: Base,
    chat: Arc<Chat>,
    known: Mutex<Known>,
}

/// What was told of the sets, by their names.
#[derive(Default)]
struct Known {
    problems: BTreeMap<String, String>,
    /// The fingerprints of those that were compared with the base.
    compared: BTreeMap<String, String>,
}

/// Fails if `root` is no directory with directories of adapters, before the model is read.
///
/// # Errors
///
/// If it cannot be read, is itself a set of adapters, or has one with the name of the base.
pub fn check(root: &Path) -> Result<()> {
    let holds_adapters = |path: &Path| path.join(CONFIG).is_file();
    let entries = fs::read_dir(root).context(root.display())?;
    let has_sets = entries.flatten().any(|entry| holds_adapters(&entry.path()));
    if holds_adapters(root) {
        let (dir, parent) = (root.display(), parent(root).display().to_string());
        if !has_sets {
            return Err(format!(
                "{dir}: it is itself a set of adapters; give the directory that it is in: `--adapters {parent}`"
            ));
        }
        eprintln!("warning: {dir}: the set in it is not served, only those in its directories");
    }
    let base = root.join(BASE);
    match holds_adapters(&base) {
        true => Err(format!(
            "{}: `{BASE}` is the name of the model without adapters; rename the directory",
            base.display()
        )),
        false => Ok(()),
    }
}

/// The directory that `dir` is in.
fn parent(dir: &Path) -> PathBuf {
    match (dir.file_name(), dir.parent()) {
        (Some(_), Some(parent)) if parent.as_os_str().is_empty() => PathBuf::from("."),
        (Some(_), Some(parent)) => parent.to_owned(),
        // `.` and `..` have no names.
        _ => dir.join(".."),
    }
}

impl Sets {
    /// The sets in `root`, which take at most `bytes` of memory. All are looked at, and what is wrong is told.
    pub fn open(
        root: &Path,
        bytes: usize,
        llama: Llama<Plain>,
        base: Base,
        chat: Arc<Chat>,
    ) -> Result<Self> {
        let store = AdapterStore::open(root, llama, bytes).map_err(|error| error.to_string())?;
        let sets = Self { root: root.to_owned(), store, base, chat, known: Mutex::default() };
        let names = sets.names();
        if names.is_empty() {
            eprintln!("warning: {}: there are no adapters yet", root.display());
        }
        for name in names {
            // What is wrong is noted.
            let _ = sets.get(&name);
        }
        Ok(sets)
    }

    /// The names of the sets.
    pub fn names(&self) -> Vec<String> {
        let mut names = self.store.list();
        // The base answers under this name, whatever comes into the directory.
        names.retain(|name| name != BASE);
        names
    }

    /// The set of this name.
    pub fn get(&self, name: &str) -> std::result::Result<Arc<StoredAdapters<Plain>>, LoraError> {
        let found = self.store.get(name);
        let problem = match &found {
            Ok(set) => {
                self.compare(set);
                let stale = self.store.problems().into_iter().find(|(stale, _)| stale == name);
                stale
                    .map(|(_, problem)| format!("{problem}; the set that was there before answers"))
            }
            Err(LoraError::UnknownAdapters { .. }) => None,
            Err(error) => Some(error.to_string()),
        };
        self.note(name, problem);
        found
    }

    /// The names of the sets that cannot be used, or not as they are in their directories now, and why. These are
    /// looked at again first: they may have been mended.
    pub fn problems(&self) -> BTreeMap<String, String> {
        let names: Vec<_> = self.known().problems.keys().cloned().collect();
        for name in names {
            // What is wrong is noted.
            let _ = self.get(&name);
        }
        self.known().problems.clone()
    }

    /// The number of sets in memory, and of the bytes of their parameters.
    pub fn resident(&self) -> [usize; 2] {
        let resident = self.store.resident_bytes();
        [resident.len(), resident.iter().map(|(_, bytes)| bytes).sum()]
    }

    /// Notes what is wrong with a set, and tells it once.
    fn note(&self, name: &str, problem: Option<String>) {
        let mut known = self.known();
        let before = known.problems.get(name);
        if before == problem.as_ref() {
            return;
        }
        match problem {
            Some(problem) => {
                // One line, whatever is in it.
                eprintln!("warning: adapters `{name}`: {}", problem.replace('\n', " "));
                known.problems.insert(name.to_owned(), problem);
            }
            None => {
                eprintln!("adapters `{name}`: the problem is gone");
                known.problems.remove(name);
            }
        }
    }

    /// Tells, once, of a set that is for another base.
    fn compare(&self, set: &StoredAdapters<Plain>) {
        let StoredAdapters { name, adapters, fingerprint, .. } = set;
        let before = self.known().compared.insert(name.clone(), fingerprint.clone());
        if before.as_ref() == Some(fingerprint) {
            return;
        }
        let dir = self.root.join(name);
        let remembered = Remembered::read(&dir);
        let unreadable = remembered.as_ref().err().cloned();
        let remembered = remembered.ok().flatten();
        let other = self.base.other(&dir, adapters, remembered.as_ref());
        let template = remembered.and_then(|it| it.other_template(&dir, &self.chat));
        for problem in unreadable.into_iter().chain(other).chain(template) {
            eprintln!("warning: {problem}");
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // What is behind the lock is whole at any time.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
