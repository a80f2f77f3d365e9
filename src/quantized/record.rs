//! Quantized weights in records. They keep every bit whatever precision a recorder is set to.

use burn::{
    record::{PrecisionSettings, Record},
    tensor::{Tensor, TensorData, backend::Backend},
};
use serde::{Deserialize, Serialize};

use super::{
    Format, QuantizedWeight, Scales,
    doubled::{Doubled, Offset},
    halves::packed,
    words::{SIZE, to_words},
};

/// A [`QuantizedWeight`] in a file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct QuantizedWeightItem {
    format: Format,
    columns: usize,
    codes: TensorData,
    /// Empty for formats without scales that lie apart.
    scales: TensorData,
    /// The codes of scales that are quantized in turn.
    doubled: Option<(TensorData, Offset)>,
    minima: Option<TensorData>,
}

impl QuantizedWeightItem {
    /// The scales and the smallest numbers as they are held if they are in half precision.
    fn halves(&self) -> Option<Vec<u8>> {
        if !self.format.has_halves() || self.doubled.is_some() {
            return None;
        }
        let minima = self.minima.as_ref().map(|it| it.as_slice().ok());
        let minima = match minima {
            Some(minima) => Some(minima?),
            None => None,
        };
        let blocks = self.columns.div_ceil(self.format.block());
        packed(self.scales.as_slice().ok()?, minima, blocks)
    }
}

impl<B: Backend> Record<B> for QuantizedWeight<B> {
    type Item<S: PrecisionSettings> = QuantizedWeightItem;

    fn into_item<S: PrecisionSettings>(self) -> Self::Item<S> {
        let minima = self.minima().map(Tensor::into_data);
        let halves = matches!(self.scales, Scales::Halves(_)).then(|| self.scales()).flatten();
        let (scales, doubled) = match self.scales {
            Scales::Halves(_) => (halves.expect("they are scales").into_data(), None),
            Scales::None => (TensorData::new(Vec::<f32>::new(), [0, 0]), None),
            Scales::Full(scales) => (scales.into_data(), None),
            Scales::Doubled(Doubled { codes, scales, offset }) => {
                (scales.into_data(), Some((codes.into_data(), offset)))
            }
        };
        QuantizedWeightItem {
            format: self.format,
            columns: self.columns,
            codes: self.codes.into_data(),
            scales,
            doubled,
            minima,
        }
    }

    fn from_item<S: PrecisionSettings>(item: Self::Item<S>, device: &B::Device) -> Self {
        let halves = item.halves();
        // Each tensor in the type that it was in.
        let float = |data: TensorData| {
            let dtype = data.dtype;
            Tensor::from_data(data, (device, dtype))
        };
        let int = |data: TensorData| {
            let dtype = data.dtype;
            Tensor::from_data(data, (device, dtype))
        };
        let minima = item.minima.filter(|_| halves.is_none()).map(float);
        let scales = match (item.doubled, halves) {
            _ if !item.format.is_scaled() => Scales::None,
            (None, Some(halves)) => {
                let [rows, _] = item.codes.shape.dims();
                Scales::Halves(to_words(&halves, [rows, halves.len() / SIZE / rows], device))
            }
            (None, None) => Scales::Full(float(item.scales)),
            (Some((codes, offset)), _) => {
                Scales::Doubled(Doubled { codes: int(codes), scales: float(item.scales), offset })
            }
        };
        Self { format: item.format, columns: item.columns, codes: int(item.codes), scales, minima }
    }
}
