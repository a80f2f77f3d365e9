//! The mel scale, on which equal steps sound equally far apart, and its filter bank.

/// The pitch of a frequency in mel, in the form that HTK uses.
pub fn mel(hertz: f64) -> f64 {
    2595.0 * (1.0 + hertz / 700.0).log10()
}

/// The frequency of a pitch: the inverse of [`mel`].
pub fn hertz(mel: f64) -> f64 {
    700.0 * (10f64.powf(mel / 2595.0) - 1.0)
}

/// The frequencies at which the filters of a bank are 1, and the two at its ends: `[bands + 2]`. They are
/// equally far apart in mel, from 0 to `highest`.
pub fn centers(bands: usize, highest: f64) -> Vec<f64> {
    let step = mel(highest) / (bands + 1) as f64;
    (0..bands + 2).map(|index| hertz(index as f64 * step)).collect()
}

/// The weights with which each band adds up the `bins` of a power spectrum that reaches from 0 to
/// `highest`: `[bands, bins]`. Each is a triangle, from the center of the band below to that of the band
/// above.
pub fn filters(bands: usize, bins: usize, highest: f64) -> Vec<Vec<f32>> {
    let centers = centers(bands, highest);
    let triangle = |edges: &[f64]| {
        let weight = |bin: usize| {
            let frequency = highest * bin as f64 / (bins - 1) as f64;
            let rising = (frequency - edges[0]) / (edges[1] - edges[0]);
            let falling = (edges[2] - frequency) / (edges[2] - edges[1]);
            rising.min(falling).max(0.0) as f32
        };
        (0..bins).map(weight).collect()
    };
    centers.windows(3).map(triangle).collect()
}
