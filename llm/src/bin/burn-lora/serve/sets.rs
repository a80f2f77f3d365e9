//! The sets of adapters that can be asked for, and what is wrong with those that cannot.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
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
    /// What the directories were of those that were last looked at and can be loaded.
    seen: BTreeMap<String, Stamp>,
}

/// The files in a directory. It differs if one of them is replaced or written to.
type Stamp = Vec<(OsString, u64, Option<SystemTime>)>;

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

/// The files that are in the directory now.
fn stamp(dir: &Path) -> Stamp {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let files = entries.filter_map(|entry| {
        // Links are followed.
        let file = fs::metadata(entry.path()).ok()?;
        Some((entry.file_name(), file.len(), file.modified().ok()))
    });
    let mut files: Vec<_> = files.collect();
    files.sort();
    files
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
        if sets.names().is_empty() {
            eprintln!("warning: {}: there are no adapters yet", root.display());
        }
        sets.look();
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
        let failed = match &found {
            Ok(set) => {
                self.compare(set);
                let stale = self.store.problems().into_iter().find(|(stale, _)| stale == name);
                stale.map(|(_, problem)| match self.only_alone(set) {
                    None => format!("{problem}; the set that was there before answers"),
                    Some(_) => problem,
                })
            }
            Err(LoraError::UnknownAdapters { .. }) => None,
            Err(error) => Some(error.to_string()),
        };
        if failed.is_some() || found.is_err() {
            self.known().seen.remove(name);
        }
        let alone = || found.as_ref().ok().and_then(|set| self.only_alone(set));
        self.note(name, failed.or_else(alone));
        found
    }

    /// Why the set cannot answer beside others, and what to do; `None` if it can.
    pub fn only_alone(&self, set: &StoredAdapters<Plain>) -> Option<String> {
        set.not_mixable.as_ref()?;
        let what = match set.adapters.iter().any(|(_, adapter)| adapter.magnitude.is_some()) {
            true => "DoRA's magnitudes",
            false => "parameters that were trained in full",
        };
        let dir = self.root.join(&set.name);
        Some(format!(
            "{}: the set has {what}, which cannot be served beside other sets: make a model of it by `burn-lora \
             merge`, or use it by `burn-lora generate`",
            dir.display()
        ))
    }

    /// The names of the sets that cannot be used, or not as they are in their directories now, and why. Those that
    /// are new or have changed are looked at first.
    pub fn problems(&self) -> BTreeMap<String, String> {
        self.look();
        self.known().problems.clone()
    }

    /// Looks at the sets that are new, have changed, or could not be loaded, and notes what is wrong. The others are
    /// not loaded for this: they would take the memory of those in use.
    fn look(&self) {
        let names = self.names();
        let gone: Vec<_> = {
            let known = self.known();
            known.problems.keys().filter(|it| !names.contains(it)).cloned().collect()
        };
        for name in gone {
            // It is noted that there is nothing wrong any more.
            let _ = self.get(&name);
        }
        for name in names {
            let stamp = stamp(&self.root.join(&name));
            let is_seen = self.known().seen.get(&name) == Some(&stamp);
            // What is wrong is noted.
            if !is_seen && self.get(&name).is_ok() {
                self.known().seen.insert(name, stamp);
            }
        }
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
