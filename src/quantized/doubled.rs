//! Scales that are quantized in turn.

use std::sync::LazyLock;

use burn::tensor::{DType, Int, Tensor, TensorData, backend::Backend};
use serde::{Deserialize, Serialize};

use super::{
    pack::{nearest, ratio},
    words::{bytes, to_words},
};

/// The scales that share a scale of their own.
const GROUP: usize = 256;

/// Scales in 8 bits ("double quantization", Dettmers et al. 2023): their differences from the mean, in groups
/// that share a scale in `f32`.
#[derive(Clone, Debug)]
pub(crate) struct Doubled<B: Backend> {
    /// Four codes in each word, and the last group filled up: `[groups, words]`.
    pub codes: Tensor<B, 2, Int>,
    /// `[groups, 1]`.
    pub scales: Tensor<B, 2>,
    pub offset: Offset,
}

/// What is subtracted before the scales are quantized, and how many scales there are.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Offset {
    pub mean: f32,
    pub count: usize,
}

impl<B: Backend> Doubled<B> {
    pub fn new(scales: &[f32], device: &B::Device) -> Self {
        let count = scales.len();
        let sum: f64 = scales.iter().copied().map(f64::from).sum();
        let mean = (sum / count.max(1) as f64) as f32;
        let levels = &*LEVELS;
        let (mut codes, mut largest) = (Vec::new(), Vec::new());
        for group in scales.chunks(GROUP) {
            let differences = group.iter().map(|it| it - mean);
            let scale = differences.clone().fold(0.0_f32, |scale, it| scale.max(it.abs()));
            codes.extend(differences.map(|it| nearest(levels, ratio(it, scale))));
            largest.push(scale);
        }
        codes.resize(count.next_multiple_of(GROUP), 0);
        let groups = largest.len();
        Self {
            codes: to_words(&codes, [groups, GROUP / 4], device),
            scales: Tensor::from_data(TensorData::new(largest, [groups, 1]), (device, DType::F32)),
            offset: Offset { mean, count },
        }
    }

    /// The scales again, about: `[count]`.
    pub fn dense(&self) -> Tensor<B, 1> {
        let (Offset { mean, count }, device) = (self.offset, self.scales.device());
        let levels = TensorData::new(LEVELS.clone(), [GROUP]);
        let levels = Tensor::<B, 1>::from_data(levels, (&device, DType::F32));
        let groups = self.scales.dims()[0];
        let codes = bytes(self.codes.clone().reshape([groups * GROUP / 4]));
        let differences = levels.select(0, codes).reshape([groups, GROUP]);
        let scales = differences * self.scales.clone() + mean;
        scales.reshape([groups * GROUP]).narrow(0, 0, count)
    }
}

/// The scales again, from the bytes of the codes and the scales of the groups.
pub(crate) fn unpack(codes: &[u8], scales: &[f32], offset: Offset) -> Vec<f32> {
    let Offset { mean, count } = offset;
    let levels = &LEVELS[..GROUP];
    let mut numbers = Vec::with_capacity(codes.len());
    for (codes, scale) in codes.chunks_exact(GROUP).zip(scales) {
        numbers.extend(codes.iter().map(|&code| levels[usize::from(code)] * scale + mean));
    }
    numbers.truncate(count);
    numbers
}

/// The 256 levels that bitsandbytes calls dynamic, in ascending order. They lie in seven decades, each with
/// twice as many as the one below it.
static LEVELS: LazyLock<Vec<f32>> = LazyLock::new(|| {
    let mut levels = vec![0.0, 1.0];
    for decade in 0..7_i32 {
        let count = 1 << decade;
        let (width, power) = (0.9 / f64::from(count), 10_f64.powi(decade - 6));
        for place in 0..count {
            let level = (power * (0.1 + width * (f64::from(place) + 0.5))) as f32;
            levels.extend([level, -level]);
        }
    }
    levels.sort_by(f32::total_cmp);
    levels
});
