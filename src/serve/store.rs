//! The adapters in the directories of a server: loaded when they are asked for, loaded again when they
//! change, and dropped when others need their memory.

use std::{
    collections::BTreeMap,
    fmt, fs,
    path::{Component, Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use burn::{module::Module, tensor::backend::Backend};

use super::{MemoryReport, MultiLora};
use crate::{
    adapters::{LoraAdapters, renaming::Renaming},
    error::LoraError,
    files::{Identity, identity},
    formats,
    model::{Lora, LoraModule},
};

/// How often a set is read that others replace in the meantime.
const ATTEMPTS: usize = 20;

/// Sets of adapters by the names of their directories, shared between threads.
///
/// ```no_run
/// use burn::{module::Module, tensor::backend::Backend};
/// use burn_lora::{LoraError, serve::AdapterStore};
///
/// fn answer<B: Backend, M: Module<B>>(base: M) -> Result<(), LoraError> {
///     // At most 1 GB of adapters; those that were not asked for for the longest time go first.
///     let store = AdapterStore::open("adapters", base, 1_000_000_000)?;
///     let set = store.get("polite")?; // adapters/polite/adapter_config.json, ...
///     println!("{} answers with the bits {}", set.name, set.fingerprint);
///     Ok(())
/// }
/// ```
///
/// A set is loaded when it is asked for the first time, and again when its files have changed. It is loaded
/// as a whole, or the old one stays, and [`problems`](Self::problems) tells why. What was handed out stays as it
/// is, for as long as it is in use: no lock is held meanwhile. A set that was dropped to make room has nothing to
/// stay in its place.
///
/// A set that no batch of several sets can hold, such as one with a new head, is
/// [not mixable](StoredAdapters::not_mixable). It is kept like the others, and [`model`](Self::model) uses it alone.
///
/// Only directories directly below the root are read, which hold the files of PEFT or mlx-lm. Hidden ones, and
/// links out of the root, are none.
pub struct AdapterStore<B: Backend, M> {
    /// Without links.
    root: PathBuf,
    /// Loads one set at a time, and checks that it fits.
    base: Mutex<MultiLora<B, M>>,
    names: Option<Renaming>,
    budget: usize,
    resident: Mutex<Resident<B>>,
}

/// A set of adapters as it was in its directory.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct StoredAdapters<B: Backend> {
    /// The name of its directory.
    pub name: String,
    /// The adapters.
    pub adapters: LoraAdapters<B>,
    /// [What](LoraAdapters::fingerprint) distinguishes these adapters from all others.
    pub fingerprint: String,
    /// Why no [`MultiLora`] takes this set, and what to do; `None` if one does.
    pub not_mixable: Option<String>,
}

/// What is in memory.
struct Resident<B: Backend> {
    sets: BTreeMap<String, Entry<B>>,
    /// Counts the calls, to find out what was not used for the longest time.
    clock: u64,
}

struct Entry<B: Backend> {
    set: Arc<StoredAdapters<B>>,
    bytes: usize,
    stamp: Stamp,
    used: u64,
    /// The files that could not be loaded in its place, and why.
    problem: Option<(Stamp, String)>,
}

/// Which files there are. It differs if one of them is replaced or written to.
#[derive(Clone, Debug, PartialEq)]
struct Stamp(Vec<Option<(Identity, u64, Option<SystemTime>)>>);

impl<B: Backend, M: Module<B>> AdapterStore<B, M> {
    /// A store of the adapters in the directories in `root`, which fit `base`. They take at most `budget` bytes
    /// of memory, besides those that are in use.
    ///
    /// # Errors
    ///
    /// If `root` is not a directory, and as for [`MultiLora::new`].
    pub fn open(root: impl AsRef<Path>, base: M, budget: usize) -> Result<Self, LoraError> {
        let root = root.as_ref();
        let io = |source| LoraError::Io { path: root.to_owned(), source };
        let root = fs::canonicalize(root).map_err(io)?;
        fs::read_dir(&root).map_err(io)?;
        Ok(Self {
            root,
            base: Mutex::new(MultiLora::new(base)?),
            names: None,
            budget,
            resident: Mutex::new(Resident { sets: BTreeMap::new(), clock: 0 }),
        })
    }

    /// The same store, whose files have other names: they are renamed as they are loaded. Like every [`Renaming`], this
    /// one goes from the names in the files to the paths of the model. A set need not have all of the names: it is as
    /// if the renaming were [partial](Renaming::partial).
    pub fn with_names(mut self, names: Renaming) -> Self {
        self.names = Some(names.partial());
        self
    }

    /// The set in the directory `name`.
    ///
    /// # Errors
    ///
    /// [`LoraError::UnknownAdapters`] if there is no such directory directly below the root. If nothing of that name
    /// is in memory: as for [`LoraAdapters::load`] and [`LoraModule::switch`], and if the set is larger than the
    /// store.
    pub fn get(&self, name: &str) -> Result<Arc<StoredAdapters<B>>, LoraError> {
        let Some(dir) = self.find(name) else {
            self.resident().sets.remove(name);
            let (names, available) = (vec![name.to_owned()], self.list());
            return Err(LoraError::UnknownAdapters { names, available });
        };
        // Before the lock is taken: a disk may be slow.
        let stamp = self.stamp(&dir);
        if let Some(set) = self.resident().current(name, &stamp) {
            return Ok(set);
        }
        let mut base = unpoisoned(&self.base);
        // Another thread may have loaded it.
        let before = self.stamp(&dir);
        if let Some(set) = self.resident().current(name, &before) {
            return Ok(set);
        }
        match self.load(&dir, name, &mut base) {
            Ok((set, stamp)) => Ok(self.resident().insert(set, stamp, self.budget)),
            Err(error) => self.resident().keep(name, before, error),
        }
    }

    /// The base with the set in the directory `name` alone, whether a batch can hold it or not. The weights of the
    /// base are shared, not copied.
    ///
    /// # Errors
    ///
    /// As for [`get`](Self::get).
    pub fn model(&self, name: &str) -> Result<Lora<B, M>, LoraError> {
        let set = self.get(name)?;
        unpoisoned(&self.base).base().switch(&set.adapters)
    }

    /// The names of the directories that hold adapters, in alphabetical order.
    pub fn list(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.root).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let holds_adapters =
            |name: &String| self.find(name).is_some_and(|dir| dir.join(formats::CONFIG).is_file());
        let mut names: Vec<_> = names.filter(holds_adapters).collect();
        names.sort();
        names
    }

    /// The sets that are in memory, by name, with the bytes of their parameters.
    pub fn resident_bytes(&self) -> Vec<(String, usize)> {
        let resident = self.resident();
        resident.sets.iter().map(|(name, entry)| (name.clone(), entry.bytes)).collect()
    }

    /// What the base and the sets that are in memory take.
    pub fn memory(&self) -> MemoryReport {
        let base = unpoisoned(&self.base).memory().base;
        MemoryReport { base, sets: self.resident_bytes() }
    }

    /// Why sets whose files have changed were not loaded again, by name.
    pub fn problems(&self) -> Vec<(String, String)> {
        let resident = self.resident();
        let problem = |(name, entry): (&String, &Entry<B>)| {
            entry.problem.as_ref().map(|(_, problem)| (name.clone(), problem.clone()))
        };
        resident.sets.iter().filter_map(problem).collect()
    }

    /// The directory of that name, if it is one with adapters in the root.
    fn find(&self, name: &str) -> Option<PathBuf> {
        let mut parts = Path::new(name).components();
        let is_name = matches!(
            (parts.next(), parts.next()),
            (Some(Component::Normal(part)), None) if part == name
        );
        if !is_name || name.starts_with('.') {
            return None;
        }
        let dir = fs::canonicalize(self.root.join(name)).ok()?;
        let within = |path: &Path| path.starts_with(&self.root);
        let is_inside = |file: &&str| match fs::canonicalize(dir.join(file)) {
            Ok(file) => within(&file),
            Err(_) => true,
        };
        (within(&dir) && dir.is_dir() && formats::FILES.iter().all(is_inside)).then_some(dir)
    }

    fn stamp(&self, dir: &Path) -> Stamp {
        let stamp = |file: &&str| {
            let file = fs::metadata(dir.join(file)).ok()?;
            Some((identity(&file), file.len(), file.modified().ok()))
        };
        Stamp(formats::FILES.iter().map(stamp).collect())
    }

    fn load(
        &self,
        dir: &Path,
        name: &str,
        base: &mut MultiLora<B, M>,
    ) -> Result<(StoredAdapters<B>, Stamp), LoraError> {
        let device = base.base().devices().into_iter().next().unwrap_or_default();
        let invalid =
            |problem: String| LoraError::InvalidFile { file: dir.display().to_string(), problem };
        for _ in 0..ATTEMPTS {
            let before = self.stamp(dir);
            let loaded = LoraAdapters::load(dir, &device);
            if self.stamp(dir) != before {
                continue;
            }
            let loaded = loaded?;
            let adapters = match &self.names {
                Some(names) => loaded.renamed(names)?,
                None => loaded,
            };
            let (bytes, budget) = (adapters.num_bytes(), self.budget);
            if bytes > budget {
                let problem =
                    format!("its adapters take {bytes} bytes, and the store has {budget}");
                return Err(invalid(problem));
            }
            let not_mixable = match base.insert(name, &adapters) {
                Err(error @ LoraError::NotMixable { .. }) => {
                    base.base().switch(&adapters)?;
                    Some(error.to_string())
                }
                inserted => inserted.map(|()| None)?,
            };
            base.remove(name);
            let (name, fingerprint) = (name.to_owned(), adapters.fingerprint());
            let set = StoredAdapters { name, adapters, fingerprint, not_mixable };
            return Ok((set, before));
        }
        Err(invalid("it is replaced again and again; load it when nothing writes to it".to_owned()))
    }

    fn resident(&self) -> MutexGuard<'_, Resident<B>> {
        unpoisoned(&self.resident)
    }
}

/// The value, also after a thread that held the lock has panicked: what is behind these locks is whole at any
/// time.
fn unpoisoned<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<B: Backend> Resident<B> {
    /// The set, if it is what the files are, or these could not be loaded before.
    fn current(&mut self, name: &str, stamp: &Stamp) -> Option<Arc<StoredAdapters<B>>> {
        let entry = self.sets.get_mut(name)?;
        let failed = entry.problem.as_ref().is_some_and(|(failed, _)| failed == stamp);
        if entry.stamp != *stamp && !failed {
            return None;
        }
        if !failed {
            entry.problem = None;
        }
        self.clock += 1;
        entry.used = self.clock;
        Some(entry.set.clone())
    }

    /// Adds the set, and removes those that were not used for the longest time, until all fit.
    fn insert(
        &mut self,
        set: StoredAdapters<B>,
        stamp: Stamp,
        budget: usize,
    ) -> Arc<StoredAdapters<B>> {
        self.clock += 1;
        let (bytes, set, used) = (set.adapters.num_bytes(), Arc::new(set), self.clock);
        let entry = Entry { set: set.clone(), bytes, stamp, used, problem: None };
        self.sets.insert(set.name.clone(), entry);
        while self.sets.values().map(|entry| entry.bytes).sum::<usize>() > budget {
            let oldest = self.sets.iter().min_by_key(|(_, entry)| entry.used);
            let name = oldest.expect("the new one alone fits").0.clone();
            self.sets.remove(&name);
        }
        set
    }

    /// The old set, if there is one, and else the error.
    fn keep(
        &mut self,
        name: &str,
        stamp: Stamp,
        error: LoraError,
    ) -> Result<Arc<StoredAdapters<B>>, LoraError> {
        let Some(entry) = self.sets.get_mut(name) else { return Err(error) };
        entry.problem = Some((stamp, error.to_string()));
        Ok(entry.set.clone())
    }
}

impl<B: Backend, M> fmt::Debug for AdapterStore<B, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = unpoisoned(&self.resident).sets.keys().cloned().collect();
        f.debug_struct("AdapterStore")
            .field("root", &self.root)
            .field("budget", &self.budget)
            .field("resident", &names)
            .finish_non_exhaustive()
    }
}
