//! The directory format of mlx-lm: `adapter_config.json` and `adapters.safetensors`.
//!
//! The keys are a layer's path and `lora_a` or `lora_b`, or `m` for the magnitudes of DoRA. The factors have
//! this crate's layout, `[d_input, rank]` and `[rank, d_output]`, and the configuration gives the scale itself.

use std::{collections::BTreeMap, io::Read};

use burn::{
    module::Param,
    nn::Dropout,
    tensor::{Tensor, TensorData, backend::Backend},
};
use serde::Deserialize;

use super::{
    json::check_object,
    tensors::{read_header, read_values},
};
use crate::{
    adapter::LoraAdapter,
    adapters::LoraAdapters,
    config::Scaling,
    error::{LoraError, Mismatch, shown},
};

pub(super) const WEIGHTS: &str = "adapters.safetensors";

/// The place of the magnitudes among a layer's parts.
const MAGNITUDE: usize = 2;

/// What this crate uses of the configuration.
#[derive(Deserialize)]
pub(super) struct MlxConfig {
    #[serde(default = "lora")]
    fine_tune_type: String,
    lora_parameters: MlxParameters,
}

#[derive(Deserialize)]
struct MlxParameters {
    rank: usize,
    scale: f64,
    #[serde(default)]
    dropout: f64,
}

fn lora() -> String {
    "lora".to_owned()
}

/// The configuration, if the text is one of mlx-lm and not of PEFT.
pub(super) fn parse(text: &[u8], file: &str) -> Option<Result<MlxConfig, LoraError>> {
    let fields: BTreeMap<String, serde_json::Value> = serde_json::from_slice(text).ok()?;
    if fields.contains_key("peft_type") || !fields.contains_key("lora_parameters") {
        return None;
    }
    let config = check_object(text).and_then(|()| {
        serde_json::from_slice::<MlxConfig>(text).map_err(|error| error.to_string())
    });
    let invalid = |problem: String| LoraError::InvalidFile { file: file.to_owned(), problem };
    Some(config.map_err(invalid).and_then(|config| {
        let MlxParameters { rank, scale, dropout } = config.lora_parameters;
        let problem = match () {
            _ if !["lora", "dora"].contains(&config.fine_tune_type.as_str()) => {
                let reason = format!("it is {}, not lora or dora", config.fine_tune_type);
                let (file, field) = (file.to_owned(), "fine_tune_type".to_owned());
                return Err(LoraError::Unsupported { file, field, reason: Some(reason) });
            }
            _ if rank == 0 => "`rank` is 0".to_owned(),
            _ if !scale.is_finite() => "`scale` is not finite".to_owned(),
            _ if !(0.0..1.0).contains(&dropout) => format!("`dropout` is {dropout}, not in [0, 1)"),
            _ => return Ok(config),
        };
        Err(invalid(problem))
    }))
}

/// Reads the file of `length` bytes.
pub(super) fn read<Bk: Backend>(
    config: MlxConfig,
    mut source: impl Read,
    length: u64,
    file: &str,
    device: &Bk::Device,
) -> Result<LoraAdapters<Bk>, LoraError> {
    let invalid = |problem: String| LoraError::InvalidFile { file: file.to_owned(), problem };
    let header = read_header(&mut source, length).map_err(invalid)?;
    let MlxParameters { rank, scale, dropout } = config.lora_parameters;
    let keys = header.offset_keys();
    let has_magnitudes = config.fine_tune_type == "dora";
    let parts = [".lora_a", ".lora_b", ".m"];
    let parts = if has_magnitudes { &parts[..] } else { &parts[..2] };
    let part_of = |key: &str| {
        let part = parts.iter().position(|part| key.ends_with(part))?;
        Some((key[..key.len() - parts[part].len()].to_owned(), part))
    };
    let mut mismatch = Mismatch::default();
    for key in &keys {
        let shape = &header.info(key).expect("the header has its keys").shape;
        let Some((path, part)) = part_of(key) else {
            mismatch.unexpected.push(key.clone());
            continue;
        };
        let others = parts.iter().map(|part| format!("{path}{part}"));
        mismatch.missing.extend(others.filter(|other| header.info(other).is_none()));
        if part == MAGNITUDE {
            let d_output = header.info(&format!("{path}.lora_b")).and_then(|it| it.shape.last());
            if shape.len() != 1 || d_output.is_some_and(|it| *it != shape[0]) {
                mismatch.misshapen.push(format!("{key} (expected [d_output], found {shape:?})"));
            }
        } else if shape.len() != 2 || shape[1 - part] != rank || shape[part] == 0 {
            let expected = ["[d_input, rank]", "[rank, d_output]"][part];
            mismatch
                .misshapen
                .push(format!("{key} (expected {expected} with rank {rank}, found {shape:?})"));
        }
    }
    mismatch.missing.sort();
    mismatch.missing.dedup();
    mismatch.into_result(file)?;
    let mut factors: BTreeMap<_, [Option<Tensor<Bk, 2>>; 2]> = BTreeMap::new();
    let mut magnitudes = BTreeMap::new();
    for key in &keys {
        let info = header.info(key).expect("the header has its keys");
        let values = read_values(&mut source, info);
        let values = values.map_err(|problem| invalid(format!("`{}` {problem}", shown(key))))?;
        let (path, part) = part_of(key).expect("the other keys are an error");
        let values = TensorData::new(values, info.shape.clone());
        if part == MAGNITUDE {
            magnitudes.insert(path, Tensor::<Bk, 1>::from_data(values, device));
            continue;
        }
        let tensor = Tensor::from_data(values, device);
        factors.entry(path).or_default()[part] = Some(tensor);
    }
    if factors.is_empty() {
        return Err(invalid("there is no adapter in it".to_owned()));
    }
    Ok(LoraAdapters::new(factors.into_iter().map(|(path, factors)| {
        let [a, b] = factors.map(|factor| factor.expect("none is missing"));
        let mut adapter = LoraAdapter::new(a, b, scale, Scaling::Alpha);
        adapter.dropout = Dropout { prob: dropout };
        adapter.magnitude = magnitudes.remove(&path).map(Param::from_tensor);
        (path, adapter)
    })))
}
