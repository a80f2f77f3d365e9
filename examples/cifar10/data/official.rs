//! CIFAR-10's binary files: from a directory, the cache, or the network.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
    time::Duration,
};

use flate2::read::GzDecoder;

use burn_lora_llm::files::write_atomically;
use common::{Context, Result, cli::download::fetch};

use super::{Photo, Photos, VALUES};

const TRAIN: [&str; 5] = [
    "data_batch_1.bin",
    "data_batch_2.bin",
    "data_batch_3.bin",
    "data_batch_4.bin",
    "data_batch_5.bin",
];
const TEST: &str = "test_batch.bin";

/// The bytes of an image in a file: the label and the values.
const RECORD: usize = 1 + VALUES;

/// The number of images in each file.
const RECORDS: usize = 10_000;

const URL: &str = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz";
const SIZE: u64 = 170_052_171;
const SHA256: &str = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd";

/// Reads the test batch in `dir`, and the training batches that exist.
pub fn read(dir: &Path) -> Result<Photos> {
    let test = read_batch(&dir.join(TEST))?;
    let batches: Vec<_> =
        TRAIN.iter().map(|name| dir.join(name)).filter(|it| it.exists()).collect();
    if batches.is_empty() {
        return Err(format!("{}: there is no {}", dir.display(), TRAIN[0]));
    }
    let train: Result<Vec<_>> = batches.iter().map(|path| read_batch(path)).collect();
    Ok(Photos { name: "cifar10", train: train?.concat(), test })
}

/// The directory of the cached files. Downloads all of them if one is missing.
pub fn cached_or_downloaded() -> Result<PathBuf> {
    let cache = dirs::cache_dir().ok_or("there is no cache directory")?;
    let dir = cache.join("burn-lora").join("cifar10");
    if !TRAIN.iter().chain([&TEST]).all(|name| dir.join(name).exists()) {
        let archive = fetch(URL, SIZE, SHA256, Duration::from_secs(900))?;
        println!("Downloaded {URL}");
        unpack(GzDecoder::new(archive.as_slice()), &dir).context(URL)?;
    }
    Ok(dir)
}

fn read_batch(path: &Path) -> Result<Vec<Photo>> {
    let shown = path.display();
    let mut bytes = Vec::new();
    // Reads one byte more than expected, to detect files that are too long.
    let limit = (RECORDS * RECORD + 1) as u64;
    let file = File::open(path).context(&shown)?;
    file.take(limit).read_to_end(&mut bytes).context(&shown)?;
    if bytes.is_empty() || bytes.len() % RECORD != 0 {
        let length = if bytes.len() as u64 == limit { "more" } else { &bytes.len().to_string() };
        return Err(format!(
            "{shown}: up to {RECORDS} records of {RECORD} bytes are expected, but there are {length} bytes"
        ));
    }
    let photos = bytes.chunks_exact(RECORD).map(|record| match record[0] {
        label @ 0..=9 => Ok(Photo { pixels: record[1..].to_vec(), label }),
        label => Err(format!("{shown}: {label} is not a class")),
    });
    photos.collect()
}

/// Extracts the files of a tar archive: headers of 512 bytes, each followed by a file that is padded to
/// a multiple of 512 bytes.
fn unpack(mut archive: impl Read, dir: &Path) -> std::io::Result<()> {
    const BLOCK: usize = 512;
    let mut header = [0; BLOCK];
    // The archive ends with empty blocks.
    while archive.read_exact(&mut header).is_ok() && header[0] != 0 {
        let text = |range: std::ops::Range<usize>| {
            String::from_utf8_lossy(&header[range]).trim_end_matches(['\0', ' ']).to_owned()
        };
        let size = u64::from_str_radix(&text(124..136), 8);
        let size = size.ok().filter(|size| *size <= (RECORDS * RECORD) as u64);
        let size = size.ok_or_else(|| std::io::Error::other("a file of an unlikely size"))?;
        let mut bytes = Vec::new();
        archive.by_ref().take(size.next_multiple_of(BLOCK as u64)).read_to_end(&mut bytes)?;
        bytes.truncate(size as usize);
        let path = text(0..100);
        let name = path.rsplit('/').next().unwrap_or_default();
        if TRAIN.contains(&name) || name == TEST {
            write_atomically(&dir.join(name), &bytes)?;
        }
    }
    Ok(())
}
