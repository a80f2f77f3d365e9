//! Spoken digits as log-mel spectrograms: the Free Spoken Digit Dataset, or synthetic voices.

pub mod files;
pub mod generated;
pub mod mel;
pub mod spectrogram;

use std::{collections::BTreeSet, path::Path, sync::Arc};

use burn_lora_llm::{Result, cli::live::during};

use super::recognizer::Grid;
use spectrogram::{BANDS, FRAMES};

/// The number of samples of a second.
pub const RATE: u32 = 8000;

/// Recordings with lower numbers are for testing, as in the dataset's official split.
const TEST: u32 = 5;

/// A spoken digit.
#[derive(Clone, Debug)]
pub struct Recording {
    pub digit: u8,
    pub speaker: String,
    /// Tells the recordings of one digit by one speaker apart.
    pub number: u32,
    /// From 0, which is silence, to 1: `[BANDS, FRAMES]`, row by row.
    pub spectrogram: Arc<[f32]>,
}

impl Recording {
    /// Whether the recording is for testing.
    pub fn is_test(&self) -> bool {
        self.number < TEST
    }

    /// The spectrogram as a sample of this class.
    pub fn grid(&self, label: u8) -> Grid {
        Grid { values: self.spectrogram.clone(), shape: [BANDS, FRAMES], label }
    }
}

/// Recordings of several speakers, in the order of their numbers, digits and speakers. So the first few
/// of a speaker have all digits.
pub struct Recordings {
    /// "free-spoken-digits" or "generated".
    pub name: &'static str,
    /// The speaker whom the others say least about.
    pub newcomer: &'static str,
    pub all: Vec<Recording>,
}

impl Recordings {
    /// The dataset from `dir`, or synthetic voices if `generated` is set.
    pub fn load(dir: Option<&Path>, generated: bool, seed: u64) -> Result<Self> {
        let mut recordings = match dir {
            _ if generated => {
                during("synthesizing voices", || generated::recordings(generated::RECORDINGS, seed))
            }
            Some(dir) => {
                println!("Data: recordings from {}", dir.display());
                during("reading recordings", || files::read(dir))?
            }
            None => return Err(files::WHERE.to_owned()),
        };
        recordings
            .all
            .sort_by(|a, b| (a.number, a.digit, &a.speaker).cmp(&(b.number, b.digit, &b.speaker)));
        Ok(recordings)
    }

    pub fn speakers(&self) -> BTreeSet<&str> {
        self.all.iter().map(|it| &*it.speaker).collect()
    }
}
