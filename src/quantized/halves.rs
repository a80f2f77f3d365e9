//! Scales in half precision, as GGUF files have them.

use half::f16;

use super::words::SIZE;

/// The bytes of the scales and the smallest numbers of so many blocks in a row: of each row first its scales, and filled up
/// to whole words. `None` if a number is not one of half precision, or if there are not as many of both.
pub(super) fn packed(scales: &[f32], minima: Option<&[f32]>, blocks: usize) -> Option<Vec<u8>> {
    let (minima, has_minima) = (minima.unwrap_or_default(), minima.is_some());
    if blocks == 0 || scales.is_empty() || (has_minima && minima.len() != scales.len()) {
        return None;
    }
    let mut bytes = Vec::new();
    for (row, scales) in scales.chunks_exact(blocks).enumerate() {
        let minima = minima.chunks_exact(blocks).nth(row).unwrap_or_default();
        for &number in scales.iter().chain(minima) {
            let half = f16::from_f32(number);
            if half.to_f32().to_bits() != number.to_bits() {
                return None;
            }
            bytes.extend(half.to_le_bytes());
        }
        bytes.resize(bytes.len().next_multiple_of(SIZE), 0);
    }
    Some(bytes)
}
