//! Stores of adapters: what is loaded, kept, replaced and refused.

use std::{
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use burn_lora::{
    Init, Lora, LoraAdapters, LoraConfig, LoraError, LoraModule,
    peft::Renaming,
    serve::{AdapterStore, MultiLora, StoredAdapters},
};
use tempfile::TempDir;

use crate::{
    model::{Mlp, Plain, device},
    oracle::{Matrix, assert_close, bits},
};

type Store = AdapterStore<Plain, Mlp<Plain>>;

/// A directory with the named sets, and the network that they are for.
fn root(names: &[&str]) -> (TempDir, Mlp<Plain>) {
    let (dir, base) = (TempDir::new().unwrap(), Mlp::new(&device::<Plain>()));
    for (seed, name) in names.iter().enumerate() {
        set(&base, seed as u64).save(dir.path().join(name)).unwrap();
    }
    (dir, base)
}

fn set(base: &Mlp<Plain>, seed: u64) -> LoraAdapters<Plain> {
    let config = LoraConfig::new(2, 3.0).with_init(Init::RandomBoth).with_seed(seed);
    base.attach(&config).unwrap().adapters()
}

fn open(dir: &Path, base: &Mlp<Plain>, budget: usize) -> Store {
    AdapterStore::open(dir, base.clone(), budget).unwrap()
}

/// The bits of all factors.
fn values(set: &LoraAdapters<Plain>) -> Vec<u32> {
    let factors = set.iter().flat_map(|(_, it)| [it.a.val(), it.b.val()]);
    factors.flat_map(bits).collect()
}

#[test]
fn a_changed_directory_is_loaded_again() {
    let (dir, base) = root(&["one", "two"]);
    let store = open(dir.path(), &base, 1 << 20);
    assert_eq!(store.list(), ["one", "two"]);
    assert!(store.resident_bytes().is_empty());
    let first = store.get("one").unwrap();
    assert_eq!(first.name, "one");
    assert_eq!(values(&first.adapters), values(&set(&base, 0)));
    assert_eq!(first.fingerprint, set(&base, 0).fingerprint());
    assert_ne!(first.fingerprint, store.get("two").unwrap().fingerprint);
    assert!(Arc::ptr_eq(&first, &store.get("one").unwrap()));
    let bytes = set(&base, 0).num_bytes();
    assert_eq!(store.resident_bytes(), [("one".to_owned(), bytes), ("two".to_owned(), bytes)]);

    set(&base, 7).save(dir.path().join("one")).unwrap();
    let second = store.get("one").unwrap();
    assert_eq!(values(&second.adapters), values(&set(&base, 7)));
    assert_ne!(second.fingerprint, first.fingerprint);
    // What is in use stays.
    assert_eq!(values(&first.adapters), values(&set(&base, 0)));

    fs::remove_dir_all(dir.path().join("one")).unwrap();
    let error = store.get("one").unwrap_err();
    assert_eq!(error.to_string(), "there are no adapters called `one`; there are `two`");
    assert_eq!(store.resident_bytes(), [("two".to_owned(), bytes)]);
}

#[test]
fn a_broken_directory_leaves_the_old_set() {
    let (dir, base) = root(&["one"]);
    let weights = dir.path().join("one/adapter_model.safetensors");
    let store = open(dir.path(), &base, 1 << 20);
    let first = store.get("one").unwrap();
    let whole = fs::read(&weights).unwrap();
    fs::write(&weights, &whole[..whole.len() / 2]).unwrap();
    for _ in 0..2 {
        assert!(Arc::ptr_eq(&first, &store.get("one").unwrap()));
        let problems = store.problems();
        assert_eq!(problems.len(), 1);
        assert_eq!(problems[0].0, "one");
        assert!(problems[0].1.contains("adapter_model.safetensors"), "{problems:?}");
    }
    fs::write(&weights, &whole).unwrap();
    assert_eq!(store.get("one").unwrap().fingerprint, first.fingerprint);
    assert!(store.problems().is_empty());

    // Nothing to fall back to.
    fs::write(&weights, &whole[..whole.len() / 2]).unwrap();
    let error = open(dir.path(), &base, 1 << 20).get("one").unwrap_err();
    assert!(matches!(error, LoraError::InvalidFile { .. }), "{error}");
}

#[test]
fn the_set_that_was_not_used_for_the_longest_time_goes() {
    let (dir, base) = root(&["a", "b", "c"]);
    let bytes = set(&base, 0).num_bytes();
    let store = open(dir.path(), &base, 2 * bytes + 1);
    let names = || store.resident_bytes().into_iter().map(|(name, _)| name).collect::<Vec<_>>();
    store.get("a").unwrap();
    store.get("b").unwrap();
    store.get("a").unwrap();
    store.get("c").unwrap();
    assert_eq!(names(), ["a", "c"]);
    let memory = store.memory();
    assert_eq!(memory.sets, store.resident_bytes());
    assert_eq!(memory.total(), base.parameters().base_bytes + 2 * bytes);
    let kept = store.get("b").unwrap();
    assert_eq!(names(), ["b", "c"]);
    assert_eq!(values(&kept.adapters), values(&set(&base, 1)));

    let error = open(dir.path(), &base, bytes - 1).get("a").unwrap_err().to_string();
    let expected = format!("its adapters take {bytes} bytes, and the store has {}", bytes - 1);
    assert!(error.ends_with(&expected), "{error}");
}

#[test]
fn what_does_not_fit_the_base_is_refused() {
    let (dir, base) = root(&["good"]);
    let misfit = set(&base, 0).get("blocks.0").unwrap().clone();
    LoraAdapters::new([("blocks.1", misfit)]).save(dir.path().join("misfit")).unwrap();
    let store = open(dir.path(), &base, 1 << 20);
    assert!(matches!(store.get("misfit").unwrap_err(), LoraError::Mismatch { .. }));
    store.get("good").unwrap();

    // A set that does not fit any more leaves the old one.
    let misfit = set(&base, 0).get("blocks.0").unwrap().clone();
    LoraAdapters::new([("blocks.1", misfit)]).save(dir.path().join("good")).unwrap();
    assert_eq!(store.get("good").unwrap().fingerprint, set(&base, 0).fingerprint());
    assert!(store.problems()[0].1.contains("blocks.1"), "{:?}", store.problems());

    let missing = AdapterStore::open(dir.path().join("none"), base, 1).unwrap_err();
    assert!(matches!(missing, LoraError::Io { .. }), "{missing}");
}

#[test]
fn s15_a_set_with_a_head_is_kept_and_used_alone() {
    let (dir, base) = root(&["plain"]);
    let random = LoraConfig::new(2, 3.0).with_init(Init::RandomBoth).with_targets(["blocks.0"]);
    let config = random.with_modules_to_save(["head"]);
    let mut tuned = base.attach(&config).unwrap().into_inner();
    let head = Matrix::random(7, 3, 5);
    tuned.head.base.weight =
        tuned.head.base.weight.map(|it| head.tensor::<Plain, 2>([7, 3], &it.device()));
    let tuned = Lora::new(tuned).train_only(&["head"]).unwrap();
    let set = tuned.adapters();
    set.save(dir.path().join("headed")).unwrap();

    let store = open(dir.path(), &base, 1 << 20);
    assert_eq!(store.get("plain").unwrap().not_mixable, None);
    let stored = store.get("headed").unwrap();
    let model = store.model("headed").unwrap();
    let found = model.head.base.weight.to_data().convert::<f64>().to_vec::<f64>().unwrap();
    assert_eq!(found, head.data);
    let x = || Matrix::random(4, 6, 9).tensor::<Plain, 2>([4, 6], &device::<Plain>());
    let expected = tuned.forward(x()).into_data().convert::<f64>().to_vec().unwrap();
    assert_close(model.forward(x()), &Matrix { rows: 4, cols: 3, data: expected }, 1e-6);

    // Only a batch of several refuses it, with remedies that there are.
    let error = MultiLora::new(base.clone()).unwrap().insert("headed", &stored.adapters);
    let error = error.unwrap_err();
    assert!(matches!(error, LoraError::NotMixable { .. }), "{error}");
    assert_eq!(stored.not_mixable.as_deref(), Some(&*error.to_string()));
    for remedy in ["base.switch(&set)", "AdapterStore::model", "without_modules_to_save"] {
        assert!(error.to_string().contains(remedy), "{error}");
    }
    let mut models = MultiLora::new(base.clone()).unwrap();
    models.insert("headed", &stored.adapters.without_modules_to_save()).unwrap();
    // One that does not fit is refused as before.
    let other = LoraAdapters::new([("blocks.1", set.get("blocks.0").unwrap().clone())]);
    other.save(dir.path().join("headed")).unwrap();
    assert_eq!(store.get("headed").unwrap().fingerprint, stored.fingerprint);
}

#[test]
fn files_with_other_names_are_renamed() {
    let (dir, base) = root(&[]);
    let names = Renaming::new([("layers", "blocks")]);
    set(&base, 3).renamed(&names.inverse()).unwrap().save(dir.path().join("foreign")).unwrap();
    let store = open(dir.path(), &base, 1 << 20);
    assert!(store.get("foreign").is_err());
    let store = store.with_names(names);
    assert_eq!(values(&store.get("foreign").unwrap().adapters), values(&set(&base, 3)));
}

#[test]
fn s9_a_store_renames_from_the_files_to_the_model_and_says_if_it_is_the_other_way() {
    let (dir, base) = root(&[]);
    let names = Renaming::new([("layers.*", "blocks.*"), ("classifier", "head")]);
    let head = LoraAdapters::new([("head", set(&base, 3).get("head").unwrap().clone())]);
    head.renamed(&names.inverse().partial()).unwrap().save(dir.path().join("head")).unwrap();

    // A set of some of the layers is one of the store's, too.
    let store = open(dir.path(), &base, 1 << 20).with_names(names.clone());
    assert_eq!(values(&store.get("head").unwrap().adapters), values(&head));
    let store = open(dir.path(), &base, 1 << 20).with_names(names.inverse());
    let error = store.get("head").unwrap_err().to_string();
    assert!(error.contains("use its `inverse()`"), "{error}");
}

#[test]
fn nothing_outside_the_root_is_read() {
    let (dir, base) = root(&["outside", "root/inside", "root/.hidden"]);
    let root = dir.path().join("root");
    let absolute = dir.path().join("outside").display().to_string();
    #[allow(unused_mut)] // Links are made on Unix only.
    let mut names = vec![
        "",
        ".",
        "..",
        "/",
        "../outside",
        "inside/../../outside",
        "./inside",
        "inside/",
        ".hidden",
        "inside/.",
        "none",
        "in\0side",
        &absolute,
    ];
    fs::write(root.join("file"), "no directory").unwrap();
    names.push("file");
    #[cfg(unix)]
    {
        use std::os::unix::fs::symlink;
        symlink(dir.path().join("outside"), root.join("link")).unwrap();
        symlink(root.join("inside"), root.join("alias")).unwrap();
        fs::create_dir(root.join("mixed")).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            symlink(dir.path().join("outside").join(file), root.join("mixed").join(file)).unwrap();
        }
        names.extend(["link", "mixed"]);
    }
    let store = open(&root, &base, 1 << 20);
    for name in names {
        let error = store.get(name).unwrap_err();
        assert!(matches!(&error, LoraError::UnknownAdapters { .. }), "{name}: {error}");
    }
    store.get("inside").unwrap();
    #[cfg(unix)]
    {
        assert_eq!(store.list(), ["alias", "inside"]);
        let [alias, inside] =
            ["alias", "inside"].map(|name| store.get(name).unwrap().fingerprint.clone());
        assert_eq!(alias, inside);
    }
}

#[test]
fn under_load_each_answer_is_from_one_set() {
    let (dir, base) = root(&["it"]);
    let store = open(dir.path(), &base, 1 << 20);
    let expected = [0, 1].map(|seed| values(&set(&base, seed)));
    let done = AtomicBool::new(false);
    let answer = || -> Arc<StoredAdapters<Plain>> { store.get("it").unwrap() };
    thread::scope(|scope| {
        let readers: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let mut seen = [0; 2];
                    while seen.iter().sum::<usize>() < 250 || !done.load(Ordering::Relaxed) {
                        let values = values(&answer().adapters);
                        let which = expected.iter().position(|it| *it == values);
                        seen[which.expect("the one or the other")] += 1;
                    }
                    seen
                })
            })
            .collect();
        for turn in 1..=100 {
            set(&base, turn % 2).save(dir.path().join("it")).unwrap();
        }
        done.store(true, Ordering::Relaxed);
        let seen = readers.into_iter().map(|it| it.join().unwrap());
        let seen = seen.reduce(|a, b| [a[0] + b[0], a[1] + b[1]]).unwrap();
        assert!(seen[0] > 0 && seen[1] > 0, "{seen:?}");
    });
    assert!(store.problems().is_empty());
}
