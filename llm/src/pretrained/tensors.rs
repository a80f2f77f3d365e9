//! The tensors in a model's files.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{self, BufReader, Read, Seek, SeekFrom},
    ops::Range,
    path::{Component, Path, PathBuf},
    rc::Rc,
};

use burn::tensor::{DType, TensorData};
use burn_store::{ModuleStore, SafetensorsStore, TensorSnapshot, TensorSnapshotError};
use serde::Deserialize;
use serde_json::Value;

use crate::{
    error::{Context, Result},
    files::{check_other, check_start, is_there, names_ending, read_json, start_of},
};

/// The file of the weights, and the list of several files.
pub(crate) const WEIGHTS: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// Tensors by name. Their values are read when they are needed.
pub(crate) type Tensors = BTreeMap<String, TensorSnapshot>;

/// What is found to be wrong while values are read.
pub(crate) type Problems = Rc<RefCell<Vec<String>>>;

/// All tensors of the directory.
pub(super) fn read_tensors(dir: &Path) -> Result<Tensors> {
    let map = weight_map(dir)?;
    let mut tensors = Tensors::new();
    for path in files_by(dir, map.as_ref())? {
        for (name, tensor) in read_file(&path)? {
            if tensors.insert(name.clone(), tensor).is_some() {
                return Err(format!("{}: `{name}` is in another file, too", path.display()));
            }
        }
    }
    let Some(map) = map else { return Ok(tensors) };
    let listed = map.into_keys().collect::<BTreeSet<_>>();
    let found = tensors.keys().cloned().collect();
    match listed.symmetric_difference(&found).next() {
        Some(name) => Err(format!(
            "{}: `{name}` is only in the index, or only in the files",
            dir.join(INDEX).display()
        )),
        None => Ok(tensors),
    }
}

/// The files of the directory that [`read_tensors`] reads, in the order of their names.
pub(super) fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    files_by(dir, weight_map(dir)?.as_ref())
}

fn files_by(dir: &Path, map: Option<&WeightMap>) -> Result<Vec<PathBuf>> {
    let names: BTreeSet<_> = match map {
        Some(map) => map.values().cloned().collect(),
        None => parts(dir)?.unwrap_or([WEIGHTS.to_owned()].into()),
    };
    Ok(names.into_iter().map(|name| dir.join(name)).collect())
}

/// The names of the parts of a model without an index, `model-00001-of-00003.safetensors` and so on, unless it is in
/// one file.
///
/// # Errors
///
/// If one of them is missing, or there are parts of several models.
fn parts(dir: &Path) -> Result<Option<BTreeSet<String>>> {
    if is_there(&dir.join(WEIGHTS)) {
        return Ok(None);
    }
    let found: BTreeSet<_> = names_ending(dir, &[".safetensors"]).into_iter().collect();
    let counts: BTreeSet<_> = found.iter().filter_map(|name| count_of(name)).collect();
    let count = match Vec::from_iter(counts)[..] {
        [] => return Ok(None),
        [count] => count,
        [one, other, ..] => {
            return Err(format!(
                "{}: there are parts of a model in {one} files and of one in {other}, and {INDEX} does not say which \
                 are meant",
                dir.display(),
            ));
        }
    };
    let missing = (1..=count).map(|number| part(number, count)).find(|it| !found.contains(it));
    match missing {
        Some(missing) => Err(format!(
            "{}: it is missing, and other parts of the model are there",
            dir.join(missing).display()
        )),
        None => Ok(Some((1..=count).map(|number| part(number, count)).collect())),
    }
}

/// The name of a part.
fn part(number: usize, count: usize) -> String {
    format!("model-{number:05}-of-{count:05}.safetensors")
}

/// In how many files the model is that a file with this name is a part of.
fn count_of(name: &str) -> Option<usize> {
    let numbers = name.strip_prefix("model-")?.strip_suffix(".safetensors")?;
    let (number, count) = numbers.split_once("-of-")?;
    let (number, count) = (number.parse().ok()?, count.parse().ok()?);
    (part(number, count) == name && (1..=count).contains(&number)).then_some(count)
}

/// The name of the file of each tensor.
type WeightMap = BTreeMap<String, String>;

/// The name of the file of each tensor, if the tensors are in several files.
fn weight_map(dir: &Path) -> Result<Option<WeightMap>> {
    let index = dir.join(INDEX);
    if !is_there(&index) {
        return Ok(None);
    }
    #[derive(Deserialize)]
    struct Index {
        weight_map: WeightMap,
    }
    let Index { weight_map } =
        serde_json::from_value(read_json(&index)?).context(index.display())?;
    for file in weight_map.values() {
        let mut parts = Path::new(file).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
            return Err(format!(
                "{}: `{file}` is not the name of a file in the directory",
                index.display()
            ));
        }
    }
    Ok(Some(weight_map))
}

/// The tensors of a safetensors file.
pub(crate) fn read_file(path: &Path) -> Result<Tensors> {
    if !is_there(path) {
        check_instead(path)?;
    }
    // burn-store would not name the file.
    check_start(path, &start_of(path).context(path.display())?)?;
    let mut file = SafetensorsStore::from_file(path);
    let tensors = file.get_all_snapshots().context(path.display())?;
    let places = places(path).context(path.display())?;
    let tensors = tensors.iter().map(|(name, tensor)| match places.get(name) {
        Some(place) => (name.clone(), at(place.clone(), path.to_owned(), tensor)),
        None => (name.clone(), tensor.clone()),
    });
    Ok(tensors.collect())
}

/// Where the bytes of each tensor are in a safetensors file, which was checked.
fn places(path: &Path) -> Result<BTreeMap<String, Range<u64>>> {
    #[derive(Deserialize)]
    struct Info {
        data_offsets: [u64; 2],
    }
    let mut file = File::open(path).context("opening")?;
    let mut length = [0; 8];
    file.read_exact(&mut length).context("its header")?;
    let length = u64::from_le_bytes(length);
    let header: BTreeMap<String, Value> =
        serde_json::from_reader(BufReader::new(file.take(length))).context("its header")?;
    let infos = header.into_iter().filter(|(name, _)| name != "__metadata__");
    let place = |(name, info)| {
        let Info { data_offsets: [start, end] } =
            serde_json::from_value(info).context(format!("`{name}`"))?;
        Ok((name, 8 + length + start..8 + length + end))
    };
    infos.map(place).collect()
}

/// A tensor whose bytes are read from the file when they are needed. burn-store maps the file into memory, and every page
/// that was looked at counts as memory of this program until the last tensor is dropped.
fn at(place: Range<u64>, path: PathBuf, tensor: &TensorSnapshot) -> TensorSnapshot {
    let (dtype, shape) = (tensor.dtype, tensor.shape.clone());
    let id = tensor.tensor_id.unwrap_or_default();
    let names = tensor.path_stack.clone().unwrap_or_default();
    let values = {
        let shape = shape.clone();
        move || {
            let read = || {
                let mut file = File::open(&path)?;
                file.seek(SeekFrom::Start(place.start))?;
                let length = place.end - place.start;
                let mut bytes = Vec::with_capacity(length as usize);
                file.take(length).read_to_end(&mut bytes)?;
                Ok(bytes)
            };
            let bytes = read().map_err(|error: io::Error| {
                TensorSnapshotError::IoError(format!("{}: {error}", path.display()))
            })?;
            if (bytes.len() as u64) < place.end - place.start {
                let problem = format!("{}: it became shorter", path.display());
                return Err(TensorSnapshotError::DataError(problem));
            }
            Ok(TensorData::from_bytes_vec(bytes, shape.clone(), dtype))
        }
    };
    TensorSnapshot::from_closure(Rc::new(values), dtype, shape, names, Vec::new(), id)
}

/// Fails if other files are there than the one of the weights, and says what to do.
fn check_instead(path: &Path) -> Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    check_other(dir)?;
    // Trainings leave other files of PyTorch.
    let is_model = |name: &&String| name.contains("model") || name.starts_with("consolidated");
    match names_ending(dir, &[".bin", ".pth", ".pt"]).iter().find(is_model) {
        None => Ok(()),
        Some(name) => Err(format!(
            "{}: only {name} is there, which is not read; load it with `transformers` in Python, and save it with \
             `save_pretrained`, as safetensors",
            path.display(),
        )),
    }
}

/// The values of `tensor` in the place of `wanted`. They are converted when they are read, and must be finite.
pub(crate) fn placed(
    name: String,
    tensor: TensorSnapshot,
    wanted: TensorSnapshot,
    problems: &Problems,
) -> TensorSnapshot {
    let (shape, problems) = (tensor.shape.clone(), problems.clone());
    let values = move || {
        let values = || {
            let data = tensor.to_data().map_err(|error| format!("`{name}`: {error}"))?;
            let data = data.convert_dtype(DType::F32);
            check_finite(&name, data.as_slice().map_err(|error| format!("`{name}`: {error:?}"))?)?;
            Ok(data)
        };
        values().map_err(|problem: String| {
            problems.borrow_mut().push(problem.clone());
            TensorSnapshotError::DataError(problem)
        })
    };
    let path = wanted.path_stack.unwrap_or_default();
    let containers = wanted.container_stack.unwrap_or_default();
    let id = wanted.tensor_id.unwrap_or_default();
    TensorSnapshot::from_closure(Rc::new(values), DType::F32, shape, path, containers, id)
}

/// Fails if a number is infinite or NaN, of which a model would make nothing but NaN. To look at all of them takes a
/// tenth of a second per GB, a tenth of what it takes to copy them.
pub(crate) fn check_finite(name: &str, numbers: &[f32]) -> Result<()> {
    match numbers.iter().filter(|it| !it.is_finite()).count() {
        0 => Ok(()),
        count => {
            Err(format!("`{name}`: {count} of its {} numbers are NaN or infinite", numbers.len()))
        }
    }
}
