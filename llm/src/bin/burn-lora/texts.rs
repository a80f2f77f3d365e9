//! The texts of a training, which are read before the model is.

use std::{
    fs,
    path::{Path, PathBuf},
};

use burn_lora_llm::{
    Context, Result,
    chat::Chat,
    data::{self, Reading, Text, Texts},
};
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
use sha2::{Digest, Sha256};

use crate::{args::TrainArgs, generated, hex, reviews};

/// The directory of texts that were generated, in that of the run.
const GENERATED: &str = "data";

const TRAIN: &str = "train.jsonl";
const VALID: &str = "valid.jsonl";

/// The number of reviews to evaluate on during a training.
const WATCHED: usize = 64;

/// The seed by which texts are held out. It is not that of the training: runs with several seeds are compared on the
/// same texts.
const SEED: u64 = 42;

/// What a training learns from, and is evaluated on.
pub struct Material {
    pub texts: Vec<Text>,
    pub valid: Vec<Text>,
    /// The files, and hashes of their contents.
    pub files: Vec<(PathBuf, String)>,
}

/// Fails if a file is missing, before a model is looked for, or made.
///
/// # Errors
///
/// If it is. The error names `--valid-share` where that helps.
pub fn check(args: &TrainArgs) -> Result<()> {
    let there = |path: PathBuf| fs::metadata(&path).context(path.display()).map(drop);
    if let Some(dir) = &args.sst2 {
        return ["train.tsv", "dev.tsv", "test.tsv"].iter().try_for_each(|it| there(dir.join(it)));
    }
    let Some(dir) = &args.data else { return Ok(()) };
    there(dir.join(TRAIN))?;
    match args.valid_share {
        Some(_) => Ok(()),
        None => there(dir.join(VALID)).map_err(|problem| {
            format!(
                "{problem}. It has the texts to evaluate on; a share of {TRAIN} takes their place with \
                 `--valid-share 0.1`"
            )
        }),
    }
}

/// Reads the texts; of SST-2, the first `reviews` and some to watch. What is cut off, left out and held out is printed
/// if this `is_first`.
///
/// # Errors
///
/// If a file cannot be read, or has no texts to learn.
pub fn read(
    args: &TrainArgs,
    reviews: usize,
    is_first: bool,
    chat: &Chat,
    reading: &Reading,
) -> Result<Material> {
    let (paths, [texts, valid]) = match (&args.sst2, &args.data) {
        (Some(dir), _) => {
            let [train, dev] = ["train.tsv", "dev.tsv"].map(|it| dir.join(it));
            let texts = reviews::texts(&train, reviews, chat, reading)?;
            let valid = reviews::texts(&dev, WATCHED, chat, reading)?;
            (vec![train, dev], [texts, valid])
        }
        (None, data) => {
            let dir = data.clone().unwrap_or_else(|| args.out.join(GENERATED));
            if data.is_none() && is_first {
                generated::write_texts(&dir)?;
            }
            let [train, valid] = [TRAIN, VALID].map(|it| dir.join(it));
            let texts = data::read(&train, chat, reading)?;
            match args.valid_share {
                Some(_) => (vec![train], [texts, Texts::default()]),
                None => {
                    let held = data::read(&valid, chat, reading)?;
                    (vec![train, valid], [texts, held])
                }
            }
        }
    };
    if is_first {
        for (path, texts) in paths.iter().zip([&texts, &valid]) {
            tell(path, texts, args.max_length, reading);
        }
    }
    let [texts, valid] = match args.valid_share {
        Some(share) => hold_out(texts.texts, share, &paths[0], is_first)?,
        None => [texts.texts, valid.texts],
    };
    let hashed = |path: PathBuf| {
        let bytes = fs::read(&path).context(path.display())?;
        Ok((path, hex(&Sha256::digest(bytes))))
    };
    Ok(Material { texts, valid, files: paths.into_iter().map(hashed).collect::<Result<_>>()? })
}

/// Takes a share of the texts, at least one, to evaluate on, and returns what is left and these. Which they are,
/// depends on the number of texts alone.
fn hold_out(all: Vec<Text>, share: f64, path: &Path, is_first: bool) -> Result<[Vec<Text>; 2]> {
    let count = all.len();
    if count < 2 {
        return Err(format!("{}: one text cannot be divided", path.display()));
    }
    let held = ((count as f64 * share).round() as usize).clamp(1, count - 1);
    if is_first {
        let instead = path.with_file_name(VALID).exists();
        let instead = if instead { format!("; {VALID} is not read") } else { String::new() };
        let path = path.display();
        println!("{held} of the {count} texts in {path} are held out to evaluate on{instead}");
    }
    let mut order: Vec<_> = (0..count).collect();
    order.shuffle(&mut StdRng::seed_from_u64(SEED));
    let mut is_held = vec![false; count];
    order[..held].iter().for_each(|&it| is_held[it] = true);
    let (held, texts): (Vec<_>, Vec<_>) =
        all.into_iter().zip(is_held).partition(|(_, is_held)| *is_held);
    Ok([texts, held].map(|texts| texts.into_iter().map(|(text, _)| text).collect()))
}

/// Says what of the file is not learned, if there is something.
pub fn tell(path: &Path, texts: &Texts, asked: usize, reading: &Reading) {
    let Texts { texts, cut, skipped } = texts;
    let all = texts.len() + skipped;
    let length = reading.max_length;
    let by = match length < asked {
        true => format!("{length} tokens, the context of the model"),
        false => format!("{length} tokens (--max-length)"),
    };
    if *cut > 0 {
        println!("{}: {cut} of {all} texts are cut off at {by}", path.display());
    }
    if *skipped > 0 {
        println!(
            "{}: {skipped} of {all} texts are skipped, which are empty or have no token to learn within {by}",
            path.display()
        );
    }
}
