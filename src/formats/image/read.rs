//! From the tensors of a file to adapters.

use std::io::{Read, Seek, SeekFrom};

use burn::{
    module::Param,
    nn::Dropout,
    tensor::{Tensor, TensorData, backend::Backend},
};
use half::{bf16, f16};
use safetensors::{Dtype, tensor::TensorInfo};

use super::{
    keys::Role,
    metadata::Configs,
    names::Layers,
    parts::{Found, by_layer, check},
};
use crate::{
    adapter::{LoraAdapter, WeightLayout},
    adapters::LoraAdapters,
    config::Scaling,
    error::{LoraError, Mismatch, shown},
    formats::{
        config::PeftConfig,
        find,
        tensors::{read_header, read_values, transposed},
    },
};

/// Reads the file of `length` bytes. The whole header is checked first.
pub(super) fn read<B: Backend>(
    mut source: impl Read + Seek,
    length: u64,
    file: &str,
    layers: &Layers,
    device: &B::Device,
) -> Result<LoraAdapters<B>, LoraError> {
    let invalid = |problem: String| LoraError::InvalidFile { file: file.to_owned(), problem };
    let io = |source| LoraError::Io { path: file.into(), source };
    // The first bytes tell whether this is the file itself.
    let mut start = Vec::new();
    source.by_ref().take(64).read_to_end(&mut start).map_err(io)?;
    find::check_tensors(&start, file)?;
    source.rewind().map_err(io)?;
    let header = read_header(&mut source, length).map_err(invalid)?;
    let data = source.stream_position().map_err(io)?;

    let keys = header.offset_keys();
    let info = |key| header.info(key).expect("the header has its keys");
    let infos = keys.iter().map(|key| (key.as_str(), info(key)));
    let configs = Configs::read(header.metadata(), file)?;
    let (found, unused) = by_layer(infos, layers, file)?;
    let mut mismatch = Mismatch::default();
    for of_layer in found.values() {
        check(of_layer, of_layer.config(configs.as_ref(), file)?, file, &mut mismatch)?;
    }
    mismatch.into_result(file)?;
    if found.is_empty() {
        let problem = match unused.first() {
            None => "there is no adapter in it".to_owned(),
            Some(key) => format!(
                "there is no adapter in it for a part that the model has, but for others, such as `{}`; if the \
                 model is one of these, have `names` begin the names of its layers by it, such as \
                 `Renaming::new([(\"text_encoder\", \"\")])`",
                shown(key)
            ),
        };
        return Err(invalid(problem));
    }

    let mut adapters = Vec::new();
    for (path, of_layer) in found {
        let mut tensors = Tensors { source: &mut source, data, of_layer: &of_layer };
        let config = of_layer.config(configs.as_ref(), file)?;
        let adapter = tensors.adapter(config, device).map_err(invalid)?;
        adapters.push((path, adapter));
    }
    let mut set = LoraAdapters::new(adapters);
    set.unused = unused;
    Ok(set)
}

/// The tensors of one layer, whose shapes fit, and the file that they are in.
struct Tensors<'f, S> {
    source: &'f mut S,
    /// Where the data begin.
    data: u64,
    of_layer: &'f Found<'f, 'f>,
}

impl<S: Read + Seek> Tensors<'_, S> {
    /// The tensor that `read` makes of the bytes of this part, if the layer has it.
    fn read<T>(
        &mut self,
        role: Role,
        read: impl FnOnce(&mut S, &TensorInfo) -> Result<T, String>,
    ) -> Result<Option<(T, &TensorInfo)>, String> {
        let Some((key, info)) = self.of_layer.parts.get(role) else { return Ok(None) };
        let start = self.data + info.data_offsets.0 as u64;
        let sought = self.source.seek(SeekFrom::Start(start)).map_err(|error| error.to_string());
        let value = sought.and_then(|_| read(self.source, info));
        value
            .map(|value| Some((value, info)))
            .map_err(|problem| format!("`{}` {problem}", shown(key)))
    }

    fn adapter<B: Backend>(
        &mut self,
        config: Option<&PeftConfig>,
        device: &B::Device,
    ) -> Result<LoraAdapter<B>, String> {
        const THERE: &str = "the layer has both factors";
        let mid = self.read(Role::Mid, read_values)?.map(|(values, _)| values);
        let (mut down, info) = self.read(Role::Down, read_values)?.expect(THERE);
        let rank = info.shape[0];
        if let Some(mid) = mid {
            down = through(&mid, &down, rank);
        }
        let (up, _) = self.read(Role::Up, read_values)?.expect(THERE);
        let magnitude = self.read(Role::Magnitude, read_values)?.map(|(values, _)| values);
        let alpha = self.read(Role::Alpha, read_number)?.map(|(alpha, _)| alpha);
        let [d_input, d_output] = self.of_layer.layer.shape;

        // The elements themselves move, as for PEFT's files.
        let matrix = |values: &[f32], rows: usize, columns: usize| {
            let data = TensorData::new(transposed(values, rows, columns), [columns, rows]);
            Tensor::<B, 2>::from_data(data, device)
        };
        let (a, b) = (matrix(&down, rank, d_input), matrix(&up, d_output, rank));
        let (alpha, scaling) = match config {
            Some(config) => (config.alpha(&self.of_layer.layer.name), config.scaling()),
            None => (alpha.unwrap_or(rank as f64), Scaling::AlphaOverRank),
        };
        let mut adapter = LoraAdapter::new(a, b, alpha, scaling);
        adapter.layout = match &self.of_layer.layer.layout {
            WeightLayout::Unknown => WeightLayout::Matrix,
            layout => layout.clone(),
        };
        adapter.dropout = Dropout { prob: config.map_or(0.0, |it| it.lora_dropout) };
        adapter.magnitude = magnitude.map(|values| {
            Param::from_tensor(Tensor::from_data(TensorData::new(values, [d_output]), device))
        });
        Ok(adapter)
    }
}

/// The factor A that does what `down`, `[rank, channels_in]`, and then the kernel `mid`, `[rank, rank, ..kernel]`, do:
/// `[rank, channels_in, ..kernel]`. LyCORIS writes the two with `use_tucker`. The sums are in `f64`.
fn through(mid: &[f32], down: &[f32], rank: usize) -> Vec<f32> {
    let (places, channels) = (mid.len() / (rank * rank), down.len() / rank);
    let mut factor = Vec::with_capacity(rank * channels * places);
    for row in 0..rank {
        for channel in 0..channels {
            factor.extend((0..places).map(|place| {
                let products = (0..rank).map(|inner| {
                    let mid = mid[(row * rank + inner) * places + place];
                    f64::from(mid) * f64::from(down[inner * channels + channel])
                });
                products.sum::<f64>() as f32
            }));
        }
    }
    factor
}

/// Reads a tensor of one number. Some programs write alphas as whole numbers.
fn read_number(source: &mut impl Read, info: &TensorInfo) -> Result<f64, String> {
    let mut read = |size: usize| {
        let mut bytes = [0; 8];
        source.read_exact(&mut bytes[..size]).map(|()| bytes).map_err(|error| error.to_string())
    };
    let number = match info.dtype {
        Dtype::F64 => f64::from_le_bytes(read(8)?),
        Dtype::F32 => f64::from(f32::from_bits(u64::from_le_bytes(read(4)?) as u32)),
        Dtype::F16 => f16::from_bits(u64::from_le_bytes(read(2)?) as u16).to_f64(),
        Dtype::BF16 => bf16::from_bits(u64::from_le_bytes(read(2)?) as u16).to_f64(),
        Dtype::I64 => i64::from_le_bytes(read(8)?) as f64,
        Dtype::I32 => f64::from(u64::from_le_bytes(read(4)?) as u32 as i32),
        other => {
            return Err(format!(
                "is of type {other:?}; F64, F32, F16, BF16, I64 or I32 is expected"
            ));
        }
    };
    if number.is_finite() { Ok(number) } else { Err("is not a finite number".to_owned()) }
}
