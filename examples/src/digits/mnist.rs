//! MNIST's four IDX files: from a directory, the cache, or the network.

use std::{
    fs::File,
    io::{BufReader, Read},
    path::{Path, PathBuf},
    time::Duration,
};

use flate2::read::GzDecoder;

use burn_lora_llm::{Context, Result, cli::download::fetch, files::write_atomically};

use super::{Digit, Digits, PIXELS, SIDE};

const MIRRORS: [&str; 2] = [
    "https://storage.googleapis.com/cvdf-datasets/mnist",
    "https://ossci-datasets.s3.amazonaws.com/mnist",
];

/// Enough for a few megabytes on a slow network.
const TIMEOUT: Duration = Duration::from_secs(120);

/// The files' names, and the size and SHA-256 of each compressed one.
const FILES: [(&str, u64, &str); 4] = [
    (
        "train-images-idx3-ubyte",
        9_912_422,
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    ),
    (
        "train-labels-idx1-ubyte",
        28_881,
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    ),
    (
        "t10k-images-idx3-ubyte",
        1_648_877,
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    ),
    (
        "t10k-labels-idx1-ubyte",
        4_542,
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
];

/// Reads the four files of `dir`, raw or with the ending `.gz`.
pub fn read(dir: &Path) -> Result<Digits> {
    let [train_images, train_labels, test_images, test_labels] = FILES.map(|(name, ..)| name);
    Ok(Digits {
        name: "mnist",
        train: read_split(dir, train_images, train_labels)?,
        test: read_split(dir, test_images, test_labels)?,
    })
}

/// The directory of the cached files. Downloads those that are missing.
pub fn cached_or_downloaded() -> Result<PathBuf> {
    let cache = dirs::cache_dir().ok_or("there is no cache directory")?;
    let dir = cache.join("burn-lora").join("mnist");
    for (name, size, sha256) in FILES {
        let path = dir.join(format!("{name}.gz"));
        if !path.exists() {
            download(&path, size, sha256)?;
        }
    }
    Ok(dir)
}

fn read_split(dir: &Path, images: &str, labels: &str) -> Result<Vec<Digit>> {
    let (images_path, [count, rows, cols], images) = read_idx::<3>(dir, images)?;
    let (labels_path, [labels_count], labels) = read_idx::<1>(dir, labels)?;
    let (images_path, labels_path) = (images_path.display(), labels_path.display());
    if (rows, cols) != (SIDE, SIDE) {
        return Err(format!(
            "{images_path}: images of {SIDE}x{SIDE} are needed, not {rows}x{cols}"
        ));
    }
    if count != labels_count {
        return Err(format!("{labels_path}: {labels_count} labels for {count} images"));
    }
    if let Some(label) = labels.iter().find(|&&label| label > 9) {
        return Err(format!("{labels_path}: {label} is not a digit"));
    }
    let digits = images.chunks_exact(PIXELS).zip(labels);
    let digit = |pixels: &[u8]| pixels.try_into().expect("chunks are of this size");
    Ok(digits.map(|(pixels, label)| Digit { pixels: digit(pixels), label }).collect())
}

/// Reads an IDX file of bytes with `D` dimensions: its path, its shape and its bytes.
fn read_idx<const D: usize>(dir: &Path, name: &str) -> Result<(PathBuf, [usize; D], Vec<u8>)> {
    let (raw, compressed) = (dir.join(name), dir.join(format!("{name}.gz")));
    let path = if raw.exists() { raw } else { compressed };
    let shown = path.display();
    let file = BufReader::new(File::open(&path).context(shown.to_string())?);
    let mut reader: Box<dyn Read> = match path.extension() {
        Some(ending) if ending == "gz" => Box::new(GzDecoder::new(file)),
        _ => Box::new(file),
    };

    let mut number = || {
        let mut bytes = [0; 4];
        reader.read_exact(&mut bytes).map(|()| u32::from_be_bytes(bytes)).context(&shown)
    };
    // Two zero bytes, 8 for the type of unsigned bytes, and the number of dimensions.
    let (magic, expected) = (number()?, 0x0800 + D as u32);
    if magic != expected {
        return Err(format!(
            "{shown}: not the IDX file: it starts with {magic:#x}, not {expected:#x}"
        ));
    }
    let mut shape = [0; D];
    for size in &mut shape {
        *size = number()? as usize;
    }
    let promised = shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
    let promised = promised.ok_or_else(|| format!("{shown}: impossible shape {shape:?}"))?;
    // Allocates memory for what the file contains, not for what the header says.
    let mut bytes = Vec::new();
    reader.take(promised as u64 + 1).read_to_end(&mut bytes).context(&shown)?;
    if bytes.len() != promised {
        let found = if bytes.len() > promised { "more" } else { &bytes.len().to_string() };
        return Err(format!(
            "{shown}: {promised} bytes expected for {shape:?}, but there are {found}"
        ));
    }
    Ok((path, shape, bytes))
}

/// Downloads one file and checks it, before it is written under its name.
fn download(path: &Path, size: u64, sha256: &str) -> Result<()> {
    let name = path.file_name().and_then(|name| name.to_str()).expect("the name is ours");
    let mut problem = String::new();
    for mirror in MIRRORS {
        let url = format!("{mirror}/{name}");
        match fetch(&url, size, sha256, TIMEOUT) {
            Ok(bytes) => {
                println!("Downloaded {url}");
                return write_atomically(path, &bytes).context(path.display());
            }
            Err(error) => problem = error,
        }
    }
    Err(problem)
}
