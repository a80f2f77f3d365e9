//! Whether a file of MessagePack, Burn's usual format of records, is whole.

use std::{
    fs::File,
    io::{self, BufReader, ErrorKind, Read},
    path::Path,
};

/// Whether the file holds one value, to its end. What the value means is not looked at, and long strings and
/// tensors are skipped.
///
/// # Errors
///
/// If the file cannot be read.
pub(super) fn is_whole(path: &Path) -> io::Result<bool> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    let mut walk = Walk { reader: BufReader::new(file), at: 0 };
    match walk.value() {
        Ok(ended) => Ok(ended && walk.at == length),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

struct Walk {
    reader: BufReader<File>,
    /// The number of bytes that are behind, or were skipped and may not exist.
    at: u64,
}

impl Walk {
    /// Goes to the end of a value, with all that is in it. `false` if it is none.
    fn value(&mut self) -> io::Result<bool> {
        // How many values are still to come.
        let mut left = 1_u64;
        while left > 0 {
            left -= 1;
            let marker = self.number(1)?;
            match marker {
                // Small numbers, nothing, false and true.
                0x00..=0x7f | 0xe0..=0xff | 0xc0 | 0xc2 | 0xc3 => {}
                0x80..=0x8f => left += 2 * (marker & 0x0f),
                0x90..=0x9f => left += marker & 0x0f,
                0xa0..=0xbf => self.skip(marker & 0x1f)?,
                // Bytes and strings, after their length.
                0xc4..=0xc6 => self.skip_long(1 << (marker - 0xc4), 0)?,
                0xd9..=0xdb => self.skip_long(1 << (marker - 0xd9), 0)?,
                // Extensions, which have a type.
                0xc7..=0xc9 => self.skip_long(1 << (marker - 0xc7), 1)?,
                0xd4..=0xd8 => self.skip(1 + (1 << (marker - 0xd4)))?,
                // Numbers.
                0xca | 0xcb => self.skip(4 << (marker - 0xca))?,
                0xcc..=0xcf => self.skip(1 << (marker - 0xcc))?,
                0xd0..=0xd3 => self.skip(1 << (marker - 0xd0))?,
                // Lists and maps, after their length.
                0xdc | 0xdd => left += self.number(2 << (marker - 0xdc))?,
                0xde | 0xdf => left += 2 * self.number(2 << (marker - 0xde))?,
                _ => return Ok(false),
            }
        }
        Ok(true)
    }

    /// A number of so many bytes, the highest first.
    fn number(&mut self, bytes: usize) -> io::Result<u64> {
        let mut number = [0; 8];
        self.reader.read_exact(&mut number[8 - bytes..])?;
        self.at += bytes as u64;
        Ok(u64::from_be_bytes(number))
    }

    /// Skips what has its length in so many bytes before it, and `more`.
    fn skip_long(&mut self, bytes: usize, more: u64) -> io::Result<()> {
        let length = self.number(bytes)?;
        self.skip(length + more)
    }

    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        // Lengths have 32 bits.
        self.reader.seek_relative(bytes as i64)?;
        self.at += bytes;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::is_whole;

    /// One of each kind, by the specification of MessagePack.
    const VALUES: &[&[u8]] = &[
        &[0x07],
        &[0xff],
        &[0xc0],
        &[0x82, 0xa1, b'a', 0x01, 0xa1, b'b', 0xc3],
        &[0x93, 0x01, 0xc2, 0xa3, b'a', b'b', b'c'],
        &[0xc4, 2, 9, 9],
        &[0xc5, 0, 2, 9, 9],
        &[0xc6, 0, 0, 0, 2, 9, 9],
        &[0xc7, 2, 5, 9, 9],
        &[0xc8, 0, 1, 5, 9],
        &[0xc9, 0, 0, 0, 1, 5, 9],
        &[0xca, 0, 0, 0, 0],
        &[0xcb, 0, 0, 0, 0, 0, 0, 0, 0],
        &[0xcc, 1],
        &[0xcd, 0, 1],
        &[0xce, 0, 0, 0, 1],
        &[0xcf, 0, 0, 0, 0, 0, 0, 0, 1],
        &[0xd0, 1],
        &[0xd1, 0, 1],
        &[0xd2, 0, 0, 0, 1],
        &[0xd3, 0, 0, 0, 0, 0, 0, 0, 1],
        &[0xd4, 5, 9],
        &[0xd5, 5, 9, 9],
        &[0xd6, 5, 9, 9, 9, 9],
        &[0xd8, 5, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9],
        &[0xd9, 1, b'a'],
        &[0xda, 0, 1, b'a'],
        &[0xdb, 0, 0, 0, 1, b'a'],
        &[0xdc, 0, 2, 0x01, 0x02],
        &[0xdd, 0, 0, 0, 2, 0x01, 0x02],
        &[0xde, 0, 1, 0x01, 0x02],
        &[0xdf, 0, 0, 0, 1, 0x01, 0x02],
    ];

    #[test]
    fn u4_a_file_is_whole_if_its_value_ends_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("it.mpk");
        let whole = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            is_whole(&path).unwrap()
        };
        // All of them in one list, and each by itself.
        let all = [&[0xdc, 0, VALUES.len() as u8][..], &VALUES.concat()].concat();
        for value in VALUES.iter().copied().chain([&*all]) {
            assert!(whole(value), "{value:02x?}");
            assert!(!whole(&[value, &[0]].concat()), "there is more than {value:02x?}");
            for length in 0..value.len() {
                assert!(!whole(&value[..length]), "{length} bytes of {value:02x?}");
            }
        }
        assert!(!whole(&[0xc1]), "the marker means nothing");
        assert!(is_whole(&dir.path().join("nowhere")).is_err());
    }
}
