//! Matrices in NF4 of other programs.

use burn::tensor::backend::Backend;

use super::{
    QuantizedWeight,
    format::{APART, Format, NF4},
    pack::Packed,
};
use crate::error::LoraError;

/// By how much levels may be off that were computed in another way.
const ROUNDING: f32 = 1e-6;

impl<B: Backend> QuantizedWeight<B> {
    /// A matrix `[rows, columns]` in NF4 as [bitsandbytes](https://github.com/bitsandbytes-foundation/bitsandbytes)
    /// holds it, to the bit. `levels` are what its 16 codes stand for, `codes` has two of them in each byte, the first
    /// in the upper half, and `scales` one for each 64 numbers. All of them go through the matrix row by row.
    ///
    /// # Errors
    ///
    /// [`LoraError::InvalidFile`] if the levels are not those of NF4, if the columns are no whole blocks of 64, if there
    /// are not as many codes and scales as the shape says, or if a scale is not finite.
    pub fn from_nf4(
        shape: [usize; 2],
        levels: &[f32],
        codes: &[u8],
        scales: Vec<f32>,
        device: &B::Device,
    ) -> Result<Self, LoraError> {
        let ([rows, columns], format) = (shape, Format::Nf4);
        let invalid = |problem: String| {
            let file = "a matrix of bitsandbytes".to_owned();
            Err(LoraError::InvalidFile { file, problem })
        };
        let is_near = |(level, it): (&f32, &f32)| (level - it).abs() <= ROUNDING;
        if levels.len() != NF4.len() || !NF4.iter().zip(levels).all(is_near) {
            return invalid("its levels are not those of NF4".to_owned());
        }
        if columns == 0 || !columns.is_multiple_of(format.block()) {
            return invalid(format!("{columns} columns are no blocks of {}", format.block()));
        }
        let numbers = rows.checked_mul(columns);
        if rows == 0 || numbers.is_none_or(|it| it / 2 != codes.len()) {
            let found = codes.len();
            return invalid(format!("{found} bytes cannot be {rows} x {columns} numbers"));
        }
        if scales.len() != codes.len() / format.block_bytes() {
            let found = scales.len();
            return invalid(format!(
                "{found} scales cannot be those of {rows} x {columns} numbers"
            ));
        }
        if scales.iter().any(|it| !it.is_finite()) {
            return invalid("a scale is not finite".to_owned());
        }
        let mut bytes = Vec::with_capacity(codes.len());
        for codes in codes.as_chunks::<APART>().0 {
            let code = |place: usize| {
                (codes[place / 2] >> if place.is_multiple_of(2) { 4 } else { 0 }) & 15
            };
            bytes.extend((0..APART).map(|place| code(place) | code(place + APART) << 4));
        }
        Ok(Self::on_device(Packed { format, shape, bytes, scales, minima: None }, false, device))
    }
}
