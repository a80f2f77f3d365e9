//! Digits spoken by synthetic voices: a source, pulses or hiss, goes through two resonators, whose
//! frequencies are the formants of the mouth. A digit is where the formants are in its three sounds.

use std::f32::consts::{PI, TAU};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use rand_distr::StandardNormal;

use super::{RATE, Recording, Recordings, spectrogram::LogMel};

/// The number of recordings of each digit by each voice in the examples.
pub const RECORDINGS: u32 = 30;

/// A sound: its two formants in Hz, and how much of it is hiss, from 0 to 1.
type Sound = [f32; 3];

/// The sounds of the digits 0 to 9, roughly those of the English words.
const DIGITS: [[Sound; 3]; 10] = [
    [[300.0, 2100.0, 0.5], [450.0, 1300.0, 0.0], [450.0, 850.0, 0.0]],
    [[320.0, 700.0, 0.0], [650.0, 1200.0, 0.0], [350.0, 1500.0, 0.0]],
    [[350.0, 1800.0, 0.9], [320.0, 1100.0, 0.0], [300.0, 900.0, 0.0]],
    [[350.0, 1300.0, 0.8], [300.0, 1800.0, 0.0], [280.0, 2300.0, 0.0]],
    [[450.0, 1000.0, 0.9], [550.0, 850.0, 0.0], [500.0, 1300.0, 0.0]],
    [[500.0, 1200.0, 0.9], [750.0, 1200.0, 0.0], [400.0, 1900.0, 0.2]],
    [[400.0, 2300.0, 1.0], [400.0, 2000.0, 0.0], [400.0, 2300.0, 1.0]],
    [[450.0, 2200.0, 1.0], [550.0, 1700.0, 0.0], [400.0, 1400.0, 0.0]],
    [[600.0, 1700.0, 0.0], [450.0, 2000.0, 0.0], [350.0, 2100.0, 0.7]],
    [[400.0, 1400.0, 0.0], [750.0, 1300.0, 0.0], [350.0, 1700.0, 0.0]],
];

/// How a speaker sounds.
struct Voice {
    name: &'static str,
    /// The number of pulses in a second.
    pitch: f32,
    /// What the formants are multiplied by: a short throat has high ones.
    throat: f32,
    /// How long a digit takes, in seconds.
    duration: f32,
    /// How much hiss is in every sound.
    breath: f32,
}

/// The last one is new to who has heard the others.
const VOICES: [Voice; 6] = [
    Voice { name: "bass", pitch: 85.0, throat: 0.86, duration: 0.6, breath: 0.05 },
    Voice { name: "baritone", pitch: 105.0, throat: 0.92, duration: 0.5, breath: 0.02 },
    Voice { name: "tenor", pitch: 130.0, throat: 0.97, duration: 0.42, breath: 0.1 },
    Voice { name: "alto", pitch: 175.0, throat: 1.06, duration: 0.5, breath: 0.05 },
    Voice { name: "soprano", pitch: 215.0, throat: 1.12, duration: 0.45, breath: 0.15 },
    Voice { name: "child", pitch: 310.0, throat: 1.42, duration: 0.34, breath: 0.25 },
];

/// `count` recordings of each digit by each voice. The same seed gives the same recordings.
pub fn recordings(count: u32, seed: u64) -> Recordings {
    let mut rng = StdRng::seed_from_u64(seed);
    let log_mel = LogMel::default();
    let mut all = Vec::new();
    for voice in &VOICES {
        for (digit, sounds) in (0..).zip(&DIGITS) {
            for number in 0..count {
                let spectrogram = log_mel.spectrogram(&speak(sounds, voice, &mut rng));
                all.push(Recording { digit, speaker: voice.name.to_owned(), number, spectrogram });
            }
        }
    }
    Recordings { name: "generated", newcomer: VOICES[VOICES.len() - 1].name, all }
}

/// The samples of a digit, which is a little different each time.
fn speak(sounds: &[Sound; 3], voice: &Voice, rng: &mut StdRng) -> Vec<f32> {
    let pitch = voice.pitch * rng.random_range(0.9..1.1);
    let length = (voice.duration * rng.random_range(0.8..1.25) * RATE as f32) as usize;
    let sounds = sounds.map(|[first, second, hiss]| {
        let mut formant = |hertz: f32| hertz * voice.throat * rng.random_range(0.93..1.07);
        [formant(first), formant(second), hiss.max(voice.breath)]
    });
    let noise = rng.random_range(0.002..0.02);
    let mut resonators = [Resonator::default(); 2];
    let mut phase = 0.0;
    let speak = |index: usize| {
        let at = index as f32 / length as f32;
        let [first, second, hiss] = sound_at(&sounds, at);
        // The pitch falls towards the end of a word.
        phase += pitch * (1.1 - 0.2 * at) / RATE as f32;
        let pulse = if phase >= 1.0 { 1.0 } else { 0.0 };
        phase -= pulse;
        let hissing: f32 = rng.sample(StandardNormal);
        let source = (1.0 - hiss) * pulse + 0.1 * hiss * hissing;
        let mouth = [first, second].into_iter().zip(&mut resonators);
        let sound: f32 = mouth.map(|(hertz, resonator)| resonator.next(source, hertz)).sum();
        let around: f32 = rng.sample(StandardNormal);
        // The word begins and ends softly.
        sound * (PI * at).sin().sqrt() + noise * around
    };
    (0..length).map(speak).collect()
}

/// The sound at a point of the word from 0 to 1, on the way from one sound to the next.
fn sound_at(sounds: &[Sound; 3], at: f32) -> Sound {
    let position = at * 2.0;
    let from = if position < 1.0 { 0 } else { 1 };
    let along = position - from as f32;
    std::array::from_fn(|part| (1.0 - along) * sounds[from][part] + along * sounds[from + 1][part])
}

/// A filter that lets one frequency ring.
#[derive(Clone, Copy, Default)]
struct Resonator {
    /// The last outputs: the one before, and the one before that.
    last: [f32; 2],
}

impl Resonator {
    fn next(&mut self, input: f32, hertz: f32) -> f32 {
        const BANDWIDTH: f32 = 90.0;
        let radius = (-PI * BANDWIDTH / RATE as f32).exp();
        let turn = 2.0 * radius * (TAU * hertz / RATE as f32).cos();
        let output = (1.0 - radius) * input + turn * self.last[0] - radius * radius * self.last[1];
        self.last = [output, self.last[0]];
        output
    }
}
