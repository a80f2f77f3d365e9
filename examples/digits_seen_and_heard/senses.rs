//! The pictures and sounds to train on and to test on. The class of each is the digit.

use std::path::Path;

use common::{
    Result,
    digits::{Digit, Digits, PIXELS, SIDE},
    recognizer::Grid,
    speech::{Recording, Recordings},
};

/// The number of pictures to test on.
const TEST: usize = 2000;

/// The new speaker among the synthetic voices. It is not the one that is hardest to understand: if neither
/// encoder recognizes its input, a pair teaches neither of them anything.
const GENERATED_SPEAKER: &str = "bass";

/// Pictures or sounds for training and for testing.
pub struct Sense {
    pub train: Vec<Grid>,
    pub test: Vec<Grid>,
}

/// The data of both tasks: that of the base, and that which is new to it.
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
    /// The base learns from the first `train_size` pictures as they are, and from all speakers but one. New
    /// are the same pictures after `change`, and that speaker. The split of the recordings is the dataset's
    /// own.
    pub fn load(
        images: Option<&Path>,
        recordings: Option<&Path>,
        generated: bool,
        train_size: usize,
        seed: u64,
        change: impl Fn(&[u8; PIXELS]) -> [u8; PIXELS],
    ) -> Result<Self> {
        // First, because they are not downloaded: without the argument this fails at once.
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
