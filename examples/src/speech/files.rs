//! The files of the Free Spoken Digit Dataset: `{digit}_{speaker}_{number}.wav`, each a spoken digit.

use std::{fs, path::Path};

use hound::{SampleFormat, WavReader, WavSpec};

use burn_lora_llm::{Context, Result};

use super::{RATE, Recording, Recordings, spectrogram::LogMel};

/// What to do without a directory.
pub const WHERE: &str = "no recordings: `git clone \
    https://github.com/Jakobovski/free-spoken-digit-dataset` has them, in its directory `recordings`; or \
    use --generated";

/// What every file must hold.
const FORMAT: WavSpec = WavSpec {
    channels: 1,
    sample_rate: RATE,
    bits_per_sample: 16,
    sample_format: SampleFormat::Int,
};

/// Reads all `.wav` files in `dir`, or in its directory `recordings`.
pub fn read(dir: &Path) -> Result<Recordings> {
    let inside = dir.join("recordings");
    let dir = if inside.is_dir() { &inside } else { dir };
    let log_mel = LogMel::default();
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).context(dir.display())? {
        let path = entry.context(dir.display())?.path();
        if path.extension().is_some_and(|ending| ending == "wav") {
            let recording = read_file(&path, &log_mel);
            all.push(recording.context(path.display())?);
        }
    }
    if all.is_empty() {
        return Err(format!("{}: there are no .wav files", dir.display()));
    }
    Ok(Recordings { name: "free-spoken-digits", newcomer: "george", all })
}

fn read_file(path: &Path, log_mel: &LogMel) -> Result<Recording> {
    let name = path.file_stem().and_then(|name| name.to_str());
    let (digit, speaker, number) = name.and_then(parse).ok_or(
        "the name is not like 7_jackson_32.wav: a digit, the name of the speaker and a number",
    )?;
    let mut reader = WavReader::open(path).map_err(|error| error.to_string())?;
    let spec = reader.spec();
    if spec != FORMAT {
        return Err(format!("{} is needed, not {}", shown(FORMAT), shown(spec)));
    }
    let samples = reader.samples::<i16>().map(|it| it.map(|it| f32::from(it) / 32768.0));
    let samples: Vec<f32> =
        samples.collect::<hound::Result<_>>().map_err(|error| error.to_string())?;
    if samples.is_empty() {
        return Err("it has no samples".to_owned());
    }
    let spectrogram = log_mel.spectrogram(&samples);
    Ok(Recording { digit, speaker: speaker.to_owned(), number, spectrogram })
}

/// The digit, the speaker and the number in a file's name without its ending.
pub fn parse(name: &str) -> Option<(u8, &str, u32)> {
    let (digit, rest) = name.split_once('_')?;
    let (speaker, number) = rest.rsplit_once('_')?;
    // Rust's parser would take a sign, too.
    let is_number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let valid = digit.len() == 1 && is_number(digit) && !speaker.is_empty() && is_number(number);
    valid.then(|| Some((digit.parse().ok()?, speaker, number.parse().ok()?))).flatten()
}

fn shown(spec: WavSpec) -> String {
    let WavSpec { channels, sample_rate, bits_per_sample, sample_format } = spec;
    let kind = match sample_format {
        SampleFormat::Int => "integers",
        SampleFormat::Float => "floats",
    };
    let channels =
        if channels == 1 { "1 channel".to_owned() } else { format!("{channels} channels") };
    format!("{channels} at {sample_rate} Hz of {bits_per_sample}-bit {kind}")
}
