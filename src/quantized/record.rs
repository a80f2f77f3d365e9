//! Quantized weights in records. They keep every bit whatever precision a recorder is set to.

use burn::{
    record::{PrecisionSettings, Record},
    tensor::{Tensor, TensorData, backend::Backend},
};
use serde::{Deserialize, Serialize};

use super::{
    Format, QuantizedWeight, Scales,
    doubled::{Doubled, Offset},
};

/// A [`QuantizedWeight`] in a file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct QuantizedWeightItem {
    format: Format,
    columns: usize,
    codes: TensorData,
    scales: TensorData,
    /// The codes of scales that are quantized in turn.
    doubled: Option<(TensorData, Offset)>,
    minima: Option<TensorData>,
}

impl<B: Backend> Record<B> for QuantizedWeight<B> {
    type Item<S: PrecisionSettings> = QuantizedWeightItem;

    fn into_item<S: PrecisionSettings>(self) -> Self::Item<S> {
        let (scales, doubled) = match self.scales {
            Scales::Full(scales) => (scales, None),
            Scales::Doubled(Doubled { codes, scales, offset }) => {
                (scales, Some((codes.into_data(), offset)))
            }
        };
        QuantizedWeightItem {
            format: self.format,
            columns: self.columns,
            codes: self.codes.into_data(),
            scales: scales.into_data(),
            doubled,
            minima: self.minima.map(Tensor::into_data),
        }
    }

    fn from_item<S: PrecisionSettings>(item: Self::Item<S>, device: &B::Device) -> Self {
        // Each tensor in the type that it was in.
        let float = |data: TensorData| {
            let dtype = data.dtype;
            Tensor::from_data(data, (device, dtype))
        };
        let int = |data: TensorData| {
            let dtype = data.dtype;
            Tensor::from_data(data, (device, dtype))
        };
        let scales = float(item.scales);
        Self {
            format: item.format,
            columns: item.columns,
            codes: int(item.codes),
            scales: match item.doubled {
                None => Scales::Full(scales),
                Some((codes, offset)) => {
                    Scales::Doubled(Doubled { codes: int(codes), scales, offset })
                }
            },
            minima: item.minima.map(float),
        }
    }
}
