//! RoPE's frequencies in a GGUF file, as the rule of `config.json` that gives the same.

use std::f64::consts::TAU;

use serde_json::{Value, json};

/// By how much a frequency may be off, which `f32` has rounded.
const TOLERANCE: f64 = 1e-6;

/// The length of Llama 3's first training, and the turns within it between which frequencies slow down.
const LENGTH: f64 = 8192.0;
const TURNS: [f64; 2] = [1.0, 4.0];

/// The `rope_scaling` that divides each of the frequencies, in radians per token, by its divisor. `None` if
/// there is no such rule.
pub(super) fn rule(frequencies: &[f64], divisors: &[f64]) -> Option<Value> {
    let factor = divisors.iter().copied().fold(1.0, f64::max);
    if divisors.iter().all(|it| is_near(*it, 1.0)) {
        return Some(Value::Null);
    }
    let first = *divisors.first()?;
    if divisors.iter().all(|it| is_near(*it, first)) {
        return Some(json!({"rope_type": "linear", "factor": first}));
    }
    // The share of each frequency that stays, from 0 where it is divided by the whole factor to 1.
    let kept = divisors.iter().map(|it| (1.0 / it - 1.0 / factor) / (1.0 - 1.0 / factor));
    let points: Vec<_> = frequencies.iter().copied().zip(kept).collect();
    // Any length will do, if the turns go with it.
    let [low, high] =
        [Some(TURNS), fitted(&points)].into_iter().flatten().find(|it| fit(&points, *it))?;
    Some(json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": LENGTH as u64,
    }))
}

/// Whether the rule with these turns keeps the share of each frequency.
fn fit(points: &[(f64, f64)], [low, high]: [f64; 2]) -> bool {
    points.iter().all(|(frequency, kept)| {
        let turns = LENGTH * frequency / TAU;
        (((turns - low) / (high - low)).clamp(0.0, 1.0) - kept).abs() <= TOLERANCE
    })
}

/// The turns of the line through the shares between 0 and 1. With one or none of them, it is flat enough to
/// leave those beside them at 0 and 1.
fn fitted(points: &[(f64, f64)]) -> Option<[f64; 2]> {
    let frequencies = |of: fn(f64) -> bool| {
        points.iter().filter(move |(_, kept)| of(*kept)).map(|(frequency, _)| *frequency)
    };
    let slowed = frequencies(|kept| kept <= TOLERANCE).reduce(f64::max)?;
    let whole = frequencies(|kept| kept >= 1.0 - TOLERANCE).reduce(f64::min);
    let between: Vec<_> =
        points.iter().filter(|(_, kept)| (TOLERANCE..1.0 - TOLERANCE).contains(kept)).collect();
    let ((frequency, kept), slope) = match between[..] {
        [] => ((slowed, 0.0), 1.0 / (whole? - slowed)),
        [&(frequency, kept)] => {
            let below = kept / (frequency - slowed);
            let above = whole.map_or(0.0, |whole| (1.0 - kept) / (whole - frequency));
            ((frequency, kept), below.max(above))
        }
        [first, .., last] => (*first, (first.1 - last.1) / (first.0 - last.0)),
    };
    let width = LENGTH / TAU / slope;
    let low = (slope * frequency - kept) * width;
    (low > 0.0 && width > 0.0 && low.is_finite() && width.is_finite()).then_some([low, low + width])
}

fn is_near(value: f64, expected: f64) -> bool {
    (value / expected - 1.0).abs() <= TOLERANCE
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frequencies(theta: f64, pairs: usize) -> Vec<f64> {
        (0..pairs).map(|i| theta.powf(-(i as f64) / pairs as f64)).collect()
    }

    /// The divisors that llama.cpp writes for such a configuration, by the formulas of its converter, rounded.
    fn divisors(frequencies: &[f64], factor: f64, [low, high]: [f64; 2], length: f64) -> Vec<f64> {
        let of = |frequency: &f64| {
            let wavelength = TAU / frequency;
            match () {
                _ if wavelength < length / high => 1.0,
                _ if wavelength > length / low => factor,
                _ => {
                    let smooth = (length / wavelength - low) / (high - low);
                    1.0 / ((1.0 - smooth) / factor + smooth)
                }
            }
        };
        frequencies.iter().map(|it| f64::from(of(it) as f32)).collect()
    }

    #[test]
    fn w9_the_rules_of_llama_3_are_found_again() {
        for (factor, theta, pairs) in
            [(8.0, 500_000.0, 64), (32.0, 500_000.0, 32), (32.0, 500_000.0, 64)]
        {
            let frequencies = frequencies(theta, pairs);
            let divisors = divisors(&frequencies, factor, [1.0, 4.0], 8192.0);
            let expected = json!({
                "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            });
            assert_eq!(rule(&frequencies, &divisors), Some(expected));
        }
    }

    #[test]
    fn w9_other_rules_are_found_as_far_as_they_are_rules() {
        let frequencies = frequencies(10_000.0, 48);
        for (factor, turns, length) in
            [(4.0, [1.0, 4.0], 2048.0), (16.0, [2.5, 3.0], 4096.0), (1.5, [0.5, 40.0], 32768.0)]
        {
            let wanted = divisors(&frequencies, factor, turns, length);
            let found = rule(&frequencies, &wanted).unwrap();
            let number = |name: &str| found[name].as_f64().unwrap();
            // Other numbers may mean the same.
            let turns = ["low_freq_factor", "high_freq_factor"].map(number);
            let length = number("original_max_position_embeddings");
            let found = divisors(&frequencies, number("factor"), turns, length);
            for (found, wanted) in found.iter().zip(&wanted) {
                assert!(is_near(*found, *wanted), "{found}, not {wanted}");
            }
        }
        // One that turns slower than the next, and all slower by more than one factor.
        let mut divisors = divisors(&frequencies, 8.0, [1.0, 4.0], 8192.0);
        divisors[40] *= 1.0001;
        assert_eq!(rule(&frequencies, &divisors), None);
        let slow: Vec<_> = (0..48).map(|i| 2.0 + f64::from(i)).collect();
        assert_eq!(rule(&frequencies, &slow), None);
    }
}
