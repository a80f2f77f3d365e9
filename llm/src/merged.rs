//! Writes a decoder as a directory that Hugging Face's `transformers` loads.

use std::{fs, path::Path};

use burn::tensor::backend::Backend;
use burn_store::{BurnToPyTorchAdapter, ModuleSnapshot};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::Value;

use crate::{
    chat::Chat,
    error::{Context, Result},
    files::write_atomically,
    gguf::model::hugging_face_config,
    llama::Llama,
    pretrained::{is_gguf, python_name},
};

/// Files of the base that describe the model and its tokens.
const COPIED: [&str; 8] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
];

/// Writes the model to `out`, with the configuration and the tokens of `base`, a Hugging Face directory or
/// a GGUF file.
///
/// # Errors
///
/// If `out` is the directory of the base, or a file cannot be read or written.
pub fn save<B: Backend>(llama: &Llama<B>, chat: &Chat, base: &Path, out: &Path) -> Result<()> {
    let same =
        out.canonicalize().is_ok_and(|out| base.canonicalize().is_ok_and(|base| base == out));
    if same {
        return Err(format!("{}: the base is there, which stays as it is", out.display()));
    }
    save_weights(llama, out)?;
    let config = if is_gguf(base) { hugging_face_config(base)? } else { copy_config(base)? };
    let path = out.join("config.json");
    let config = serde_json::to_vec_pretty(&config).context(path.display())?;
    write_atomically(&path, &config).context(path.display())?;
    if is_gguf(base) {
        return chat.save(out);
    }
    for file in COPIED {
        let from = base.join(file);
        if from.exists() {
            fs::copy(&from, out.join(file)).context(from.display())?;
        }
    }
    Ok(())
}

/// Writes `model.safetensors` to `dir`.
///
/// # Errors
///
/// If it cannot be written.
pub fn save_weights<B: Backend>(llama: &Llama<B>, dir: &Path) -> Result<()> {
    let mut values = Vec::new();
    for tensor in llama.collect(None, Some(Box::new(BurnToPyTorchAdapter)), false) {
        let name = python_name(&tensor.full_path());
        let data = tensor.to_data().map_err(|error| format!("{name}: {error}"))?;
        values.push((name, tensor.shape.to_vec(), data.convert::<f32>()));
    }
    let views = values.iter().map(|(name, shape, data)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), data.as_bytes());
        Ok((name.as_str(), view.context(name)?))
    });
    let views = views.collect::<Result<Vec<_>>>()?;
    // `transformers` asks for this entry.
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    let path = dir.join("model.safetensors");
    let bytes = safetensors::serialize(views, Some(metadata)).context(path.display())?;
    write_atomically(&path, &bytes).context(path.display())
}

/// The configuration in the directory, with the type of the weights that are written.
fn copy_config(base: &Path) -> Result<Value> {
    let path = base.join("config.json");
    let config = fs::read(&path).context(path.display())?;
    let mut config: Value = serde_json::from_slice(&config).context(path.display())?;
    let fields = config.as_object_mut().ok_or("config.json is no object")?;
    for key in ["dtype", "torch_dtype"] {
        if let Some(kind) = fields.get_mut(key) {
            *kind = "float32".into();
        }
    }
    Ok(config)
}
