//! Log-mel spectrograms: how loud each band of frequencies is, from moment to moment.

use std::{f32::consts::TAU, sync::Arc};

use realfft::{RealFftPlanner, RealToComplex};

use super::{RATE, mel};

/// The number of bands of frequencies.
pub const BANDS: usize = 32;

/// The number of moments: one second.
pub const FRAMES: usize = 64;

/// The number of samples of which a moment's spectrum is made: 32 ms.
pub const WINDOW: usize = 256;

/// The number of samples from one moment to the next: 16 ms.
pub const HOP: usize = 128;

/// The number of samples that a spectrogram covers.
pub const SAMPLES: usize = HOP * (FRAMES - 1) + WINDOW;

/// What is less loud than the loudest band by this much counts as silence, in decibels.
const RANGE: f32 = 60.0;

/// The power of a band in a recording without any sound, which must not be divided by.
const SILENCE: f32 = 1e-10;

/// Computes spectrograms.
pub struct LogMel {
    fft: Arc<dyn RealToComplex<f32>>,
    /// Hann's window, which fades each moment in and out.
    window: Vec<f32>,
    /// `[BANDS, WINDOW / 2 + 1]`
    filters: Vec<Vec<f32>>,
}

impl Default for LogMel {
    fn default() -> Self {
        let fft = RealFftPlanner::new().plan_fft_forward(WINDOW);
        let hann = |index| 0.5 - 0.5 * (TAU * index as f32 / WINDOW as f32).cos();
        Self {
            window: (0..WINDOW).map(hann).collect(),
            filters: mel::filters(BANDS, fft.complex_len(), f64::from(RATE) / 2.0),
            fft,
        }
    }
}

impl LogMel {
    /// The spectrogram of a recording, whose middle is in the middle: `[BANDS, FRAMES]`, row by row. The
    /// loudest value is 1, and silence is 0.
    pub fn spectrogram(&self, samples: &[f32]) -> Arc<[f32]> {
        let powers = self.powers(&centered(samples));
        let loudest = powers.iter().flatten().fold(SILENCE, |a, b| a.max(*b));
        let level = |power: f32| (1.0 + 10.0 * (power / loudest).log10() / RANGE).max(0.0);
        (0..BANDS).flat_map(|band| powers.iter().map(move |bands| level(bands[band]))).collect()
    }

    /// The power in each band at each moment: `[frames, BANDS]`.
    pub fn powers(&self, samples: &[f32]) -> Vec<Vec<f32>> {
        let mut spectrum = self.fft.make_output_vec();
        let frames = samples.windows(WINDOW).step_by(HOP).map(|frame| {
            let mut faded: Vec<f32> = frame.iter().zip(&self.window).map(|(x, w)| x * w).collect();
            self.fft.process(&mut faded, &mut spectrum).expect("the lengths are the plan's");
            let power: Vec<f32> = spectrum.iter().map(|bin| bin.norm_sqr()).collect();
            let band = |filter: &Vec<f32>| filter.iter().zip(&power).map(|(w, p)| w * p).sum();
            self.filters.iter().map(band).collect()
        });
        frames.collect()
    }
}

/// The middle of a long recording, and a short one with silence around it: [`SAMPLES`] samples.
fn centered(samples: &[f32]) -> Vec<f32> {
    let cut = samples.len().saturating_sub(SAMPLES) / 2;
    let kept = &samples[cut..samples.len().min(cut + SAMPLES)];
    let mut centered = vec![0.0; SAMPLES];
    let start = (SAMPLES - kept.len()) / 2;
    centered[start..start + kept.len()].copy_from_slice(kept);
    centered
}
