//! Reads an encoder from a directory as Hugging Face keeps it: `config.json` and `model.safetensors`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Display,
    fs,
    path::Path,
};

use burn::tensor::{DType, backend::Backend};
use burn_lora::LoraModule;
use burn_store::{
    BurnToPyTorchAdapter, ModuleSnapshot, ModuleStore, PyTorchToBurnAdapter, SafetensorsStore,
    TensorSnapshot,
};
use serde_json::Value;

use super::bert::{Bert, BertConfig};

/// What files have and this encoder does not need: the numbers 0, 1, 2 …, and a layer on top of the
/// first token, which the mean over all tokens replaces.
const UNUSED: [&str; 3] = ["embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"];

/// The encoder that `dir` holds, and its sizes.
///
/// # Errors
///
/// If a file cannot be read or is not a BERT's, if a tensor of the encoder is missing, has another
/// shape or type, or if one is left over that is not in [`UNUSED`]. All of that is told at once.
pub fn load<B: Backend>(dir: &Path, device: &B::Device) -> Result<(Bert<B>, BertConfig), String> {
    let config = read_config(&dir.join("config.json"))?;
    let mut bert = config.init(device);
    let path = dir.join("model.safetensors");
    let told = |error: &dyn Display| format!("{}: {error}", path.display());
    let mut file = SafetensorsStore::from_file(&path);
    let mut tensors = file.get_all_snapshots().map_err(|error| told(&error))?.clone();
    let found = match_up(&bert, &mut tensors).map_err(|problems| told(&problems.join("; ")))?;
    let result = bert.apply(found, None, Some(Box::new(PyTorchToBurnAdapter)), false);
    let complete = result.errors.is_empty() && result.missing.is_empty();
    if complete { Ok((bert, config)) } else { Err(told(&result)) }
}

/// The sizes, once it is certain that this is the kind of BERT that [`Bert`] computes.
fn read_config(path: &Path) -> Result<BertConfig, String> {
    let told = |error: &dyn Display| format!("{}: {error}", path.display());
    let text = fs::read_to_string(path).map_err(|error| told(&error))?;
    let json: Value = serde_json::from_str(&text).map_err(|error| told(&error))?;
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
    let config: BertConfig = serde_json::from_value(json).map_err(|error| told(&error))?;
    let (width, heads) = (config.hidden_size, config.num_attention_heads);
    if heads == 0 || width == 0 || !width.is_multiple_of(heads) {
        let problem = "cannot be split into `num_attention_heads`";
        return Err(told(&format!("`hidden_size` {width} {problem} {heads}")));
    }
    Ok(config)
}

/// The encoder's tensors, by the encoder's names for them; or all that is wrong.
fn match_up<B: Backend>(
    bert: &Bert<B>,
    tensors: &mut BTreeMap<String, TensorSnapshot>,
) -> Result<Vec<TensorSnapshot>, Vec<String>> {
    let (mut found, mut problems) = (Vec::new(), Vec::new());
    for wanted in bert.collect(None, Some(Box::new(BurnToPyTorchAdapter)), false) {
        let name = <Bert<B> as LoraModule<B>>::peft_name(&wanted.full_path());
        let Some(mut tensor) = tensors.remove(&name) else {
            problems.push(format!("`{name}` is missing"));
            continue;
        };
        if tensor.shape != wanted.shape {
            let [expected, shape] = [&wanted.shape, &tensor.shape].map(|it| it.to_vec());
            problems.push(format!("`{name}` must be of shape {expected:?}, and is {shape:?}"));
        } else if tensor.dtype != DType::F32 {
            problems.push(format!("`{name}` must be of type F32, and is {:?}", tensor.dtype));
        }
        tensor.path_stack = wanted.path_stack;
        found.push(tensor);
    }
    let unused = BTreeSet::from(UNUSED);
    let left = tensors.keys().filter(|name| !unused.contains(name.as_str()));
    problems.extend(left.map(|name| format!("`{name}` belongs to nothing")));
    if problems.is_empty() { Ok(found) } else { Err(problems) }
}
