//! Reads an encoder from a directory in Hugging Face's format: `config.json` and `model.safetensors`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Display,
    path::Path,
};

use burn::tensor::{DType, backend::Backend};
use burn_store::{BurnToPyTorchAdapter, ModuleSnapshot, PyTorchToBurnAdapter, TensorSnapshot};
use serde_json::Value;

use super::{Bert, BertConfig, names};
use crate::{
    files::{check_model, read_json},
    pretrained::{Problems, WEIGHTS, placed, read_file},
};

/// Tensors of the file that this encoder does not use: the position ids, and the pooling layer on the
/// first token. The mean over all tokens replaces it.
const UNUSED: [&str; 3] = ["embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"];

/// The encoder in `dir`, and its sizes.
///
/// # Errors
///
/// If a file cannot be read or is not of a BERT; if a tensor is missing or has another shape or type; or
/// if a tensor is unknown. The position ids and the pooling layer are not used. The error lists all problems.
pub fn load<B: Backend>(dir: &Path, device: &B::Device) -> Result<(Bert<B>, BertConfig), String> {
    check_model(dir)?;
    let config = read_config(&dir.join("config.json"))?;
    let path = dir.join(WEIGHTS);
    let told = |error: &dyn Display| format!("{}: {error}", path.display());
    let mut tensors = read_file(&path)?;
    check_sizes(&config, &tensors).map_err(|problem| told(&problem))?;
    let mut bert = config.init(device);
    let reading = Problems::default();
    let found = match_up(&bert, &mut tensors, &reading);
    let found = found.map_err(|problems| told(&problems.join("; ")))?;
    let result = bert.apply(found, None, Some(Box::new(PyTorchToBurnAdapter)), false);
    let problems = match &reading.borrow()[..] {
        [] if result.errors.is_empty() && result.missing.is_empty() => return Ok((bert, config)),
        [] => format!("{:?}, {:?}", result.errors, result.missing),
        problems => problems.join("; "),
    };
    Err(told(&problems))
}

/// Checks that the file has the sizes in the configuration, before memory is allocated for them.
fn check_sizes(
    config: &BertConfig,
    tensors: &BTreeMap<String, TensorSnapshot>,
) -> Result<(), String> {
    let width = config.hidden_size;
    for (name, shape) in [
        ("embeddings.word_embeddings.weight", [config.vocab_size, width]),
        ("embeddings.position_embeddings.weight", [config.max_position_embeddings, width]),
        ("embeddings.token_type_embeddings.weight", [config.type_vocab_size, width]),
        ("encoder.layer.0.intermediate.dense.weight", [config.intermediate_size, width]),
    ] {
        let found = tensors.get(name).map(|tensor| tensor.shape.to_vec());
        if found.as_deref() != Some(&shape) {
            let found = found.map_or("missing".to_owned(), |found| format!("{found:?}"));
            return Err(format!("by config.json `{name}` is {shape:?}, and it is {found}"));
        }
    }
    let ends = |name: &&String| name.ends_with(".intermediate.dense.weight");
    let (layers, found) = (config.num_hidden_layers, tensors.keys().filter(ends).count());
    match layers == found {
        true => Ok(()),
        false => Err(format!("by config.json it has {layers} layers, and it has {found}")),
    }
}

/// Reads the sizes, and checks that this is the kind of BERT that [`Bert`] implements.
fn read_config(path: &Path) -> Result<BertConfig, String> {
    let told = |error: &dyn Display| format!("{}: {error}", path.display());
    let json = read_json(path)?;
    for (key, expected) in
        [("model_type", "bert"), ("hidden_act", "gelu"), ("position_embedding_type", "absolute")]
    {
        match json.get(key) {
            None | Some(Value::Null) if key == "position_embedding_type" => {}
            Some(Value::String(found)) if found == expected => {}
            found => {
                let found = found.unwrap_or(&Value::Null);
                return Err(told(&format!("`{key}` must be \"{expected}\", and is {found}")));
            }
        }
    }
    if json.get("is_decoder") == Some(&Value::Bool(true)) {
        return Err(told(&"`is_decoder` must be false: this is an encoder"));
    }
    let config: BertConfig = serde_json::from_value(json).map_err(|error| told(&error))?;
    let (width, heads) = (config.hidden_size, config.num_attention_heads);
    let sizes = [
        config.vocab_size,
        config.intermediate_size,
        config.max_position_embeddings,
        config.type_vocab_size,
    ];
    if sizes.contains(&0) {
        return Err(told(&"a size is 0"));
    }
    if heads == 0 || width == 0 || !width.is_multiple_of(heads) {
        let problem = "cannot be split into `num_attention_heads`";
        return Err(told(&format!("`hidden_size` {width} {problem} {heads}")));
    }
    Ok(config)
}

/// The encoder's tensors under the encoder's own names, or a list of problems.
fn match_up<B: Backend>(
    bert: &Bert<B>,
    tensors: &mut BTreeMap<String, TensorSnapshot>,
    reading: &Problems,
) -> Result<Vec<TensorSnapshot>, Vec<String>> {
    let names = names("").inverse();
    let (mut found, mut problems) = (Vec::new(), Vec::new());
    for wanted in bert.collect(None, Some(Box::new(BurnToPyTorchAdapter)), false) {
        let name = names.apply(&wanted.full_path());
        let Some(tensor) = tensors.remove(&name) else {
            problems.push(format!("`{name}` is missing"));
            continue;
        };
        if tensor.shape != wanted.shape {
            let [expected, shape] = [&wanted.shape, &tensor.shape].map(|it| it.to_vec());
            problems.push(format!("`{name}` must be of shape {expected:?}, and is {shape:?}"));
        } else if tensor.dtype != DType::F32 {
            problems.push(format!("`{name}` must be of type F32, and is {:?}", tensor.dtype));
        }
        found.push(placed(name, tensor, wanted, reading));
    }
    let unused = BTreeSet::from(UNUSED);
    let left = tensors.keys().filter(|name| !unused.contains(name.as_str()));
    problems.extend(left.map(|name| format!("`{name}` belongs to nothing")));
    if problems.is_empty() { Ok(found) } else { Err(problems) }
}
