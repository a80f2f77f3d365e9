//! Tests of which recordings are for what.

use std::{collections::HashSet, sync::Arc};

use common::speech::{Recording, Recordings};

use crate::split::Split;

/// Ten recordings of each digit by three speakers. Each spectrogram tells its recording.
fn recordings() -> Recordings {
    let mut all = Vec::new();
    for number in 0..10 {
        for digit in 0..10 {
            for (index, speaker) in ["a", "b", "c"].into_iter().enumerate() {
                let spectrogram = Arc::new([index as f32, f32::from(digit), number as f32]);
                all.push(Recording { digit, speaker: speaker.to_owned(), number, spectrogram });
            }
        }
    }
    Recordings { name: "test", newcomer: "c", all }
}

#[test]
fn every_recording_is_for_one_purpose() {
    let Split { old, old_test, new, new_test } = Split::new(&recordings(), "b", 40).unwrap();
    assert_eq!([&old, &old_test, &new, &new_test].map(Vec::len), [100, 100, 40, 60]);
    let all = [&old, &old_test, &new, &new_test].into_iter().flatten();
    let distinct: HashSet<_> =
        all.map(|it| it.values.iter().map(|v| *v as u8).collect::<Vec<_>>()).collect();
    assert_eq!(distinct.len(), 300);
    assert!(old.iter().chain(&old_test).all(|it| it.values[0] != 1.0));
    assert!(new.iter().chain(&new_test).all(|it| it.values[0] == 1.0));
    // As in the official split, and four of each digit.
    assert!(old.iter().chain(&new).all(|it| it.values[2] >= 5.0));
    assert!(old_test.iter().all(|it| it.values[2] < 5.0));
    for digit in 0..10 {
        assert_eq!(new.iter().filter(|it| it.label == digit).count(), 4);
    }
}

#[test]
fn says_what_is_missing() {
    let error = |recordings: &Recordings, speaker, new_size| {
        Split::new(recordings, speaker, new_size).err().unwrap()
    };
    let mut few = recordings();
    assert_eq!(error(&few, "d", 40), "there is no speaker `d`, only a, b, c");
    assert!(error(&few, "a", 100).contains("a has 100 recordings: 100 leave none to test"));
    few.all.retain(|it| it.speaker == "a");
    assert!(error(&few, "a", 40).contains("recordings of other speakers than a"));
}
