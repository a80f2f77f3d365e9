//! What products are compared with: the same numbers, multiplied and added up in `f64`.

use burn_lora_kernels::{BlockFormat, Dots, Vector8};
use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};

pub fn random(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// The instructions that are there.
pub fn there() -> impl Iterator<Item = Dots> {
    Dots::ALL.into_iter().filter(|it| it.are_there())
}

/// A row of random bits, but for scales that are ordinary numbers.
pub fn row(format: BlockFormat, columns: usize, random: &mut StdRng) -> Vec<u8> {
    let mut bytes = vec![0; format.row_bytes(columns)];
    random.fill_bytes(&mut bytes);
    for block in bytes.chunks_exact_mut(format.bytes()) {
        for &start in scales(format) {
            // From 0.008 to 2, of either sign: the exponent from -7 to 0.
            let bits = random.random::<u16>() & 0x83ff | random.random_range(8u16..16) << 10;
            block[start..start + 2].copy_from_slice(&bits.to_le_bytes());
        }
    }
    bytes
}

/// Where each block has numbers of 16 bits.
pub fn scales(format: BlockFormat) -> &'static [usize] {
    match format {
        BlockFormat::Q4_0 | BlockFormat::Q5_0 | BlockFormat::Q8_0 => &[0],
        BlockFormat::IQ4_NL | BlockFormat::IQ4_XS => &[0],
        BlockFormat::Q2_K => &[80, 82],
        BlockFormat::Q3_K => &[108],
        BlockFormat::Q6_K => &[208],
        _ => &[0, 2],
    }
}

pub fn numbers(count: usize, random: &mut StdRng) -> Vec<f32> {
    (0..count).map(|_| random.random_range(-1.0..1.0)).collect()
}

/// The numbers that a vector stands for.
pub fn stands_for(x: &Vector8) -> Vec<f64> {
    let blocks = x.codes().iter().zip(x.scales());
    let numbers =
        blocks.flat_map(|(codes, &scale)| codes.map(|it| f64::from(it) * f64::from(scale)));
    numbers.take(x.len()).collect()
}

/// Compares a product with that of `weights`, within the rounding of the sums and factors to `f32`. A term
/// `code · scale + least` can be larger than the weight, and so its rounding: `largest` is a bound of both parts.
pub fn assert_near(found: f32, weights: &[f32], x: &Vector8, largest: f64, what: &str) {
    let x = stands_for(x);
    let terms = || weights.iter().zip(&x).map(|(&weight, x)| f64::from(weight) * x);
    let expected: f64 = terms().sum();
    let magnitude: f64 = x.iter().map(|it| it.abs() * largest).sum();
    // Each block is added to one of 16 sums, after two roundings, and these are added up in four steps. Weights are
    // rounded twice.
    let roundings = (weights.len() / 64 + 12) as f64;
    let bound = magnitude * roundings * 2f64.powi(-24) + 2f64.powi(-126);
    let error = (f64::from(found) - expected).abs();
    assert!(
        error <= bound,
        "{what}: {found} instead of {expected}, which is off by more than {bound}"
    );
}

/// The same number, or NaN both times.
pub fn assert_same(found: f32, expected: f32, what: &str) {
    let same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
    assert!(same, "{what}: {found} instead of {expected}");
}

/// A bound of the magnitudes of all that unpacked weights are the sums of.
pub fn largest(format: BlockFormat, bytes: &[u8]) -> f64 {
    let codes = match format {
        BlockFormat::Q4_0 => 8.0,
        BlockFormat::Q4_1 => 15.0,
        BlockFormat::Q5_0 => 16.0,
        BlockFormat::Q5_1 => 31.0,
        BlockFormat::Q8_0 => 128.0,
        BlockFormat::Q4_K => 15.0 * 63.0,
        BlockFormat::Q5_K => 31.0 * 63.0,
        BlockFormat::Q2_K => 3.0 * 15.0,
        BlockFormat::Q3_K => 4.0 * 32.0,
        BlockFormat::IQ4_NL => 127.0,
        BlockFormat::IQ4_XS => 127.0 * 32.0,
        _ => 32.0 * 128.0,
    };
    let least = match format {
        BlockFormat::Q4_K | BlockFormat::Q5_K => 63.0,
        BlockFormat::Q2_K => 15.0,
        _ => 1.0,
    };
    let of = |block: &[u8]| {
        let number = |&start: &usize| {
            half::f16::from_le_bytes([block[start], block[start + 1]]).to_f64().abs()
        };
        let mut numbers = scales(format).iter().map(number);
        let scale = numbers.next().expect("there is a scale");
        scale * codes + numbers.next().unwrap_or(0.0) * least
    };
    bytes.chunks_exact(format.bytes()).map(of).fold(0.0, f64::max)
}
