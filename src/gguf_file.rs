//! Files in the [GGUF](https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) format, which llama.cpp and what
//! is built on it read: fields that describe a model, and tensors whose values may be packed.
//!
//! [`Gguf`] reads them, and [`write()`] writes them. What the fields of a language model mean is not known here.

mod header;
mod heads;
mod packing;
mod split;
mod writing;

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};

use crate::error::LoraError;
use header::Header;
use split::Place;

pub use heads::{halves_to_pairs, pairs_to_halves};
pub use packing::Packing;
pub use split::paths;
pub use writing::{Field, NewTensor, WRITER, write};

/// A file of which the header was read, or those of all files that a model is split into.
#[derive(Clone, Debug)]
pub struct Gguf {
    parts: Vec<Part>,
    /// The fields, by key.
    pub fields: Map<String, Value>,
    /// The tensors, by name.
    pub tensors: BTreeMap<String, Packed>,
    /// Where the value of each field is in the first file.
    places: Places,
}

/// Where the value of each field begins and ends in a file, in the order of the file.
type Places = Vec<(String, [u64; 2])>;

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

impl Gguf {
    /// Reads the header of a file. If it is a part of a model that was split, those of the other parts are read, too,
    /// which must be beside it; `fields` are then those of the first part, and `tensors` those of all.
    ///
    /// # Errors
    ///
    /// If a file cannot be read, is malformed or shorter than its header says, or has tensors of other types than
    /// [`Packing`]; if a part is missing, or does not belong to the others.
    pub fn open(path: &Path) -> Result<Self, LoraError> {
        let header = Header::open(path)?;
        if let Some(place) = Place::of(&header.fields).map_err(invalid(path))? {
            return split::gather(path, header, place);
        }
        let Header { fields, places, tensors, start } = header;
        Ok(Self { parts: vec![Part { path: path.to_owned(), start }], fields, tensors, places })
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
    pub fn values(&self, name: &str) -> Result<Vec<f32>, LoraError> {
        Ok(self.tensors[name].packing.unpack(&self.bytes(name)?))
    }

    /// The bytes of a tensor's values, as they are packed. Errors and panics are those of
    /// [`values`](Self::values).
    pub fn bytes(&self, name: &str) -> Result<Vec<u8>, LoraError> {
        let tensor = &self.tensors[name];
        let Part { path, start } = &self.parts[tensor.part];
        let size = tensor.packing.size(&tensor.shape).expect("it was checked");
        stretch(path, start + tensor.offset, size)
            .map_err(|error| invalid(path)(format!("`{name}`: {error}")))
    }

    /// The fields as they are in the file, and in its order, to [`write()`] them again.
    ///
    /// # Errors
    ///
    /// If the file cannot be read.
    pub fn copied_fields(&self) -> Result<Vec<(String, Field)>, LoraError> {
        let Some(Part { path, .. }) = self.parts.first() else { return Ok(Vec::new()) };
        let copied = self.places.iter().map(|(name, [start, end])| {
            let bytes = stretch(path, *start, end - start)
                .map_err(|error| invalid(path)(format!("`{name}`: {error}")))?;
            Ok((name.clone(), Field::copied(bytes)))
        });
        copied.collect()
    }
}

/// So many bytes of a file, from `start` on.
fn stretch(path: &Path, start: u64, size: u64) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = vec![0; size as usize];
    file.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// What is wrong with the file at `path`.
fn invalid(path: &Path) -> impl Fn(String) -> LoraError + use<> {
    let file = path.display().to_string();
    move |problem| LoraError::InvalidFile { file: file.clone(), problem }
}
