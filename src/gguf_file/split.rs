//! Models in several files, as `llama-gguf-split` writes them: `NAME-00001-of-00003.gguf` and so on. Each has a header
//! of its own, and the fields of the model are in the first.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};

use super::{Gguf, Part, header::Header, invalid};
use crate::error::LoraError;

const NUMBER: &str = "split.no";
const COUNT: &str = "split.count";
const TENSORS: &str = "split.tensors.count";

/// Which part of a model a file is.
#[derive(Clone, Copy, Eq, PartialEq)]
pub(super) struct Place {
    /// From 1 on.
    number: u64,
    count: u64,
}

impl Place {
    /// What the fields of a file say. None if it is a whole model.
    pub(super) fn of(fields: &Map<String, Value>) -> Result<Option<Self>, String> {
        let count = number(fields, COUNT)?.unwrap_or(1);
        if count <= 1 {
            return Ok(None);
        }
        let number = number(fields, NUMBER)?.ok_or_else(|| format!("`{NUMBER}` is missing"))?;
        if number >= count {
            return Err(format!(
                "`{NUMBER}` is {number}, and by `{COUNT}` there are {count} parts"
            ));
        }
        Ok(Some(Self { number: number + 1, count }))
    }

    /// How the name of such a part ends, before `.gguf`.
    fn end(self) -> String {
        format!("-{:05}-of-{:05}", self.number, self.count)
    }

    /// The path of this part, beside the one at `path`, which has the place `own`. None if that is not named as parts
    /// are.
    fn beside(self, path: &Path, own: Self) -> Option<PathBuf> {
        let stem = path.file_stem()?.to_str()?.strip_suffix(&own.end())?;
        let mut name = format!("{stem}{}", self.end());
        if let Some(ending) = path.extension() {
            name.push('.');
            name.push_str(ending.to_str()?);
        }
        Some(path.with_file_name(name))
    }
}

fn number(fields: &Map<String, Value>, name: &str) -> Result<Option<u64>, String> {
    let value = fields.get(name);
    let problem = || format!("`{name}` is {}", value.unwrap_or(&Value::Null));
    value.map(|it| it.as_u64().ok_or_else(problem)).transpose()
}

/// The model of which the file at `path` is a part, whose header was read.
///
/// # Errors
///
/// If another part is missing, cannot be read, or does not belong to this one.
pub(super) fn gather(path: &Path, header: Header, own: Place) -> Result<Gguf, LoraError> {
    let (mut own_header, mut parts, mut fields) = (Some(header), Vec::new(), Map::new());
    let (mut tensors, mut places) = (BTreeMap::new(), Vec::new());
    let mut expected = None;
    for number in 1..=own.count {
        let place = Place { number, ..own };
        let (path, header) = match own_header.take_if(|_| place == own) {
            Some(header) => (path.to_owned(), header),
            None => other(path, own, place)?,
        };
        let told = invalid(&path);
        let part = parts.len();
        for (name, mut tensor) in header.tensors {
            tensor.part = part;
            if let Some(before) = tensors.insert(name.clone(), tensor) {
                let Part { path: before, .. } = &parts[before.part];
                return Err(told(format!("`{name}` is also in {}", before.display())));
            }
        }
        expected = expected.or(self::number(&header.fields, TENSORS).map_err(told)?);
        if part == 0 {
            (fields, places) = (header.fields, header.places);
            // They are no fields of the model.
            places.retain(|(name, _)| ![NUMBER, COUNT, TENSORS].contains(&name.as_str()));
        }
        parts.push(Part { path, start: header.start });
    }
    match expected {
        Some(count) if count != tensors.len() as u64 => Err(invalid(path)(format!(
            "by `{TENSORS}` the model has {count} tensors, and its {} files have {}",
            own.count,
            tensors.len(),
        ))),
        _ => Ok(Gguf { parts, fields, tensors, places }),
    }
}

/// The path and the header of another part than the one at `path`.
fn other(path: &Path, own: Place, place: Place) -> Result<(PathBuf, Header), LoraError> {
    let Place { number, count } = own;
    let is_part = format!("it is part {number} of a model in {count} files");
    let Some(other) = place.beside(path, own) else {
        return Err(invalid(path)(format!(
            "{is_part}; its name must end in `{}.gguf`, and those of the others likewise, so that they are found",
            own.end(),
        )));
    };
    if other.symlink_metadata().is_err() {
        return Err(invalid(path)(format!("{is_part}, and {} is missing", other.display())));
    }
    let header = Header::open(&other)?;
    let told = invalid(&other);
    match Place::of(&header.fields).map_err(&told)? {
        Some(found) if found == place => Ok((other, header)),
        Some(found) => Err(told(format!(
            "by its name it is part {} of {count}, and by `{NUMBER}` and `{COUNT}` part {} of {}",
            place.number, found.number, found.count,
        ))),
        None => Err(told(format!("`{COUNT}` is missing, and its name is that of a part"))),
    }
}

/// The paths of all parts of the model, in their order, if the file at `path` is named as one of them; otherwise this
/// path alone. Not all of them need exist.
pub fn paths(path: &Path) -> Vec<PathBuf> {
    let found = || {
        let (start, count) = path.file_stem()?.to_str()?.rsplit_once("-of-")?;
        let (_, number) = start.rsplit_once('-')?;
        let own = Place { number: number.parse().ok()?, count: count.parse().ok()? };
        let numbers = 1..=own.count.min(u16::MAX.into());
        let paths = numbers.map(|number| Place { number, ..own }.beside(path, own));
        paths.collect::<Option<Vec<_>>>().filter(|paths| !paths.is_empty())
    };
    found().unwrap_or_else(|| vec![path.to_owned()])
}
