//! Writes GGUF files.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
};

use super::{Packing, header::MAGIC};
use crate::{error::LoraError, files};

/// The version of the format that is written.
const VERSION: u32 = 3;

/// The values of each tensor begin at a multiple of so many bytes, which is what readers expect if no field says more.
const ALIGNMENT: u64 = 32;

/// A name that says otherwise. It is not copied, because files are written with the usual one.
const ALIGNMENT_FIELD: &str = "general.alignment";

/// A field that all files have which this crate writes: its version. So a program can tell what it may overwrite.
pub const WRITER: &str = "burn_lora.version";

/// The value of a field, as it is in a file: its kind and its bytes.
///
/// ```
/// use burn_lora::gguf::Field;
///
/// let fields = [
///     ("general.architecture", Field::from("llama")),
///     ("llama.block_count", 30_u32.into()),
///     ("llama.rope.freq_base", 1e5_f32.into()),
///     ("tokenizer.ggml.add_bos_token", false.into()),
///     ("tokenizer.ggml.tokens", vec!["a".to_owned(), "b".to_owned()].into()),
/// ];
/// # assert_eq!(fields.len(), 5);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field(Vec<u8>);

impl Field {
    /// A value that was read, with its kind.
    pub(super) fn copied(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

/// A value that fields can have.
trait Kind {
    /// Its number in the format's list.
    const NUMBER: u32;
    fn put(&self, bytes: &mut Vec<u8>);
}

macro_rules! numbers {
    ($($kind:ty: $number:literal),*) => {$(
        impl Kind for $kind {
            const NUMBER: u32 = $number;
            fn put(&self, bytes: &mut Vec<u8>) {
                bytes.extend(self.to_le_bytes());
            }
        }
    )*};
}

numbers!(u32: 4, i32: 5, f32: 6);

impl Kind for bool {
    const NUMBER: u32 = 7;
    fn put(&self, bytes: &mut Vec<u8>) {
        bytes.push((*self).into());
    }
}

impl Kind for String {
    const NUMBER: u32 = 8;
    fn put(&self, bytes: &mut Vec<u8>) {
        put_text(self, bytes);
    }
}

impl<K: Kind> Kind for Vec<K> {
    const NUMBER: u32 = 9;
    fn put(&self, bytes: &mut Vec<u8>) {
        bytes.extend(K::NUMBER.to_le_bytes());
        bytes.extend((self.len() as u64).to_le_bytes());
        self.iter().for_each(|it| it.put(bytes));
    }
}

fn put_text(text: &str, bytes: &mut Vec<u8>) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

macro_rules! fields {
    ($($kind:ty),*) => {$(
        impl From<$kind> for Field {
            fn from(value: $kind) -> Self {
                let mut bytes = <$kind as Kind>::NUMBER.to_le_bytes().to_vec();
                value.put(&mut bytes);
                Self(bytes)
            }
        }
    )*};
}

fields!(u32, i32, f32, bool, String, Vec<u32>, Vec<i32>, Vec<f32>, Vec<bool>, Vec<String>);

impl From<&str> for Field {
    fn from(text: &str) -> Self {
        text.to_owned().into()
    }
}

/// A tensor to be written.
pub struct NewTensor<'a> {
    /// Its name.
    pub name: String,
    /// Its shape. The rows come first, as in PyTorch.
    pub shape: Vec<usize>,
    /// How its values are packed.
    pub packing: Packing,
    /// Gives the bytes of its values when they are written, so that they are not all in memory at once.
    pub bytes: Box<dyn FnOnce() -> Result<Vec<u8>, LoraError> + 'a>,
}

/// Writes a file with these fields, [`WRITER`], and these tensors, in this order. The file gets its name when it is
/// complete and on the disk: until then, an old one stays as it was.
///
/// # Errors
///
/// If the file cannot be written, or the bytes of a tensor cannot be had.
///
/// # Panics
///
/// If the shape of a tensor has no whole blocks in each row, or its bytes are not as many as its shape needs.
pub fn write(
    path: &Path,
    mut fields: Vec<(String, Field)>,
    tensors: Vec<NewTensor<'_>>,
) -> Result<(), LoraError> {
    fields.retain(|(name, _)| ![ALIGNMENT_FIELD, WRITER].contains(&name.as_str()));
    fields.push((WRITER.to_owned(), env!("CARGO_PKG_VERSION").into()));
    let mut header = MAGIC.to_vec();
    header.extend(VERSION.to_le_bytes());
    header.extend((tensors.len() as u64).to_le_bytes());
    header.extend((fields.len() as u64).to_le_bytes());
    for (name, Field(value)) in &fields {
        put_text(name, &mut header);
        header.extend(value);
    }
    let mut offset = 0;
    for NewTensor { name, shape, packing, .. } in &tensors {
        put_text(name, &mut header);
        header.extend((shape.len() as u32).to_le_bytes());
        // The rows come last there.
        header.extend(shape.iter().rev().flat_map(|&size| (size as u64).to_le_bytes()));
        header.extend(packing.number().to_le_bytes());
        header.extend(u64::to_le_bytes(offset));
        offset = (offset + size(packing, shape, name)).next_multiple_of(ALIGNMENT);
    }
    files::replace(path, |unfinished| {
        let io = |source| LoraError::Io { path: path.to_owned(), source };
        let file = File::create(unfinished).map_err(io)?;
        let mut file = Aligned { file: BufWriter::new(file), written: 0 };
        file.put(&header).map_err(io)?;
        for NewTensor { name, shape, packing, bytes } in tensors {
            let (bytes, expected) = (bytes()?, size(&packing, &shape, &name));
            assert!(
                bytes.len() as u64 == expected,
                "`{name}`: {expected} bytes expected for {shape:?} in {packing}, got {}",
                bytes.len()
            );
            file.put(&bytes).map_err(io)?;
        }
        file.file.flush().map_err(io)
    })
}

/// The number of bytes of a tensor.
fn size(packing: &Packing, shape: &[usize], name: &str) -> u64 {
    let size = packing.size(shape);
    size.unwrap_or_else(|| panic!("`{name}`: {shape:?} has no whole blocks of {packing}"))
}

/// A file whose parts begin at multiples of [`ALIGNMENT`].
struct Aligned {
    file: BufWriter<File>,
    written: u64,
}

impl Aligned {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        let end = self.written + bytes.len() as u64;
        self.written = end.next_multiple_of(ALIGNMENT);
        self.file.write_all(&vec![0; (self.written - end) as usize])
    }
}
