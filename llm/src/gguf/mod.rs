//! Reads files in the [GGUF](https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) format: fields that
//! describe a model, and tensors whose values may be packed.

pub mod model;
mod rope;
pub mod tokens;

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufReader, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use half::{bf16, f16};
use serde_json::{Map, Value, json};

use crate::{
    error::{Context, Result},
    files::{check_start, is_gguf_start, start_of},
};

/// A file of which the header was read.
#[derive(Clone, Debug)]
pub struct Gguf {
    path: PathBuf,
    /// The metadata, by key.
    pub fields: Map<String, Value>,
    /// The tensors, by name.
    pub tensors: BTreeMap<String, Packed>,
    /// Where the values of the tensors begin.
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
}

/// How values are packed. The quantized ones come in blocks of 32 values, which share a scale.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Packing {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// The upper half of single precision.
    BF16,
    /// The scale and 32 values of 8 bits.
    Q8_0,
    /// The scale and 32 values of 4 bits, of which 8 stands for zero.
    Q4_0,
    /// The scale, the smallest value, and 32 values of 4 bits.
    Q4_1,
}

/// The values of a block.
const BLOCK: usize = 32;

/// The nesting of arrays that is read.
const DEPTH: usize = 3;

impl Packing {
    fn new(code: u32) -> Result<Self> {
        match code {
            0 => Ok(Self::F32),
            1 => Ok(Self::F16),
            2 => Ok(Self::Q4_0),
            3 => Ok(Self::Q4_1),
            8 => Ok(Self::Q8_0),
            30 => Ok(Self::BF16),
            _ => Err(format!(
                "its type, number {code} of GGUF's, is not one of F32, F16, BF16, Q8_0, Q4_0 and Q4_1"
            )),
        }
    }

    /// The values of a block, and its size in bytes.
    fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::BF16 => (1, 2),
            Self::Q8_0 => (BLOCK, 2 + BLOCK),
            Self::Q4_0 => (BLOCK, 2 + BLOCK / 2),
            Self::Q4_1 => (BLOCK, 4 + BLOCK / 2),
        }
    }

    /// The values of whole blocks.
    pub fn unpack(self, bytes: &[u8]) -> Vec<f32> {
        let half =
            |bytes: &[u8], at: usize| f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32();
        // The low halves of all bytes come before the high ones.
        let nibbles = |bytes: &[u8]| {
            let low = bytes.iter().map(|byte| byte & 15);
            low.chain(bytes.iter().map(|byte| byte >> 4)).map(f32::from).collect::<Vec<_>>()
        };
        let blocks = bytes.chunks_exact(self.block().1);
        match self {
            Self::F32 => {
                blocks.map(|it| f32::from_le_bytes([it[0], it[1], it[2], it[3]])).collect()
            }
            Self::F16 => blocks.map(|it| half(it, 0)).collect(),
            Self::BF16 => blocks.map(|it| bf16::from_le_bytes([it[0], it[1]]).to_f32()).collect(),
            Self::Q8_0 => blocks
                .flat_map(|it| {
                    let scale = half(it, 0);
                    it[2..].iter().map(move |&byte| scale * f32::from(byte as i8))
                })
                .collect(),
            Self::Q4_0 => blocks
                .flat_map(|it| {
                    let scale = half(it, 0);
                    nibbles(&it[2..]).into_iter().map(move |value| scale * (value - 8.0))
                })
                .collect(),
            Self::Q4_1 => blocks
                .flat_map(|it| {
                    let (scale, smallest) = (half(it, 0), half(it, 2));
                    nibbles(&it[4..]).into_iter().map(move |value| scale * value + smallest)
                })
                .collect(),
        }
    }
}

impl Packed {
    /// The number of bytes, or none if there are no whole blocks in each row or more than can be counted.
    fn size(&self) -> Option<u64> {
        let (values, bytes) = self.packing.block();
        let count = self.shape.iter().try_fold(1_u64, |all, &size| all.checked_mul(size as u64))?;
        let last = *self.shape.last().unwrap_or(&1);
        (count / values as u64).checked_mul(bytes as u64).filter(|_| last.is_multiple_of(values))
    }
}

impl Gguf {
    /// Reads the header of a file.
    ///
    /// # Errors
    ///
    /// If the file cannot be read, is malformed or shorter than its header says, holds only a part of a model, or has
    /// tensors of other types than [`Packing`].
    pub fn open(path: &Path) -> Result<Self> {
        let start = start_of(path).context(path.display())?;
        if !is_gguf_start(&start) {
            check_start(path, &start)?;
            return Err(format!("{}: it is not a GGUF file", path.display()));
        }
        let read = || {
            let file = File::open(path).map_err(|error| error.to_string())?;
            let length = file.metadata().map_err(|error| error.to_string())?.len();
            Header { source: BufReader::new(file), at: 0, length }.read(path)
        };
        read().context(path.display())
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
        let read = || {
            let mut file = File::open(&self.path)?;
            file.seek(SeekFrom::Start(self.start + tensor.offset))?;
            let mut bytes = vec![0; tensor.size().expect("it was checked") as usize];
            file.read_exact(&mut bytes)?;
            io::Result::Ok(bytes)
        };
        read().map_err(|error| format!("{}: `{name}`: {error}", self.path.display()))
    }
}

/// Fails if the file holds a part of a model.
fn check_is_whole(path: &Path, fields: &Map<String, Value>) -> Result<()> {
    let number = |name: &str| fields.get(name).and_then(Value::as_u64);
    let count = number("split.count").unwrap_or(1);
    if count <= 1 {
        return Ok(());
    }
    let number = number("split.no").unwrap_or(0) + 1;
    // llama.cpp names the parts so.
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let parts = match stem.strip_suffix(&format!("-{number:05}-of-{count:05}")) {
        Some(name) => {
            let part = |number: u64| format!("`{name}-{number:05}-of-{count:05}.gguf`");
            let parts: Vec<_> = match count {
                ..=9 => (1..=count).map(part).collect(),
                _ => vec![part(1), part(2), "...".to_owned(), part(count)],
            };
            format!(" ({})", parts.join(", "))
        }
        None => String::new(),
    };
    Err(format!(
        "it is part {number} of a model in {count} files{parts}; put them together with `llama-gguf-split --merge \
         FIRST-PART WHOLE.gguf`"
    ))
}

/// A header that is being read.
struct Header<R> {
    source: R,
    at: u64,
    /// The length of the file.
    length: u64,
}

impl<R: Read> Header<R> {
    fn read(mut self, path: &Path) -> Result<Gguf> {
        // The name of the format.
        self.bytes(4)?;
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
        let mut known = Map::new();
        for _ in 0..fields {
            let name = self.string()?;
            let kind = self.u32()?;
            let value =
                self.value(kind, DEPTH).map_err(|problem| format!("`{name}`: {problem}"))?;
            known.insert(name, value);
        }
        let mut found = BTreeMap::new();
        for _ in 0..tensors {
            let name = self.string()?;
            let tensor = self.tensor().map_err(|problem| format!("`{name}`: {problem}"))?;
            found.insert(name, tensor);
        }
        let alignment = match known.get("general.alignment") {
            None => 32,
            Some(value) => match value.as_u64() {
                Some(value) if value.is_power_of_two() => value,
                _ => return Err(format!("`general.alignment` is {value}")),
            },
        };
        let start = self.at.checked_next_multiple_of(alignment).unwrap_or(u64::MAX);
        for (name, tensor) in &found {
            let end = tensor.size().ok_or_else(|| {
                format!(
                    "`{name}`: {:?} cannot be the shape of values in {:?}",
                    tensor.shape, tensor.packing
                )
            })?;
            let end = start.checked_add(tensor.offset).and_then(|it| it.checked_add(end));
            if end.is_none_or(|end| end > self.length) {
                return Err(format!("it ends before the values of `{name}` do"));
            }
        }
        check_is_whole(path, &known)?;
        Ok(Gguf { path: path.to_owned(), fields: known, tensors: found, start })
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
        Ok(Packed { shape, packing, offset: self.u64()? })
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
            6 => json!(f32::from_le_bytes(self.array()?)),
            7 => json!(self.array::<1>()?[0] != 0),
            8 => json!(self.string()?),
            9 if depth > 0 => {
                let kind = self.u32()?;
                let count = self.u64()?;
                // Each value has a byte at least.
                self.check(count)?;
                let values = (0..count).map(|_| self.value(kind, depth - 1));
                Value::Array(values.collect::<Result<_>>()?)
            }
            10 => json!(self.u64()?),
            11 => json!(i64::from_le_bytes(self.array()?)),
            12 => json!(f64::from_le_bytes(self.array()?)),
            _ => return Err(format!("a value of the unknown kind {kind}")),
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
        let bytes = self.bytes(N as u64)?;
        Ok(bytes.try_into().expect("as many were read"))
    }

    fn bytes(&mut self, count: u64) -> Result<Vec<u8>> {
        self.check(count)?;
        let mut bytes = vec![0; count as usize];
        self.source.read_exact(&mut bytes).map_err(|error| error.to_string())?;
        self.at += count;
        Ok(bytes)
    }

    /// Fails if fewer bytes are left, so that no memory is allocated for what is not there.
    fn check(&self, count: u64) -> Result<()> {
        match count <= self.length.saturating_sub(self.at) {
            true => Ok(()),
            false => Err("it ends too early".to_owned()),
        }
    }
}
