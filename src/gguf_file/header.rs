//! Reads the header of a file. Whatever it says is checked against the length of the file before memory is taken for
//! it.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufReader, Read},
    path::Path,
};

use serde_json::{Map, Value, json};

use super::{Packed, Packing, Places, invalid};
use crate::error::LoraError;

/// A result whose error says what is wrong with the file.
type Result<T> = std::result::Result<T, String>;

/// What each file begins with.
pub(super) const MAGIC: [u8; 4] = *b"GGUF";

/// The nesting of arrays that is read.
const DEPTH: usize = 3;

/// So many values in arrays are read of a file. The tokens and merges of the largest vocabularies are less than a
/// million.
const VALUES: u64 = 1 << 24;

/// The least bytes of a field, and of a tensor, in a header.
const FIELD: u64 = 8 + 4 + 1;
const TENSOR: u64 = 8 + 4 + 4 + 8;

/// What a header says.
pub(super) struct Header {
    /// The fields, by key.
    pub(super) fields: Map<String, Value>,
    /// Where the value of each field is in the file, with its kind, in the order of the file.
    pub(super) places: Places,
    /// The tensors, by name.
    pub(super) tensors: BTreeMap<String, Packed>,
    /// Where the values of the tensors begin.
    pub(super) start: u64,
}

impl Header {
    /// Reads the header of the file at `path`.
    ///
    /// # Errors
    ///
    /// If the file cannot be read, is malformed or shorter than its header says.
    pub(super) fn open(path: &Path) -> std::result::Result<Self, LoraError> {
        let io = |source| LoraError::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        let reader = Reader { source: BufReader::new(file), at: 0, length, values: 0 };
        reader.read().map_err(invalid(path))
    }
}

/// A header that is being read.
struct Reader<R> {
    source: R,
    at: u64,
    /// The length of the file.
    length: u64,
    /// The values in arrays so far.
    values: u64,
}

impl<R: Read> Reader<R> {
    fn read(mut self) -> Result<Header> {
        if self.length < MAGIC.len() as u64 || self.array()? != MAGIC {
            return Err("it is not a GGUF file".to_owned());
        }
        let version = self.u32()?;
        if (1..=3).contains(&version.swap_bytes()) {
            return Err(
                "its numbers are big-endian, which is not supported; convert it again, without \
                 `--bigendian`"
                    .to_owned(),
            );
        }
        if !(2..=3).contains(&version) {
            return Err(format!("version {version} of GGUF is not supported"));
        }
        let (tensors, fields) = (self.u64()?, self.u64()?);
        self.check_count(fields, FIELD)
            .map_err(|problem| format!("it says that it has {fields} fields: {problem}"))?;
        self.check_count(tensors, TENSOR)
            .map_err(|problem| format!("it says that it has {tensors} tensors: {problem}"))?;
        let (fields, places) = self.fields(fields)?;
        let tensors = self.tensors(tensors)?;
        let alignment = match fields.get("general.alignment") {
            None => 32,
            Some(value) => match value.as_u64() {
                Some(value) if value.is_power_of_two() => value,
                _ => return Err(format!("`general.alignment` is {value}")),
            },
        };
        let start = self.at.checked_next_multiple_of(alignment).unwrap_or(u64::MAX);
        check_places(&tensors, alignment, start, self.length)?;
        Ok(Header { fields, places, tensors, start })
    }

    /// The fields, and where the value of each is.
    fn fields(&mut self, count: u64) -> Result<(Map<String, Value>, Places)> {
        let (mut fields, mut places) = (Map::new(), Vec::new());
        for number in 1..=count {
            let name = self.string();
            let name = name
                .map_err(|problem| format!("the name of field {number} of {count}: {problem}"))?;
            let start = self.at;
            let value = self.u32().and_then(|kind| self.value(kind, DEPTH));
            let value = value.map_err(|problem| format!("`{name}`: {problem}"))?;
            places.push((name.clone(), [start, self.at]));
            if fields.insert(name.clone(), value).is_some() {
                return Err(format!("`{name}`: it is there twice"));
            }
        }
        Ok((fields, places))
    }

    fn tensors(&mut self, count: u64) -> Result<BTreeMap<String, Packed>> {
        let mut tensors = BTreeMap::new();
        for number in 1..=count {
            let name = self.string();
            let name = name
                .map_err(|problem| format!("the name of tensor {number} of {count}: {problem}"))?;
            let tensor = self.tensor().map_err(|problem| format!("`{name}`: {problem}"))?;
            if tensors.insert(name.clone(), tensor).is_some() {
                return Err(format!("`{name}`: there are two tensors of this name"));
            }
        }
        Ok(tensors)
    }

    fn tensor(&mut self) -> Result<Packed> {
        let dimensions = self.u32()?;
        if dimensions > 4 {
            return Err(format!("it has {dimensions} dimensions"));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let size = usize::try_from(self.u64()?).map_err(|error| error.to_string())?;
            shape.push(size);
        }
        shape.reverse();
        let packing = Packing::new(self.u32()?)?;
        Ok(Packed { shape, packing, offset: self.u64()?, part: 0 })
    }

    /// A value of the kind with this number in the format's list.
    fn value(&mut self, kind: u32, depth: usize) -> Result<Value> {
        Ok(match kind {
            0 => json!(self.array::<1>()?[0]),
            1 => json!(self.array::<1>()?[0] as i8),
            2 => json!(u16::from_le_bytes(self.array()?)),
            3 => json!(i16::from_le_bytes(self.array()?)),
            4 => json!(self.u32()?),
            5 => json!(i32::from_le_bytes(self.array()?)),
            6 => number(f32::from_le_bytes(self.array()?)),
            7 => match self.array()? {
                [0] => json!(false),
                [1] => json!(true),
                [other] => return Err(format!("{other} where 0 or 1 is needed")),
            },
            8 => json!(self.string()?),
            9 if depth > 0 => {
                let kind = self.u32()?;
                let count = self.u64()?;
                self.check_count(count, least_bytes(kind)?)?;
                self.values += count;
                if self.values > VALUES {
                    return Err(format!("there are more than {VALUES} values in lists"));
                }
                let values = (0..count).map(|_| self.value(kind, depth - 1));
                Value::Array(values.collect::<Result<_>>()?)
            }
            9 => return Err(format!("a list within more than {} others", DEPTH - 1)),
            10 => json!(self.u64()?),
            11 => json!(i64::from_le_bytes(self.array()?)),
            12 => number(f64::from_le_bytes(self.array()?)),
            _ => return Err(unknown(kind)),
        })
    }

    fn string(&mut self) -> Result<String> {
        let length = self.u64()?;
        String::from_utf8(self.bytes(length)?).map_err(|_| "a text that is not UTF-8".to_owned())
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        self.check_count(N as u64, 1)?;
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn bytes(&mut self, count: u64) -> Result<Vec<u8>> {
        self.check_count(count, 1)?;
        let mut bytes = vec![0; count as usize];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.source.read_exact(bytes).map_err(|error| error.to_string())?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    /// Fails if fewer bytes are left than so many things have, so that no memory is allocated for what is not there.
    fn check_count(&self, count: u64, bytes: u64) -> Result<()> {
        let left = self.length.saturating_sub(self.at);
        match count.checked_mul(bytes).is_some_and(|it| it <= left) {
            true => Ok(()),
            false => Err("it ends too early".to_owned()),
        }
    }
}

/// A number, or its name if it is not finite, which JSON cannot say: as `null` it would be taken as missing.
fn number(value: impl Into<f64>) -> Value {
    let value = value.into();
    if value.is_finite() { json!(value) } else { json!(value.to_string()) }
}

/// The least bytes of a value of the kind.
fn least_bytes(kind: u32) -> Result<u64> {
    Ok(match kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        8 | 10..=12 => 8,
        // The kind of its values, and how many there are.
        9 => 12,
        _ => return Err(unknown(kind)),
    })
}

fn unknown(kind: u32) -> String {
    format!("a value of the unknown kind {kind}")
}

/// Fails unless each tensor lies in the file, in a place of its own that is aligned. Several in one place could claim
/// far more memory than the file has bytes.
fn check_places(
    tensors: &BTreeMap<String, Packed>,
    alignment: u64,
    start: u64,
    length: u64,
) -> Result<()> {
    let mut places = Vec::new();
    for (name, tensor) in tensors {
        let Packed { shape, packing, offset, .. } = tensor;
        let size = packing.size(shape).ok_or_else(|| {
            format!("`{name}`: {shape:?} cannot be the shape of values in {packing}")
        })?;
        if !offset.is_multiple_of(alignment) {
            return Err(format!(
                "`{name}`: its values are at {offset}, which is no multiple of {alignment}"
            ));
        }
        let end = offset.checked_add(size);
        if end.and_then(|it| it.checked_add(start)).is_none_or(|it| it > length) {
            return Err(format!("it ends before the values of `{name}` do"));
        }
        places.push((*offset, offset + size, name));
    }
    places.sort_unstable();
    for pair in places.windows(2) {
        let ((_, end, first), (begin, _, second)) = (pair[0], pair[1]);
        if begin < end {
            return Err(format!("`{first}` and `{second}`: their values are in the same place"));
        }
    }
    Ok(())
}
