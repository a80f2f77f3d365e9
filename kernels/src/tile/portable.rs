//! For any processor.

use super::{Factors, SIDE, Tile};
use crate::round::widened;

/// As the instructions do it, and as plainly as it can be written.
pub(super) fn multiply(
    Factors { left, stride, right }: Factors,
    rows: usize,
    adds: bool,
    tile: &mut Tile,
) {
    for (row, sums) in tile.0.iter_mut().take(rows).enumerate() {
        if !adds {
            *sums = [0.0; SIDE];
        }
        let left = left[row * stride..].as_chunks::<2>().0;
        for (&[first, second], right) in left.iter().zip(right) {
            let (first, second) = (widened(first), widened(second));
            for (sum, right) in sums.iter_mut().zip(right.0) {
                *sum += first * widened(right as u16) + second * widened((right >> 16) as u16);
            }
        }
    }
}
