//! Tests of reading recordings.

use std::{fs, path::Path};

use hound::{SampleFormat, WavSpec, WavWriter};

use common::speech::files::{parse, read};

const GOOD: WavSpec = WavSpec {
    channels: 1,
    sample_rate: 8000,
    bits_per_sample: 16,
    sample_format: SampleFormat::Int,
};

fn write(path: &Path, spec: WavSpec, samples: usize) {
    let mut writer = WavWriter::create(path, spec).unwrap();
    for index in 0..samples {
        writer.write_sample((index % 100) as i16 * 100).unwrap();
    }
    writer.finalize().unwrap();
}

/// The message for a directory with this file alone.
fn refusal(name: &str, write: impl FnOnce(&Path)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    write(&path);
    let error = read(dir.path()).err().unwrap();
    assert!(error.starts_with(&path.display().to_string()), "{error}");
    assert!(!error.contains('\n'), "{error}");
    error
}

#[test]
fn names_say_what_is_spoken_and_by_whom() {
    assert_eq!(parse("7_jackson_32"), Some((7, "jackson", 32)));
    assert_eq!(parse("0_a_b_1"), Some((0, "a_b", 1)));
    for name in ["", "7", "7_32", "7__32", "x_jackson_1", "12_jackson_1", "+_jackson_1", "1_j_"] {
        assert_eq!(parse(name), None, "{name}");
    }
    for number in ["-1", "+1", "99999999999", "1.5", "x"] {
        assert_eq!(parse(&format!("7_jackson_{number}")), None, "{number}");
    }
}

#[test]
fn reads_recordings_also_from_the_directory_above() {
    let dir = tempfile::tempdir().unwrap();
    let inside = dir.path().join("recordings");
    fs::create_dir(&inside).unwrap();
    write(&inside.join("7_jackson_32.wav"), GOOD, 3000);
    fs::write(inside.join("README.md"), "not a recording").unwrap();
    for dir in [dir.path(), &inside] {
        let all = read(dir).unwrap().all;
        assert_eq!(all.len(), 1);
        assert_eq!((all[0].digit, &*all[0].speaker, all[0].number), (7, "jackson", 32));
    }
}

#[test]
fn refuses_what_is_no_such_recording() {
    let name = "7_jackson_32.wav";
    let of = |spec| refusal(name, |path| write(path, spec, 3000));
    let error = of(WavSpec { sample_rate: 16000, ..GOOD });
    assert!(error.contains("1 channel at 8000 Hz of 16-bit integers is needed"), "{error}");
    assert!(error.contains("not 1 channel at 16000 Hz"), "{error}");
    let error = of(WavSpec { channels: 2, ..GOOD });
    assert!(error.contains("not 2 channels"), "{error}");
    let error = of(WavSpec { bits_per_sample: 24, ..GOOD });
    assert!(error.contains("24-bit"), "{error}");
    let error = refusal("seven.wav", |path| write(path, GOOD, 3000));
    assert!(error.contains("the name is not like 7_jackson_32.wav"), "{error}");
    assert!(refusal(name, |path| write(path, GOOD, 0)).contains("no samples"));
    refusal(name, |path| fs::write(path, "not a recording").unwrap());
    refusal(name, |path| fs::write(path, "").unwrap());
    refusal(name, |path| fs::create_dir(path).unwrap());
}

#[test]
fn refuses_directories_without_recordings() {
    let dir = tempfile::tempdir().unwrap();
    let error = read(dir.path()).err().unwrap();
    assert!(error.contains("there are no .wav files"), "{error}");
    let missing = dir.path().join("missing");
    assert!(read(&missing).err().unwrap().contains("missing"));
}

/// Wherever a file ends early, it is refused. Whatever its header says, nothing panics.
#[test]
fn broken_files_are_errors() {
    const HEADER: usize = 44;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("7_jackson_32.wav");
    write(&path, GOOD, 300);
    let bytes = fs::read(&path).unwrap();
    for end in (0..bytes.len()).step_by(3) {
        fs::write(&path, &bytes[..end]).unwrap();
        assert!(read(dir.path()).is_err(), "{end} bytes");
    }
    for position in 0..HEADER {
        for value in [0, 1, 2, 3, 127, 128, 254, 255] {
            let mut bytes = bytes.clone();
            bytes[position] = value;
            fs::write(&path, &bytes).unwrap();
            let _ = read(dir.path());
        }
    }
}
