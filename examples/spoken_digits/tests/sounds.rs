//! Tests of the mel scale, spectrograms, and synthetic voices.

use std::f64::consts::TAU;

use common::speech::{
    RATE, Recording, generated,
    mel::{centers, filters, hertz, mel},
    spectrogram::{BANDS, FRAMES, HOP, LogMel, SAMPLES, WINDOW},
};

fn tone(hertz: f64, length: usize) -> Vec<f32> {
    let turn = TAU * hertz / f64::from(RATE);
    (0..length).map(|index| 0.5 * (turn * index as f64).sin() as f32).collect()
}

/// HTK's scale gives 1000 mel to 1000 Hz. The other values were computed by hand.
#[test]
fn the_mel_scale_has_known_values() {
    for (frequency, expected) in
        [(0.0, 0.0), (440.0, 549.64), (700.0, 781.17), (1000.0, 999.99), (4000.0, 2146.06)]
    {
        assert!((mel(frequency) - expected).abs() < 0.01, "{frequency} Hz: {}", mel(frequency));
        assert!((hertz(mel(frequency)) - frequency).abs() < 1e-6);
    }
}

#[test]
fn filters_overlap_to_one() {
    let (bands, bins, highest) = (BANDS, WINDOW / 2 + 1, f64::from(RATE) / 2.0);
    let (filters, centers) = (filters(bands, bins, highest), centers(bands, highest));
    assert!(filters.iter().all(|filter| filter.iter().any(|weight| *weight > 0.1)));
    for bin in 0..bins {
        let frequency = highest * bin as f64 / (bins - 1) as f64;
        let sum: f32 = filters.iter().map(|filter| filter[bin]).sum();
        if (centers[1]..=centers[bands]).contains(&frequency) {
            assert!((sum - 1.0).abs() < 1e-5, "{sum} at {frequency} Hz");
        } else {
            assert!((0.0..1.0).contains(&sum), "{sum} at {frequency} Hz");
        }
    }
}

#[test]
fn a_tone_is_loudest_in_its_band() {
    let centers = centers(BANDS, f64::from(RATE) / 2.0);
    let log_mel = LogMel::default();
    for band in 2..BANDS {
        let powers = &log_mel.powers(&tone(centers[band + 1], WINDOW))[0];
        let loudest = (0..BANDS).max_by(|a, b| powers[*a].total_cmp(&powers[*b]));
        assert_eq!(loudest, Some(band), "{powers:?}");
    }
}

#[test]
fn powers_are_those_of_a_plain_fourier_transform() {
    let mut state = 1u32;
    let noise: Vec<f32> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    })
    .take(WINDOW + HOP)
    .collect();
    let found = LogMel::default().powers(&noise);
    assert_eq!(found.len(), 2);
    let bins = WINDOW / 2 + 1;
    let filters = filters(BANDS, bins, f64::from(RATE) / 2.0);
    for (frame, found) in found.iter().enumerate() {
        let power = |bin: usize| {
            let (mut re, mut im) = (0.0, 0.0);
            for index in 0..WINDOW {
                let hann = 0.5 - 0.5 * (TAU * index as f64 / WINDOW as f64).cos();
                let value = hann * f64::from(noise[frame * HOP + index]);
                let angle = TAU * (bin * index % WINDOW) as f64 / WINDOW as f64;
                re += value * angle.cos();
                im -= value * angle.sin();
            }
            re * re + im * im
        };
        let powers: Vec<f64> = (0..bins).map(power).collect();
        for (filter, found) in filters.iter().zip(found) {
            let weighted = filter.iter().zip(&powers);
            let expected: f64 = weighted.map(|(weight, power)| f64::from(*weight) * power).sum();
            assert!((f64::from(*found) - expected).abs() < 1e-4 * expected, "{found} {expected}");
        }
    }
}

#[test]
fn spectrograms_are_centered_and_from_0_to_1() {
    let log_mel = LogMel::default();
    let at = |spectrogram: &[f32], frame: usize| {
        (0..BANDS).map(|band| spectrogram[band * FRAMES + frame]).fold(0.0, f32::max)
    };
    let short = log_mel.spectrogram(&tone(1000.0, 4 * WINDOW));
    assert_eq!(short.len(), BANDS * FRAMES);
    assert!(short.iter().all(|value| (0.0..=1.0).contains(value)));
    assert!(at(&short, FRAMES / 2) > 0.99);
    assert_eq!([at(&short, 0), at(&short, FRAMES - 1)], [0.0; 2]);
    // The loudness does not matter, and silence is no division by zero.
    let quiet: Vec<f32> = tone(1000.0, 4 * WINDOW).iter().map(|it| it / 100.0).collect();
    let quiet = log_mel.spectrogram(&quiet);
    assert!(short.iter().zip(&*quiet).all(|(a, b)| (a - b).abs() < 1e-3));
    assert!(log_mel.spectrogram(&[0.0; 100]).iter().all(|value| *value == 0.0));
    // Of a long one, the middle is kept.
    let mut long = vec![0.0; 3 * SAMPLES];
    long[SAMPLES..2 * SAMPLES].copy_from_slice(&tone(500.0, SAMPLES));
    assert_eq!(log_mel.spectrogram(&long), log_mel.spectrogram(&tone(500.0, SAMPLES)));
}

#[test]
fn a_seed_gives_the_same_voices() {
    let [first, same, other] = [7, 7, 8].map(|seed| generated::recordings(1, seed).all);
    assert_eq!(first.len(), 60);
    let spectrograms =
        |all: &[Recording]| all.iter().map(|it| it.spectrogram.clone()).collect::<Vec<_>>();
    assert!(first.iter().all(|it| it.spectrogram.iter().all(|value| value.is_finite())));
    assert_eq!(spectrograms(&first), spectrograms(&same));
    assert_ne!(spectrograms(&first), spectrograms(&other));
}
