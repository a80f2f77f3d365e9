//! How sums reach the result.

use std::mem::MaybeUninit;

use crate::tile::{SIDE, Tile};

/// A number of the result.
pub(crate) trait Sum: Copy + Send {
    fn set(&mut self, sum: f32);

    /// Adds to what was set.
    fn add(&mut self, sum: f32);
}

impl Sum for f32 {
    #[inline(always)]
    fn set(&mut self, sum: f32) {
        *self = sum;
    }

    #[inline(always)]
    fn add(&mut self, sum: f32) {
        *self += sum;
    }
}

/// Memory that was never written to. Nothing can be added to it.
impl Sum for MaybeUninit<f32> {
    #[inline(always)]
    fn set(&mut self, sum: f32) {
        self.write(sum);
    }

    fn add(&mut self, _: f32) {
        unreachable!("sums in new memory are set at once")
    }
}

/// Adds the bias, or its beginning, to each row of the tile.
pub(super) fn add_bias(tile: &mut Tile, rows: usize, bias: &[f32]) {
    for sums in &mut tile.0[..rows] {
        sums.iter_mut().zip(bias).for_each(|(sum, bias)| *sum += bias);
    }
}

/// Writes the tile to the rows, from the column on.
pub(super) fn store<S: Sum>(tile: &Tile, rows: &mut [&mut [S]], column: usize, adds: bool) {
    pulp::Arch::new().dispatch(|| {
        for (sums, row) in tile.0.iter().zip(rows) {
            let row = &mut row[column..];
            match row.first_chunk_mut::<SIDE>() {
                Some(row) if adds => row.iter_mut().zip(sums).for_each(|(to, sum)| to.add(*sum)),
                Some(row) => row.iter_mut().zip(sums).for_each(|(to, sum)| to.set(*sum)),
                None if adds => row.iter_mut().zip(sums).for_each(|(to, sum)| to.add(*sum)),
                None => row.iter_mut().zip(sums).for_each(|(to, sum)| to.set(*sum)),
            }
        }
    });
}
