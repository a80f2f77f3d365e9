//! Which recordings are for what.

use common::{
    Result,
    recognizer::Grid,
    speech::{Recording, Recordings},
};

/// The recordings of the old speakers and of the new one. The class of each is the digit.
pub struct Split {
    pub old: Vec<Grid>,
    pub old_test: Vec<Grid>,
    pub new: Vec<Grid>,
    pub new_test: Vec<Grid>,
}

impl Split {
    /// The old speakers' recordings as in the dataset's official split. Of the new `speaker`'s, `new_size`
    /// are for training, with the same number of each digit if possible, and all others for testing.
    pub fn new(recordings: &Recordings, speaker: &str, new_size: usize) -> Result<Self> {
        let speakers = recordings.speakers();
        let names = || speakers.iter().copied().collect::<Vec<_>>().join(", ");
        if !speakers.contains(speaker) {
            return Err(format!("there is no speaker `{speaker}`, only {}", names()));
        }
        let (mut new, old): (Vec<_>, Vec<_>) =
            recordings.all.iter().partition(|it| it.speaker == speaker);
        let (old_test, old): (Vec<_>, Vec<_>) = old.into_iter().partition(|it| it.is_test());
        if old.is_empty() || old_test.is_empty() {
            return Err(format!(
                "recordings of other speakers than {speaker} are needed, with numbers up to 4 and from 5"
            ));
        }
        if new.len() <= new_size {
            let known = new.len();
            return Err(format!("{speaker} has {known} recordings: {new_size} leave none to test"));
        }
        // Those that the official split would train on come first.
        new.sort_by_key(|it| it.is_test());
        let new_test = new.split_off(new_size);
        let grids = |recordings: Vec<&Recording>| -> Vec<Grid> {
            recordings.into_iter().map(|it| it.grid(it.digit)).collect()
        };
        Ok(Self {
            old: grids(old),
            old_test: grids(old_test),
            new: grids(new),
            new_test: grids(new_test),
        })
    }
}
