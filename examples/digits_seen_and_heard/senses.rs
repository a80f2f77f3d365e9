//! What there is to see and to hear. The class of each picture and sound is the digit.

use std::path::Path;

use common::{
    Result,
    digits::{Digit, Digits, PIXELS, SIDE},
    recognizer::Grid,
    speech::{Recording, Recordings},
};

/// The number of pictures to test on.
const TEST: usize = 2000;

/// The new one of the synthetic voices, which is not the hardest to understand. Where neither eye nor ear
/// understands anything, a pair tells neither of them what the other has.
const GENERATED_SPEAKER: &str = "bass";

/// Pictures or sounds for training and for testing.
pub struct Sense {
    pub train: Vec<Grid>,
    pub test: Vec<Grid>,
}

/// What the encoders know, and what is new to them.
pub struct Senses {
    /// "mnist" or "generated".
    pub images: &'static str,
    /// "free-spoken-digits" or "generated".
    pub recordings: &'static str,
    /// The speaker who is new.
    pub speaker: &'static str,
    pub seen_before: Sense,
    pub heard_before: Sense,
    pub seen: Sense,
    pub heard: Sense,
}

impl Senses {
    /// Before: the first `train_size` pictures as they are, and the speakers but one. New: the same
    /// pictures after `change`, and the one speaker. Recordings are split as the dataset's authors do.
    pub fn load(
        images: Option<&Path>,
        recordings: Option<&Path>,
        generated: bool,
        train_size: usize,
        seed: u64,
        change: impl Fn(&[u8; PIXELS]) -> [u8; PIXELS],
    ) -> Result<Self> {
        // First, because there is no other way to get them than the argument.
        let recordings = Recordings::load(recordings, generated, seed)?;
        let mut digits = Digits::load(images, generated, seed)?;
        digits.train.truncate(train_size);
        digits.test.truncate(TEST);
        let speaker = if generated { GENERATED_SPEAKER } else { recordings.newcomer };
        Self::new(&recordings, speaker, &digits, &digits.map(change))
    }

    /// The same, of these recordings and pictures.
    pub fn new(
        recordings: &Recordings,
        speaker: &'static str,
        digits: &Digits,
        changed: &Digits,
    ) -> Result<Self> {
        let (new, old): (Vec<_>, Vec<_>) =
            recordings.all.iter().partition(|it| it.speaker == speaker);
        Ok(Self {
            images: digits.name,
            recordings: recordings.name,
            speaker,
            seen_before: pictures(digits),
            heard_before: sounds(&old, speaker)?,
            seen: pictures(changed),
            heard: sounds(&new, speaker)?,
        })
    }
}

fn pictures(digits: &Digits) -> Sense {
    let grid = |digit: &Digit| {
        let values = digit.pixels.iter().map(|byte| f32::from(*byte) / 255.0).collect();
        Grid { values, shape: [SIDE, SIDE], label: digit.label }
    };
    let grids = |digits: &[Digit]| digits.iter().map(grid).collect();
    Sense { train: grids(&digits.train), test: grids(&digits.test) }
}

fn sounds(recordings: &[&Recording], speaker: &str) -> Result<Sense> {
    let grids = |test: bool| -> Vec<Grid> {
        let chosen = recordings.iter().filter(|it| it.is_test() == test);
        chosen.map(|it| it.grid(it.digit)).collect()
    };
    let sense = Sense { train: grids(false), test: grids(true) };
    if sense.train.is_empty() || sense.test.is_empty() {
        return Err(format!(
            "recordings of {speaker} and of others are needed, with numbers up to 4 and from 5"
        ));
    }
    Ok(sense)
}
