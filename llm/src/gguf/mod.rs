//! Reads files in the [GGUF](https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) format: fields that
//! describe a model, and tensors whose values may be packed.

mod architecture;
pub mod config;
mod header;
pub mod model;
mod packing;
mod rope;
pub(crate) mod split;
pub mod tokens;

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use architecture::Architecture;
pub use packing::Packing;
use serde_json::{Map, Value};

use crate::error::{Context, Result};
use header::Header;
use split::Place;

/// The families of decoders that can be read: the names of each in GGUF files, and in `config.json`.
pub fn families() -> impl Iterator<Item = [&'static str; 2]> {
    Architecture::names()
}

/// A model of which the header was read, or those of all files that it is split into.
#[derive(Clone, Debug)]
pub struct Gguf {
    parts: Vec<Part>,
    /// The metadata, by key.
    pub fields: Map<String, Value>,
    /// The tensors, by name.
    pub tensors: BTreeMap<String, Packed>,
}

/// A file of a model.
#[derive(Clone, Debug)]
struct Part {
    path: PathBuf,
    /// Where the values of its tensors begin.
    start: u64,
}

/// Where the values of a tensor are, and how they are packed.
#[derive(Clone, Debug)]
pub struct Packed {
    /// The rows come first, as in PyTorch.
    pub shape: Vec<usize>,
    /// How the values are packed.
    pub packing: Packing,
    offset: u64,
    /// Which of the model's files it is in, from 0 on.
    part: usize,
}

impl Packed {
    /// The number of bytes, or none if there are no values, no whole blocks in each row, or more than can be counted.
    fn size(&self) -> Option<u64> {
        let [values, bytes] = self.packing.block();
        let count = self.shape.iter().try_fold(1_u64, |all, &size| all.checked_mul(size as u64))?;
        let last = *self.shape.last().unwrap_or(&1);
        let are_whole = count > 0 && last.is_multiple_of(values);
        (count / values as u64).checked_mul(bytes as u64).filter(|_| are_whole)
    }
}

impl Gguf {
    /// Reads the header of a file. If it is a part of a model that was split, those of the other parts are read, too,
    /// which must be beside it; `fields` are then those of the first part, and `tensors` those of all.
    ///
    /// # Errors
    ///
    /// If a file cannot be read, is malformed or shorter than its header says, or has tensors of other types than
    /// [`Packing`]; if a part is missing, or does not belong to the others.
    pub fn open(path: &Path) -> Result<Self> {
        let header = Header::open(path)?;
        if let Some(place) = Place::of(&header.fields).context(path.display())? {
            return split::gather(path, header, place);
        }
        let Header { fields, tensors, start } = header;
        Ok(Self { parts: vec![Part { path: path.to_owned(), start }], fields, tensors })
    }

    /// The values of a tensor.
    ///
    /// # Errors
    ///
    /// If the file cannot be read.
    ///
    /// # Panics
    ///
    /// If there is no tensor of this name.
    pub fn values(&self, name: &str) -> Result<Vec<f32>> {
        Ok(self.tensors[name].packing.unpack(&self.bytes(name)?))
    }

    /// The bytes of a tensor's values, as they are packed. Errors and panics are those of
    /// [`values`](Self::values).
    pub fn bytes(&self, name: &str) -> Result<Vec<u8>> {
        let tensor = &self.tensors[name];
        let Part { path, start } = &self.parts[tensor.part];
        let read = || {
            let mut file = File::open(path)?;
            file.seek(SeekFrom::Start(start + tensor.offset))?;
            let mut bytes = vec![0; tensor.size().expect("it was checked") as usize];
            file.read_exact(&mut bytes)?;
            io::Result::Ok(bytes)
        };
        read().map_err(|error| format!("{}: `{name}`: {error}", path.display()))
    }
}
