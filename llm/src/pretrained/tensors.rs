//! The tensors in a model's files.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    path::{Component, Path, PathBuf},
    rc::Rc,
};

use burn::tensor::DType;
use burn_store::{ModuleStore, SafetensorsStore, TensorSnapshot, TensorSnapshotError};
use serde::Deserialize;

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
    let Some(map) = weight_map(dir)? else { return read_file(&dir.join(WEIGHTS)) };
    let mut tensors = Tensors::new();
    for file in map.values().collect::<BTreeSet<_>>() {
        tensors.extend(read_file(&dir.join(file))?);
    }
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
    let names: BTreeSet<_> = match weight_map(dir)? {
        Some(map) => map.into_values().collect(),
        None => [WEIGHTS.to_owned()].into(),
    };
    Ok(names.into_iter().map(|name| dir.join(name)).collect())
}

/// The name of the file of each tensor, if the tensors are in several files.
fn weight_map(dir: &Path) -> Result<Option<BTreeMap<String, String>>> {
    let index = dir.join(INDEX);
    if !is_there(&index) {
        return Ok(None);
    }
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
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
    Ok(file.get_all_snapshots().context(path.display())?.clone())
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
